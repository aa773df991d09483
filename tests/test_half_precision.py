"""Parameters in half precision that a function computes with in float32: the results are those of promoted ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxq
from jaxq.fold import fold
from jaxq.program.trace import named_leaves, trace, trace_to_edit
from jaxq.program.widening import Widened, only_widened
from jaxq.qtensor import QTensor
from tests.zoo.specimen import linear, linear_params, norm, norm_params, normal, tokens, weight

RECIPES = {
    "os_plus": jaxq.chain(jaxq.os_plus(), jaxq.quantize()),
    "round to nearest": jaxq.quantize(),
    "llm_fp4": jaxq.skip(["head"], jaxq.llm_fp4()),
}


class Case(NamedTuple):
    """`function` and float32 `params`; `casting` and bfloat16 `half`, which are the same function and numbers."""

    function: Callable
    params: Any
    casting: Callable
    half: Any
    inputs: tuple


def as_half(params: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16), params)


def promoted(half: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a).astype(np.float32), half)


def casting(forward: Callable) -> Callable:
    return lambda params, *inputs: forward(jax.tree.map(lambda a: a.astype(jnp.float32), params), *inputs)


class Net(nnx.Module):
    def __init__(self, param_dtype: Any):
        kinds: dict[str, Any] = {"dtype": jnp.float32, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
        self.embed = nnx.Embed(40, 16, **kinds)
        self.norm = nnx.LayerNorm(16, **kinds)
        self.up = nnx.Linear(16, 32, **kinds)
        self.down = nnx.Linear(32, 16, use_bias=False, **kinds)

    def __call__(self, t: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # Flax's norm leaves the cast of its parameters to JAX
            x = self.embed(t)
            return self.embed.attend(x + self.down(jax.nn.relu(self.up(self.norm(x)))))


def scanned(p: Any, x: jax.Array) -> jax.Array:
    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return x + linear(jax.nn.relu(linear(norm(x, layer["ln"]), layer["up"])), layer["down"]), None

    return lax.scan(body, x, p["layers"])[0] @ p["head"]


def plain(p: Any, t: jax.Array) -> jax.Array:
    return jax.nn.relu(linear(norm(p["embed"][t], p["ln"]), p["up"])) @ p["head"]


@cache
def case(name: str) -> Case:
    if name == "nnx":
        (graph, half), (graph32, _) = nnx.split(Net(jnp.bfloat16)), nnx.split(Net(jnp.float32))
        half = as_half(half)
        run, run_half = (lambda p, t, g=g: nnx.merge(g, p)(t) for g in (graph32, graph))
        return Case(run, promoted(half), run_half, half, (tokens(1, 2, 6),))
    if name == "scan":
        layers = {"ln": norm_params(1, 2, 16), "up": linear_params(2, 2, 16, 32), "down": linear_params(3, 2, 32, 16)}
        forward, params, inputs = scanned, {"layers": layers, "head": weight(4, 16, 8)}, (normal(5, 2, 6, 16),)
    else:
        params = {"embed": normal(0, 40, 16), "ln": norm_params(1, 16), "head": weight(2, 32, 40)}
        params["up"], forward, inputs = linear_params(3, 16, 32), plain, (tokens(3, 2, 6),)
    half = as_half(params)
    return Case(forward, promoted(half), casting(forward), half, inputs)


def same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def same_changes(got: jaxq.Quantized, want: jaxq.Quantized, case: Case) -> None:
    """What was written is what was written for float32 parameters; the rest are the very arrays that were given."""
    same_bits((got.inputs, got.transforms), (want.inputs, want.transforms))
    given, before, after = (dict(named_leaves(tree)) for tree in (case.half, case.params, want.params))
    for path, leaf in named_leaves(got.params):
        if after[path] is before[path]:
            assert leaf is given[path]
        else:
            assert leaf.dtype == np.float32
            same_bits(leaf, after[path])


@pytest.mark.parametrize(
    "model, recipe",
    [
        pytest.param("plain", "round to nearest", marks=pytest.mark.slow),
        ("plain", "llm_fp4"),
        pytest.param("nnx", "os_plus", marks=pytest.mark.slow),
        ("scan", "os_plus"),
    ],
)
def test_the_results_are_those_of_promoted_parameters(model, recipe):
    of, step = case(model), RECIPES[recipe]
    want = jaxq.calibrate(of.function, of.params, [of.inputs], step)
    got = jaxq.calibrate(of.casting, of.half, [of.inputs], step)
    same_changes(got, want, of)
    same_bits(jaxq.execute(of.casting)(got, *of.inputs), jaxq.execute(of.function)(want, *of.inputs))
    same_bits(
        jaxq.execute(of.casting)(jaxq.pack(got), *of.inputs), jaxq.execute(of.function)(jaxq.pack(want), *of.inputs)
    )
    if want.transforms:
        folded = fold(of.casting, of.half, want.transforms, *of.inputs)
        same_changes(folded, fold(of.function, of.params, want.transforms, *of.inputs), of)
        assert any(leaf.dtype == ml_dtypes.bfloat16 for leaf in jax.tree.leaves(folded.params))


def test_an_interrupted_run_goes_on(tmp_path):
    of, count = case("plain"), iter((False, True))

    def stop(_: Any) -> None:
        if next(count):
            raise KeyboardInterrupt

    run = partial(jaxq.calibrate, of.casting, of.half, [of.inputs], jaxq.quantize(), checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(on_group=stop)
    got = run()
    same_changes(got, jaxq.calibrate(of.function, of.params, [of.inputs], jaxq.quantize()), of)


def test_what_is_also_read_in_half_precision_stays_so():
    def forward(p: Any, x: jax.Array) -> jax.Array:
        y = x @ p["a"].astype(jnp.float32)
        return (y @ p["b"].astype(jnp.float32)) * jnp.square(p["a"]).mean().astype(jnp.float32)

    params = as_half({name: weight(i, 16, 16) for i, name in enumerate("ab")})
    q = jaxq.calibrate(forward, params, [normal(2, 4, 16)], jaxq.quantize())
    assert isinstance(q.params["a"], QTensor) and q.params["a"].dtype == ml_dtypes.bfloat16
    assert isinstance(q.params["b"], QTensor) and q.params["b"].dtype == np.float32


X = normal(0, 8, 8)


def wide(w: jax.Array) -> jax.Array:
    return w.astype(jnp.float32)


WIDENED = [
    lambda w, x: x @ wide(w),
    lambda w, x: x @ wide(w.T),
    lambda w, x: x @ jax.jit(wide)(w) + wide(w.reshape(64))[0],
    lambda w, x: lax.scan(lambda x, row: (x * wide(row)[None], None), x, w)[0],
    lambda w, x: lax.scan(lambda x, _: (x @ wide(w), None), x, length=2)[0],
    lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ wide(w), lambda w: x @ wide(w.T), w),
    lambda w, x: lax.while_loop(lambda x: x[0, 0] < wide(w)[0, 0], lambda x: x @ wide(w) + wide(w), x),
]
READ_OTHERWISE = [
    lambda w, x: x.astype(w.dtype) @ w,
    lambda w, x: (x @ wide(w), w),
    lambda w, x: x @ wide(w) + wide(w[0, 0]),
    lambda w, x: x @ wide(w.astype(jnp.float8_e5m2)),
    lambda w, x: wide(jnp.take(w, jnp.array([0, 1]), axis=0)) + x[:2],
    lambda w, x: lax.scan(lambda c, _: ((c[0] @ wide(c[1]), c[1]), None), (x, w), length=2)[0],
    lambda w, x: lax.scan(lambda x, row: (x * wide(row)[None], row), x, w),
    lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ wide(w), lambda w: x + wide(w.max()), w),
    lambda w, x: lax.while_loop(lambda x: x[0, 0] < wide(w.max()), lambda x: x @ wide(w), x),
    lambda w, x: x,
]


@pytest.mark.parametrize("forward, expected", [(f, {"w"}) for f in WIDENED] + [(f, set()) for f in READ_OTHERWISE])
@pytest.mark.parametrize("half", (jnp.bfloat16, jnp.float16))
def test_which_parameters_are_read_as_float32_only(forward, expected, half):
    program = trace(lambda p, x: forward(p["w"], x), {"w": jax.ShapeDtypeStruct((8, 8), half)}, X)
    assert only_widened(program.layout.graph) == expected


@pytest.mark.parametrize(
    "forward",
    (
        lambda w, x: x.astype(w.dtype).astype(jnp.float32) @ wide(w),
        lambda w, x: x @ wide(w) + np.float32(jnp.finfo(w.dtype).eps),
    ),
)
def test_a_function_that_asks_for_the_type_gets_what_was_given(forward):
    _, leaves = trace_to_edit(lambda p, x: forward(p["w"], x), {"w": jnp.ones((8, 8), jnp.bfloat16)}, X)
    assert not isinstance(leaves["w"], Widened)
