"""Products of one row on CPU, in one pass over the codes: the same numbers as by the decoded weight."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import Float, Int, per_group, per_token
from jaxq.kernels import gemv
from tests.kernels.test_bands import ASYMMETRIC, by_transpose, tied, times
from tests.test_pack import ACTIVATIONS, FORMATS, named
from tests.zoo.specimen import normal, weight

DEPTH, COLUMNS = 640, 8  # two blocks, and half a one
OFTEN = [Int(2), Int(3, False), Int(4), Int(8), Int(8, False), Float(2, 1), Float(4, 3, 1)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gemv, "SMALL", 1)


def calls(run, packed, x) -> bool:
    return "row_product" in str(jax.make_jaxpr(run)(packed, x))


def check(forward, w, recipe, x=None, taken=True) -> None:
    """A compiled product of one row is made by runs, and is that of the simulated weight."""
    x = normal(0, 1, DEPTH) + 0.3 if x is None else x
    q = jaxq.calibrate(forward, {"w": w + 0.3}, [x], recipe)
    packed, run = jaxq.pack(q), jaxq.execute(forward)
    assert calls(run, packed, x) == taken
    want = jax.jit(run)(q, x)
    np.testing.assert_allclose(jax.jit(run)(packed, x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "fmt", [f if f in OFTEN else pytest.param(f, marks=pytest.mark.slow) for f in FORMATS], ids=named
)
def test_every_format(fmt):
    check(times, weight(1, DEPTH, COLUMNS), jaxq.quantize(fmt, None))


@pytest.mark.parametrize("activations", ACTIVATIONS[1:-2], ids=named)
def test_every_kind_of_activation(activations):
    check(times, weight(1, DEPTH, COLUMNS), jaxq.quantize(Int(4, symmetric=False), activations))


@pytest.mark.parametrize("weights", [Int(8), Int(4, symmetric=False), Float(2, 1)], ids=named)
def test_integers_are_summed_exactly(weights):
    x, w = abs(normal(0, 1, 8192)), abs(weight(1, 8192, COLUMNS))  # sums beyond what float32 holds exactly
    packed = jaxq.pack(jaxq.calibrate(times, {"w": w}, [x], jaxq.quantize(weights, ASYMMETRIC)))
    found = [jax.jit(jaxq.execute(times, how))(packed, x) for how in ("int8", "xla")]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    "weights",
    [
        *(per_group(Int(4), 320), per_group(Int(4, False), 128), per_group(Int(8), 64), per_group(Int(3, False), 32)),
        *(per_group(Int(5), 16), jaxq.mxfp4(), jaxq.nvfp4()),
    ],
    ids=named,
)
@pytest.mark.parametrize("activations", [None, per_token(ASYMMETRIC)], ids=named)
def test_groups(weights, activations):
    depth, whole = 640, weights.granularity.size != 320
    x = normal(0, 1, depth)
    check(times, weight(1, depth, COLUMNS), jaxq.quantize(weights, activations), x, taken=whole)


def test_groups_of_whole_blocks():
    check(times, weight(1, 1024, COLUMNS), jaxq.quantize(per_group(Int(4), 512), None), normal(0, 1, 1024))


def test_exponents_of_channels():
    x = normal(0, 1, DEPTH) * 2.0 ** np.float32(np.arange(DEPTH)[None] % 5)
    check(times, weight(1, DEPTH, COLUMNS), jaxq.llm_fp4(weights=4, activations=4), x)


@pytest.mark.parametrize("fmt", [Float(5, 2), Float(6, 1), jaxq.AnyFloat(8)], ids=named)
def test_what_float16_does_not_hold_is_decoded(fmt):
    w = weight(1, DEPTH, COLUMNS)
    q = jaxq.calibrate(times, {"w": w}, [normal(0, 1, DEPTH)], jaxq.quantize(fmt, None))
    assert calls(jaxq.execute(times), jaxq.pack(q), normal(0, 1, DEPTH)) == isinstance(fmt, jaxq.AnyFloat)
    check(times, w, jaxq.quantize(fmt, None), taken=isinstance(fmt, jaxq.AnyFloat))


@pytest.mark.parametrize("weights", [Int(4, False), Float(2, 1), per_group(Int(4, False), 64), jaxq.nvfp4()], ids=named)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_programs_in_half_precision(weights, dtype):
    """The weights are rounded as the program would round them."""
    depth = 640
    x, w = normal(0, 1, depth, dtype=dtype), weight(1, depth, COLUMNS).astype(dtype)
    q = jaxq.calibrate(times, {"w": w}, [x], jaxq.quantize(weights, None))
    packed, run = jaxq.pack(q), jaxq.execute(times)
    assert calls(run, packed, x)
    got, want = (jax.jit(run)(tree, x).astype(jnp.float32) for tree in (packed, q))
    np.testing.assert_allclose(got, want, rtol=float(jnp.finfo(dtype).eps), atol=1e-2)


@pytest.mark.parametrize("weights", [Int(4), per_group(Int(4), 64), jaxq.mxfp4()], ids=named)
def test_a_table_that_is_looked_up_too(weights):
    recipe = jaxq.quantize(weights, None)
    check(lambda p, token: tied(p, token), weight(1, 30, 640), recipe, jnp.arange(12)[3:4])


def test_a_weight_that_is_stored_by_columns():
    check(by_transpose, weight(1, COLUMNS, DEPTH), jaxq.quantize(Int(4), ASYMMETRIC))


def test_layers_of_a_scan():
    def layers(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    check(layers, weight(1, 2, 512, 512), jaxq.quantize(Int(4), None), normal(0, 1, 512))


@pytest.mark.parametrize("weights", [Int(4), per_group(Int(4, False), 32)], ids=named)
@pytest.mark.parametrize("activations", [None, ASYMMETRIC], ids=named)
def test_transformations(weights, activations):
    """Rows that `vmap` makes of one are multiplied together, and derivatives are those of the plain product."""
    depth = 640
    x, w = normal(0, 1, depth), weight(1, depth, COLUMNS)
    packed = jaxq.pack(jaxq.calibrate(times, {"w": w}, [x], jaxq.quantize(weights, activations)))

    def loss(x, how):
        return (jaxq.execute(times, how)(packed, x) ** 2).sum()

    def tangent(f):
        return lambda x: jax.jvp(f, (x,), (x,))[1]

    def of_rows(f):
        return lambda x: jax.vmap(f)(jnp.stack([x, -x]))

    for of in (
        jax.grad,
        of_rows,
        tangent,
        lambda f: of_rows(jax.grad(f)),
        lambda f: jax.vmap(f, axis_size=1, in_axes=None),
    ):
        got, want = (of(partial(loss, how=how)) for how in ("int8", "xla"))
        np.testing.assert_allclose(jax.jit(got)(x), jax.jit(want)(x), rtol=1e-4, atol=1e-4)


def differs_from_plain(w, x, recipe, batch=None) -> bool:
    packed = jaxq.pack(jaxq.calibrate(times, {"w": w}, [x if batch is None else batch], recipe))
    assert calls(jaxq.execute(times), packed, x)
    got, want = (jax.jit(jaxq.execute(times, how))(packed, x) for how in ("int8", "xla"))
    return not np.allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("activations", [Int(8), ASYMMETRIC, Float(2, 1)], ids=named)
def test_nan_under_a_static_grid_counts_as_zero(activations):
    x, w = normal(0, 1, DEPTH), weight(1, DEPTH, COLUMNS)
    recipe = jaxq.quantize(Int(4), activations)
    assert not differs_from_plain(w, x.at[0, 3].set(jnp.nan), recipe, batch=x)


def test_numbers_near_the_ends_of_float32():
    x, w = normal(0, 1, DEPTH), weight(1, DEPTH, COLUMNS)
    assert not differs_from_plain(w, x.at[0, 3].set(1e36), jaxq.quantize(Float(2, 1), None))
    assert not differs_from_plain(3e-38 * w, 1e6 * x, jaxq.quantize(jaxq.mxfp4(), None))


@pytest.mark.parametrize(("weights", "activations"), [(Int(8), Int(8)), (jaxq.nvfp4(), None)], ids=["W8A8", "NVFP4"])
def test_memory_does_not_grow_with_layers(weights, activations):
    """Not even with half a block at the end, nor with scales to decode."""

    def layers(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return x

    def taken(count: int) -> int:
        params, x = {"w": list(weight(1, count, 384, 384))}, normal(0, 1, 384)
        packed = jaxq.pack(jaxq.calibrate(layers, params, [x], jaxq.quantize(weights, activations)))
        return jax.jit(jaxq.execute(layers)).lower(packed, x).compile().memory_analysis().temp_size_in_bytes

    assert taken(6) < 1.2 * taken(2)


def test_a_row_takes_little_memory():
    """A 16th of what its decoded weight would."""
    w, x = weight(1, 2048, 1024), normal(0, 1, 2048)
    packed = jaxq.pack(jaxq.calibrate(times, {"w": w}, [x], jaxq.quantize(Int(4), None)))
    compiled = jax.jit(jaxq.execute(times)).lower(packed, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * w.nbytes / gemv.RUNS
