"""Which axes run over batch and tokens, followed through a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.program.tokens import label, spread_mask
from jaxq.program.trace import trace

P = {"w": jnp.ones((8, 8)), "table": jnp.ones((9, 8))}
X, T = jnp.ones((2, 5, 8)), jnp.ones((2, 5), jnp.int32)


def labels_of(f, x, given):
    program = trace(lambda p, x: f(p, x), P, x)
    graph = program.layout.graph
    inputs = [(None,) * len(graph.avals[v].shape) for v in graph.inputs]
    inputs[-1] = given
    labels, _ = label(graph, inputs)
    return labels[graph.outputs[0]]


BT = ("b", "t", None)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda p, x: x @ p["w"], BT),
        (lambda p, x: jnp.tanh(x) * 2.0 + x, BT),
        (lambda p, x: x - x.mean(-1, keepdims=True), BT),
        (lambda p, x: x.mean(-1), ("b", "t")),
        (lambda p, x: x.mean(1), ("b", None)),
        (lambda p, x: x.reshape(2, 5, 2, 4), ("b", "t", None, None)),
        (lambda p, x: x.reshape(2, 5, 2, 4).transpose(0, 2, 1, 3), ("b", None, "t", None)),
        (lambda p, x: x.reshape(10, 8), ("bt", None)),
        (lambda p, x: x.reshape(10, 8).reshape(2, 5, 8), BT),
        (lambda p, x: x[:, :, None, :], ("b", "t", None, None)),
        (lambda p, x: jnp.einsum("btc,bsc->bts", x, x), ("b", "t", "t")),
        (lambda p, x: jnp.repeat(x.reshape(2, 5, 2, 4), 3, axis=2), ("b", "t", None, None)),
        (lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"].reshape(1, 8, 8))[0], BT),
        (lambda p, x: jax.lax.cond(True, lambda x: x * 2.0, lambda x: x, x), BT),
        (lambda p, x: jax.checkpoint(lambda x: x @ p["w"])(x), BT),
        (lambda p, x: jax.lax.ragged_dot(x.reshape(10, 8), p["w"][None], jnp.array([10])), ("bt", None)),
        (lambda p, x: jnp.zeros((2, 5, 8)), (None, None, None)),
    ],
)
def test_labels_follow_the_axes(f, expected):
    assert labels_of(f, X, BT) == expected


def test_a_look_up_has_the_axes_of_its_indices():
    assert labels_of(lambda p, t: p["table"][t], T, ("b", "t")) == BT


def test_masks_are_spread_over_any_layout():
    mask = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(spread_mask(mask, BT), mask[:, :, None])
    np.testing.assert_array_equal(spread_mask(mask, ("t", None, "b")), mask.T[:, None, :])
    np.testing.assert_array_equal(spread_mask(mask, ("bt", None)), mask.reshape(-1, 1))
    assert spread_mask(mask, ("b", None)) is None
