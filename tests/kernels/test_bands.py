"""Weights decoded a band of columns at a time on CPU: the same products, in little memory."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq import Float, Int, per_group, per_token
from jaxq.kernels import bands
from tests.test_pack import ACTIVATIONS, FORMATS, named
from tests.zoo.specimen import normal, weight

ASYMMETRIC = Int(8, symmetric=False)
DEPTH, COLUMNS = 300, 10  # of which three bands are made below, two of which overlap
OFTEN = [Int(3, False), Int(4), Int(8), Float(4, 3, 1), jaxq.AnyFloat(4)]
slow = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    for name, value in (("SMALL", 1), ("BAND", 1), ("STEP", 4)):
        monkeypatch.setattr(bands, name, value)


def times(p, x):
    return x @ p["w"]


def by_transpose(p, x):
    return x @ p["w"].T


def tied(p, tokens):
    return jnp.tanh(p["w"][tokens]) @ p["w"].T


def check(forward, w, recipe, x=None, loops=True) -> None:
    """A compiled product of the packed weight has a loop, and is that of the simulated one."""
    x = normal(0, 3, 5, DEPTH) + 0.3 if x is None else x
    q = jaxq.calibrate(forward, {"w": w + 0.3}, [x], recipe)
    packed, run = jaxq.pack(q), jaxq.execute(forward)
    assert ("scan[" in str(jax.make_jaxpr(run)(packed, x))) == loops
    want = jax.jit(run)(q, x)
    np.testing.assert_allclose(jax.jit(run)(packed, x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("fmt", [f if f in OFTEN else pytest.param(f, marks=slow) for f in FORMATS], ids=named)
def test_every_format(small, fmt):
    check(times, weight(1, DEPTH, COLUMNS), jaxq.quantize(fmt, None))


@pytest.mark.parametrize("activations", ACTIVATIONS[1:-2], ids=named)
def test_every_kind_of_activation(small, activations):
    check(times, weight(1, DEPTH, COLUMNS), jaxq.quantize(Int(4, symmetric=False), activations))


def test_integers_are_summed_exactly(small):
    x, w = normal(0, 3, DEPTH), weight(1, DEPTH, COLUMNS)
    packed = jaxq.pack(jaxq.calibrate(times, {"w": w}, [x], jaxq.quantize(Int(4), ASYMMETRIC)))
    found = [jax.jit(jaxq.execute(times, how))(packed, x) for how in ("int8", "xla")]
    assert np.array_equal(*found)


def test_what_needs_no_decoding_is_no_loop(small):
    check(times, weight(1, DEPTH, COLUMNS), jaxq.quantize(Int(8), Int(8)), loops=False)


@pytest.mark.parametrize(
    "weights",
    [per_group(Int(4), 320), per_group(Int(3, False), 40), per_group(Int(8), 64), jaxq.mxfp4(), jaxq.nvfp4()],
    ids=named,
)
def test_groups(small, weights):
    depth = 640
    x = normal(0, 3, depth)
    check(times, weight(1, depth, COLUMNS), jaxq.quantize(weights, None), x)
    check(times, weight(1, depth, COLUMNS), jaxq.quantize(weights, per_token(ASYMMETRIC)), x)


def test_exponents_of_channels(small):
    x = normal(0, 64, DEPTH) * 2.0 ** np.float32(np.arange(DEPTH)[None] % 5)
    check(times, weight(1, DEPTH, COLUMNS), jaxq.llm_fp4(weights=4, activations=4), x)


def test_one_grid_for_a_weight_that_is_stored_by_columns(small):
    """Packed along its columns, for all that its grid tells: decoded whole."""
    weights = jaxq.per_tensor(Int(4))
    check(by_transpose, weight(1, 300, 40), jaxq.quantize(weights, None), normal(0, 3, 40), loops=False)
    recipe, tokens = jaxq.quantize(weights, None, embeddings=weights), jnp.arange(12).reshape(2, 6)
    check(tied, weight(1, 300, 40), recipe, tokens, loops=False)


@pytest.mark.parametrize("weights", [Int(4), Int(3, False), per_group(Int(4), 64), jaxq.mxfp4()], ids=named)
@pytest.mark.parametrize("activations", [None, pytest.param(ASYMMETRIC, marks=slow)], ids=named)
def test_a_table_that_is_looked_up_too(small, weights, activations):
    check(tied, weight(1, 30, 640), jaxq.quantize(weights, activations), jnp.arange(12).reshape(2, 6))


def test_a_weight_that_is_stored_by_columns(small):
    check(by_transpose, weight(1, COLUMNS, DEPTH), jaxq.quantize(Int(4), ASYMMETRIC))
    check(by_transpose, weight(1, COLUMNS, 640), jaxq.quantize(per_group(Int(4), 64), None), normal(0, 3, 640))


def test_heads(small):
    def heads(p, x):
        return jnp.einsum("bhd,hdn->bn", x, p["w"])

    check(heads, weight(1, 6, 100, COLUMNS), jaxq.quantize(Int(4), ASYMMETRIC), normal(0, 3, 6, 100))

    def into_heads(p, x):
        return jnp.einsum("bk,khd->bhd", x, p["w"])

    check(into_heads, weight(1, DEPTH, 2, 4), jaxq.quantize(Int(4), None), normal(0, 3, DEPTH))


def test_layers_of_a_scan(small):
    def layers(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    x, recipe = normal(0, 3, 512), jaxq.quantize(Int(4), None)
    check(layers, weight(1, 2, 512, 512), recipe, x)  # whose loop is not the bands'
    packed = jaxq.pack(jaxq.calibrate(layers, {"w": weight(1, 2, 512, 512)}, [x], recipe))
    scans = [str(jax.make_jaxpr(jaxq.execute(layers, how))(packed, x)).count("scan[") for how in ("int8", "xla")]
    assert scans[0] > scans[1]


@pytest.mark.parametrize("activations", [None, ASYMMETRIC], ids=named)
def test_transformations(small, activations):
    x, w = normal(0, 3, DEPTH), weight(1, DEPTH, COLUMNS)
    packed = jaxq.pack(jaxq.calibrate(times, {"w": w}, [x], jaxq.quantize(Int(4), activations)))

    def loss(x, how):
        return (jaxq.execute(times, how)(packed, x) ** 2).sum()

    def tangent(f):
        return lambda x: jax.jvp(f, (x,), (x,))[1]

    for of in (jax.grad, jax.vmap, tangent, lambda f: jax.vmap(jax.grad(f))):
        got, want = (of(partial(loss, how=how)) for how in ("int8", "xla"))
        np.testing.assert_allclose(jax.jit(got)(x), jax.jit(want)(x), rtol=1e-4, atol=1e-4)


def test_a_packed_model_takes_the_memory_of_a_band():
    """And not that of its weights in float32, as the simulated one does."""
    width, depth = 1024, 6

    def layers(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return x

    params, x = {"w": list(weight(1, depth, width, width))}, normal(0, 1, width)
    q = jaxq.calibrate(layers, params, [x], jaxq.quantize(Int(4), None))
    run = jax.jit(jaxq.execute(layers))

    def taken(tree) -> int:
        return run.lower(tree, x).compile().memory_analysis().temp_size_in_bytes

    whole = width * width * 4
    assert taken(jaxq.pack(q)) < 0.7 * whole < depth * whole <= taken(q)
