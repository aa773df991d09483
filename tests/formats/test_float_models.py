"""Models in floats: a recipe with them under JAX's transformations, and leaves whose format is data."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq import AnyFloat, Float
from jaxq.formats import fake_quant, grid_from_range
from jaxq.observers import average_mse, min_max, mse
from jaxq.qtensor import Grid, InputQuant, PerTensor, QTensor, Quantized, quantize_array
from jaxq.quantizer import fake_quantize_weight, quantize_weight
from jaxq.storage import load, save
from tests.zoo.specimen import linear, linear_params, normal, weight


def mlp(p, x):
    return linear(jax.nn.relu(linear(x, p["a"])), p["b"])


MLP = {"a": linear_params(0, 16, 32), "b": linear_params(1, 32, 8)}
X = normal(2, 3, 5, 16)

RECIPES = {
    "E2M1": (Float(2, 1), Float(2, 1)),
    "E4M3 tensor": (jaxq.per_tensor(Float(4, 3, reserved=1)), Float(4, 3, reserved=1)),
    "E3M2 token": (Float(3, 2), jaxq.per_token(Float(3, 2))),
    "E2M3 group": (jaxq.per_group(Float(2, 3), 8), jaxq.per_group(Float(2, 3), 8)),
    "E2M1 mse": (jaxq.per_channel(Float(2, 1), mse()), jaxq.per_tensor(Float(2, 1), average_mse())),
    "any split": (AnyFloat(6), AnyFloat(6)),
}


@pytest.fixture(scope="module")
def quantized():
    return {name: jaxq.calibrate(mlp, MLP, [X], jaxq.quantize(w, x)) for name, (w, x) in RECIPES.items()}


def error(q: Quantized) -> float:
    want = mlp(MLP, X)
    return float(jnp.linalg.norm(jaxq.execute(mlp)(q, X) - want) / jnp.linalg.norm(want))


def test_a_static_recipe_is_the_model_quantized_by_hand(quantized):
    q, fmt = quantized["E2M1"], Float(2, 1)

    def layer(x, name):
        w, grid = MLP[name]["kernel"], q.inputs[f"{name}/kernel"].grid
        most = jnp.abs(w).max(0, keepdims=True)
        w = fake_quant(fmt, w, grid_from_range(fmt, -most, most)[0])
        x = fake_quant(fmt, x, grid.scale.reshape(1, 1, 1))
        return x @ w + MLP[name]["bias"][None, None]

    np.testing.assert_array_equal(q.inputs["a/kernel"].grid.scale, np.abs(X).max() / np.float32(6))
    np.testing.assert_array_equal(jaxq.execute(mlp)(q, X), layer(jax.nn.relu(layer(X, "a")), "b"))


@pytest.mark.slow
def test_more_bits_and_searched_ranges_are_closer(quantized):
    errors = {name: error(q) for name, q in quantized.items()}
    assert errors["E2M3 group"] < errors["E2M1"] and errors["E3M2 token"] < errors["E2M1"]
    assert errors["E4M3 tensor"] < errors["E2M1"] and max(errors.values()) < 0.4
    w = MLP["a"]["kernel"]

    def lost(observer):
        return jnp.square(fake_quantize_weight(w, jaxq.per_channel(Float(2, 1), observer), (0,)) - w).sum(0)

    assert (lost(mse()) <= lost(min_max())).all() and lost(mse()).sum() < lost(min_max()).sum()


QUICK = ("E4M3 tensor", "any split")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in RECIPES])
def test_transformed_saved_and_exported(name, quantized, tmp_path):
    q, run = quantized[name], jaxq.execute(mlp)
    want = run(q, X)
    np.testing.assert_allclose(jax.jit(run)(q, X), want, rtol=1e-5, atol=1e-5)
    each = jax.vmap(run, in_axes=(None, 0))(q, X[:, None])
    np.testing.assert_allclose(each[:, 0], want, rtol=1e-5, atol=1e-5)
    low, high = (jax.grad(lambda x, f=f, p=p: f(p, x).sum())(X) for f, p in ((run, q), (mlp, MLP)))
    assert jnp.linalg.norm(low - high) < 0.6 * jnp.linalg.norm(high)
    save(tmp_path / "model", q, {})
    loaded, _ = load(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(q)
    np.testing.assert_array_equal(run(loaded, X), want)
    exported = jax.export.export(jax.jit(run))(q, X)
    np.testing.assert_array_equal(exported.call(q, X), jax.jit(run)(q, X))


# Leaves whose format is data ----------------------------------------------------------------------------------------


def leaf_of(w: jax.Array, mantissa: int, exponents: jax.Array) -> QTensor:
    """`w` as codes of 2**-exponents w, with the mantissa bits and the exponents of its input channels as data."""
    fmt, split = AnyFloat(4), jnp.full((1, 1), mantissa, jnp.int8)
    shifted = w * 2.0 ** -exponents.astype(jnp.float32)
    most = jnp.abs(shifted).max(0, keepdims=True)
    scale, _ = grid_from_range(fmt, -most, most, split)
    return replace(quantize_array(shifted, fmt, Grid(scale, mantissa=split)), exponents=exponents)


def input_of(x: jax.Array, mantissa: int, path: str) -> InputQuant:
    split, most = jnp.asarray(mantissa, jnp.int8), jnp.abs(x).max()
    grid = Grid(grid_from_range(AnyFloat(4), -most, most, split)[0], mantissa=split)
    return InputQuant(grid=grid, format=AnyFloat(4), granularity=PerTensor(), sites=(path,))


EXPONENTS = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (16, 1)), jnp.int8)
LAYERS = [weight(i, 16, 16) for i in range(3)]
MANTISSAS = (0, 1, 2)


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


@pytest.fixture(scope="module")
def stacked():
    """Three layers of different formats in one array: mantissa [3, 1, 1], exponents [3, 16, 1]."""
    leaves = [leaf_of(w, m, jnp.roll(EXPONENTS, i)) for i, (w, m) in enumerate(zip(LAYERS, MANTISSAS))]
    quants = [input_of(X, m, "w") for m in MANTISSAS[::-1]]
    leaf, quant = jax.tree.map(lambda *a: jnp.stack(a), *leaves), jax.tree.map(lambda *a: jnp.stack(a), *quants)
    assert leaf.grid.mantissa.shape == (3, 1, 1) and leaf.exponents.shape == (3, 16, 1)
    return Quantized({"w": leaf}, {"w": quant})


def test_a_leaf_stands_for_its_values_times_its_powers_of_two():
    for w, m in zip(LAYERS, MANTISSAS):
        leaf = leaf_of(w, m, EXPONENTS)
        power = 2.0 ** EXPONENTS.astype(jnp.float32)
        fmt = Float(3 - m, m)
        most = jnp.abs(w / power).max(0, keepdims=True)
        want = fake_quant(fmt, w / power, grid_from_range(fmt, -most, most)[0]) * power
        assert leaf.shape == w.shape and leaf.codes.dtype == jnp.uint8
        np.testing.assert_array_equal(leaf.dequantize(), want)
        np.testing.assert_array_equal(jax.jit(QTensor.dequantize)(leaf), want)
        half = replace(leaf, dtype=jnp.dtype(jnp.bfloat16))
        assert half.dequantize().dtype == jnp.bfloat16


def test_stacked_layers_of_different_formats_are_the_layers_one_by_one(stacked):
    want = X
    for i, m in enumerate(MANTISSAS):
        leaf = leaf_of(LAYERS[i], m, jnp.roll(EXPONENTS, i))
        np.testing.assert_array_equal(stacked.params["w"].dequantize()[i], leaf.dequantize())
        grid = input_of(X, MANTISSAS[::-1][i], "w").grid
        fmt = Float(3 - MANTISSAS[::-1][i], MANTISSAS[::-1][i])
        want = jnp.tanh(fake_quant(fmt, want, grid.scale.reshape(1, 1, 1)) @ leaf.dequantize())
    np.testing.assert_allclose(jaxq.execute(scanned)(stacked, X), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_stacked_layers_transformed_saved_and_exported(stacked, tmp_path):
    run = jaxq.execute(scanned)
    want = run(stacked, X)
    np.testing.assert_allclose(jax.jit(run)(stacked, X), want, rtol=1e-5, atol=1e-5)
    each = jax.vmap(run, in_axes=(None, 0))(stacked, X)
    np.testing.assert_allclose(each, want, rtol=1e-5, atol=1e-5)
    save(tmp_path / "model", stacked, {})
    loaded, _ = load(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(stacked)
    assert loaded.params["w"].exponents.dtype == loaded.params["w"].grid.mantissa.dtype == jnp.int8
    np.testing.assert_array_equal(run(loaded, X), want)
    exported = jax.export.export(jax.jit(run))(stacked, X)
    np.testing.assert_array_equal(exported.call(stacked, X), jax.jit(run)(stacked, X))

    def loss(scale):
        leaf = stacked.params["w"]
        return run(replace(stacked, params={"w": replace(leaf, grid=replace(leaf.grid, scale=scale))}), X).sum()

    slope = jax.grad(loss)(stacked.params["w"].grid.scale)
    assert slope.shape == (3, 1, 16) and np.isfinite(slope).all() and np.asarray(slope).any()
    assert np.isfinite(jax.grad(lambda x: run(stacked, x).sum())(X)).all()


def test_formats_that_are_data_are_serialized():
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers, which JAX does not install")
    q = Quantized({"w": leaf_of(LAYERS[0], 2, EXPONENTS)}, {"w": input_of(X, 1, "w")})
    run = jax.jit(jaxq.execute(lambda p, x: x @ p["w"]))
    exported = jax.export.export(run)(q, X)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    np.testing.assert_array_equal(again.call(q, X), run(q, X))


def test_calibrating_on_goes_through_leaves_whose_format_is_data(stacked):
    """What is encoded stays so; only the inputs' grids are found."""
    q = jaxq.calibrate(scanned, stacked.params, [X], jaxq.quantize(Float(2, 1), Float(3, 2)))
    for mine, theirs in zip(jax.tree.leaves(q.params), jax.tree.leaves(stacked.params)):
        np.testing.assert_array_equal(mine, theirs)
    assert q.inputs["w"].grid.scale.shape == (3,)
    np.testing.assert_array_equal(q.inputs["w"].grid.scale[0], np.abs(X).max() / np.float32(28))


@pytest.mark.slow
def test_stacked_float_codes_are_the_layers_codes():
    w = normal(0, 3, 8, 5)
    layers = [quantize_weight(a, jaxq.per_group(Float(2, 1), 4), (0,)) for a in w]
    together = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    np.testing.assert_array_equal(together.dequantize(), jnp.stack([q.dequantize() for q in layers]))
