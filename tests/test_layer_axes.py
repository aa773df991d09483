"""Layers stacked along the second axis, as MaxText has them: everything is as with the first one."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq import storage
from tests.zoo.specimen import linear, linear_params, norm, norm_params, normal

PARAMS = {"ln": norm_params(0, 3, 16), "up": linear_params(1, 3, 16, 32), "down": linear_params(2, 3, 32, 16)}
X = normal(3, 2, 5, 16)
RECIPES = {
    "os_plus": jaxq.chain(jaxq.os_plus(), jaxq.quantize(jaxq.Int(4), jaxq.Int(8, symmetric=False))),
    "llm_fp4": jaxq.llm_fp4(weights=4, activations=8),
}
EACH = pytest.mark.parametrize("recipe", ["os_plus", pytest.param("llm_fp4", marks=pytest.mark.slow)])


def moved(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), tree)


def first(p: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return x + linear(jax.nn.relu(linear(norm(x, p["ln"]), p["up"])), p["down"]), None

    return lax.scan(layer, x, p)[0]


def second(p: Any, x: jax.Array) -> jax.Array:
    return first(jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), p), x)


@cache
def both(recipe: str) -> tuple[jaxq.Quantized, jaxq.Quantized]:
    one = jaxq.calibrate(first, PARAMS, [X], RECIPES[recipe])
    return one, jaxq.calibrate(second, moved(PARAMS), [X], RECIPES[recipe])


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@EACH
def test_each_layer_is_quantized_as_along_the_first_axis(recipe):
    one, other = both(recipe)
    assert other.params["up"]["kernel"].codes.shape == (16, 3, 32)
    same(moved(one.params), other.params)
    same((one.inputs, one.transforms), (other.inputs, other.transforms))


@EACH
def test_packed_saved_and_run(recipe, tmp_path):
    one, other = both(recipe)
    packed = jaxq.pack(other)
    storage.save(tmp_path / "model", packed, {})
    restored, _ = storage.load(tmp_path / "model")
    run = jax.jit(jaxq.execute(second))
    want = run(other, X)
    np.testing.assert_array_equal(want, jax.jit(jaxq.execute(first))(one, X))
    np.testing.assert_array_equal(run(restored, X), want)


def test_folded():
    one, other = both("os_plus")
    folded = jaxq.fold(second, moved(PARAMS), other.transforms, X)
    assert not folded.inputs
    same(moved(jaxq.fold(first, PARAMS, one.transforms, X).params), folded.params)
    np.testing.assert_allclose(second(folded.params, X), second(moved(PARAMS), X), rtol=1e-4, atol=1e-4)
