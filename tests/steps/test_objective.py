"""Pieces of program replayed with quantized numbers: products of integers mean what products of floats do."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.contraction import dynamic_grid, quantize_activation
from jaxq.formats import grid_from_range
from jaxq.qtensor import Grid
from jaxq.quantizer import fake_quantize_weight, per_channel, per_group, per_tensor, per_token
from jaxq.steps import Group, Step, quantize
from jaxq.steps.group import numbers_of
from jaxq.steps.objective import replay, replay_quantized
from jaxq.steps.shift import touch

CHANNELS = 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, CHANNELS)).astype(np.float32)
PARAMS = {
    "plain": RNG.normal(size=(CHANNELS, 6)).astype(np.float32),
    "views": RNG.normal(size=(CHANNELS, 2, 4)).astype(np.float32),
    "first": RNG.normal(size=(CHANNELS, 3)).astype(np.float32),
    "bias": RNG.normal(size=8).astype(np.float32),
}


def forward(params, x):
    """A matrix, one that is seen through a reshape and has a bias, and one that is the product's first operand."""
    wide = x @ params["views"].reshape(CHANNELS, 8) + params["bias"][None, None]
    first = jax.lax.dot_general(params["first"], x, (((0,), (2,)), ((), ())))
    return x @ params["plain"], wide, first


def captured(recipe: Step) -> Group:
    seen: list[Group] = []

    def keep(group: Group) -> Group:
        pieces = group.objectives
        seen.append(replace(group, find_objectives=lambda: pieces))
        return group

    jaxq.calibrate(forward, PARAMS, [X], jaxq.chain(Step(touch(lambda plan: True), keep), recipe))
    (group,) = seen
    return group


SETTINGS = {
    "tensor": (per_tensor(jaxq.Int(8)), per_tensor(jaxq.Int(8))),
    "asymmetric": (per_channel(jaxq.Int(6, False)), per_tensor(jaxq.Int(6, False))),
    "token": (per_channel(jaxq.Int(4)), per_token(jaxq.Int(4, False))),
    "groups": (per_group(jaxq.Int(4), 4), per_token(jaxq.Int(4))),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_of_integers_are_those_of_fake_quantized_numbers(setting: str) -> None:
    weights, activations = SETTINGS[setting]
    group = captured(quantize(weights, activations))
    piece = group.objectives.outputs.piece
    bias = {"plain": jnp.arange(6.0).reshape(1, 1, 6)}  # as of a shift that a consumer without a bias takes
    numbers = numbers_of(replace(group, output_bias=bias), group.objectives.outputs, 0)
    assert len(numbers.weights) == 3 and any(b is not None for b in numbers.output_biases)
    s, limit = jnp.asarray(RNG.uniform(1, 3, CHANNELS), jnp.float32), jnp.float32(2.5)

    def expected(numbers):
        x = numbers.x / jnp.broadcast_to(s, numbers.x.shape)
        fmt, granularity = activations.format, activations.granularity
        static = Grid(*grid_from_range(fmt, -limit, limit))
        grid = dynamic_grid(x, fmt, granularity, (2,)) if activations.dynamic else static
        ws = [w * s.reshape(-1, *[1] * (w.ndim - 1)) for w in numbers.weights]
        ws = tuple(fake_quantize_weight(w, weights, (0,)) for w in ws)
        return replay(piece, replace(numbers, x=quantize_activation(x, fmt, granularity, grid, (2,)), weights=ws))

    def found(numbers):
        return replay_quantized(piece, weights, activations, numbers, s, limit)

    for got, want in zip(jax.jit(found)(numbers), jax.jit(expected)(numbers), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    in_integers = "preferred_element_type=int32" in str(jax.make_jaxpr(found)(numbers))
    assert in_integers == (setting != "groups")
