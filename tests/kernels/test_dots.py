"""Products by XLA: those in 8 bits are exact, in parts or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.kernels.dots import DEPTH, ROWS_IN_PARTS, exact_dot

DRAW = np.random.default_rng(0)


def batches(jaxpr: str) -> bool:
    return "dimension_numbers=(([2], [1]), ([1], [0]))" in jaxpr


@pytest.mark.parametrize(
    ("rows", "depth", "parts"),
    [(1, 3 * 1000, True), (5, 4 * DEPTH, True), (5, DEPTH, False), (5, 2053, False), (ROWS_IN_PARTS + 1, 3000, False)],
)
@pytest.mark.parametrize("k_axis", [0, 1])
def test_exact_whatever_the_depth(rows, depth, parts, k_axis):
    x, w = (DRAW.integers(100, 128, shape).astype(np.int8) for shape in ((rows, depth), (depth, 3)))

    def run(x, w):
        return exact_dot(x, None, w.T if k_axis else w, k_axis)

    operands = jnp.asarray(x, jnp.float32), jnp.asarray(w)
    assert batches(str(jax.make_jaxpr(run)(*operands))) == (parts and not k_axis)
    want = (x.astype(np.int64) @ w.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(run)(*operands), want)


def test_derivatives_are_those_of_floats():
    x, w = (
        jnp.asarray(DRAW.integers(-9, 9, (2, 3000)), jnp.float32),
        jnp.asarray(DRAW.integers(-9, 9, (3000, 3)), jnp.int8),
    )
    got = jax.grad(lambda x: (exact_dot(x, None, w, 0) ** 2).sum())(x)
    want = jax.grad(lambda x: ((x @ w.astype(jnp.float32)) ** 2).sum())(x)
    np.testing.assert_allclose(got, want, rtol=1e-6)
