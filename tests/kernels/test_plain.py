"""What a GPU is given in place of a product as it stands, run on the CPU: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.kernels.plain import ROWS_FOR_LIBRARIES, Integers, product
from tests.formats.test_division import GPU, as_on_gpu

DRAW = np.random.default_rng(0)
W = jnp.asarray(DRAW.integers(-127, 128, (64, 16)), jnp.int8)


def multiplied(x: jax.Array, w: jax.Array) -> jax.Array:
    return product(Integers(x, bound=127), Integers(w, bound=127), None, "int8")


def in_int8(rows: int) -> bool:
    """Whether a GPU's program multiplies integers."""
    with jax.sharding.use_abstract_mesh(GPU):
        text = str(jax.make_jaxpr(lambda *args: multiplied(*args))(jnp.zeros((rows, 64)), W))  # traced anew
    assert "dot_general" in text
    return "preferred_element_type=int32" in text


@pytest.mark.parametrize("rows", [16, ROWS_FOR_LIBRARIES])
def test_int8_products_are_exact_whatever_the_order_of_the_weights(rows):
    x = jnp.asarray(DRAW.integers(-127, 128, (rows, 64)), jnp.float32)
    assert np.array_equal(as_on_gpu(multiplied, x, W), np.asarray(x, int) @ np.asarray(W, int))


def test_weights_beside_floats_are_decoded_first():
    x = jnp.asarray(DRAW.standard_normal((ROWS_FOR_LIBRARIES, 64)), jnp.bfloat16)
    found = as_on_gpu(lambda x, w: product(Integers(x), Integers(w), None, "int8"), x, W)
    assert np.array_equal(found, product(Integers(x), Integers(W), None, "int8"))


def test_no_int8_products_where_xla_doubles_them(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert in_int8(16)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    assert not in_int8(16)
