"""The error that a search minimizes: a piece of the program after the group, replayed with quantized numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.contraction import along, quantize_activation, transform
from jaxq.formats import grid_from_range
from jaxq.program._compat import bind
from jaxq.program.segments import Segment, evaluate
from jaxq.program.views import View, pull
from jaxq.qtensor import Grid
from jaxq.quantizer import Quantizer, fake_quantize_weight


@dataclass(frozen=True)
class Consumer:
    """One of the group's weights, without its name: equal layers have equal consumers."""

    op: int  # its contraction's place in the segment
    leaf_axes: tuple[int, ...]
    experts: tuple[int, ...]
    views: tuple[View, ...]
    w_axes: tuple[int, ...]
    w_ndim: int


@dataclass(frozen=True)
class Piece:
    """A piece of program from the group's input to `segment`'s outputs.

    `slots[i]` says what the segment's i-th input is: ("x", 0), ("weight", k), ("bias", k) or ("other", k).
    """

    segment: Segment
    slots: tuple[tuple[str, int], ...]
    consumers: tuple[Consumer, ...]
    x_axes: tuple[int, ...]


@dataclass(frozen=True)
class Objective:
    """A piece with, for each microbatch, the other values that it reads, the real tokens of its outputs and how many
    they are."""

    piece: Piece
    others: tuple[tuple[Any, ...], ...]
    valid: tuple[tuple[jax.Array | None, ...], ...]
    tokens: tuple[int, ...]

    def tokens_in(self, count: int) -> int:
        return sum(self.tokens[:count])


@dataclass(frozen=True)
class Objectives:
    """The two objectives of OS+ for a group; `mixes`: the way to the next input mixes the group's outputs with each
    other (attention, a gated product), so that their own errors do not tell what it does with them."""

    outputs: Objective
    next_input: Objective | None = None
    mixes: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Numbers:
    """What a piece is replayed on: the group's input and parameters, and one microbatch's other values."""

    x: jax.Array
    weights: tuple[jax.Array, ...]
    biases: tuple[Any, ...]
    output_biases: tuple[Any, ...]
    others: tuple[Any, ...]


def replay(piece: Piece, numbers: Numbers) -> list[jax.Array]:
    """The piece's outputs."""
    given = {"x": (numbers.x,), "weight": numbers.weights, "bias": numbers.biases, "other": numbers.others}
    changes = {}
    for consumer, bias in zip(piece.consumers, numbers.output_biases, strict=True):
        if bias is not None:
            changes[consumer.op] = partial(_biased, bias)
    return evaluate(piece.segment, [given[kind][k] for kind, k in piece.slots], changes)


def _biased(bias: jax.Array, eqn: Any, args: list) -> list:
    (out,) = bind(eqn, args)
    return [out + bias.astype(out.dtype)]


def scaled_and_quantized(
    piece: Piece,
    weights: Quantizer | None,
    activations: Quantizer | None,
    numbers: Numbers,
    s: jax.Array,
    limit: jax.Array,
) -> Numbers:
    """Qa(X / s) and Qw(diag(s) W) (OS+, eq. 6). A static grid spans `[-limit, limit]`."""
    x = transform(numbers.x, None, s, piece.x_axes)
    if activations is not None:
        grid = None
        if not activations.dynamic:
            grid = Grid(*grid_from_range(activations.format, -limit, limit))
        x = quantize_activation(x, activations.format, activations.granularity, grid, piece.x_axes)
    scaled = []
    for consumer, w in zip(piece.consumers, numbers.weights, strict=True):
        spread = pull(tuple(reversed(consumer.views)), along(s, consumer.w_axes, consumer.w_ndim))
        w = w * spread.astype(w.dtype)
        scaled.append(w if weights is None else fake_quantize_weight(w, weights, consumer.leaf_axes, consumer.experts))
    return Numbers(x, tuple(scaled), numbers.biases, numbers.output_biases, numbers.others)


def squared_error(outs: list, targets: list, valid: tuple) -> jax.Array:
    """Summed over features and real tokens, in float32."""
    total = jnp.float32(0)
    for out, target, real in zip(outs, targets, valid, strict=True):
        error = jnp.square(out.astype(jnp.float32) - target.astype(jnp.float32))
        total += (error if real is None else jnp.where(real, error, jnp.float32(0))).sum()
    return total
