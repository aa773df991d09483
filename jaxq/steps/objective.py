"""The error that a search minimizes: a piece of the program after the group, replayed with quantized numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.contraction import along, quantize_activation, transform
from jaxq.formats import Int, grid_from_range
from jaxq.kernels.plain import activation_integers, weight_integers
from jaxq.products import multiply_integers
from jaxq.program._compat import bind
from jaxq.program.segments import Segment, evaluate
from jaxq.program.sites import Operands
from jaxq.program.views import View, pull
from jaxq.qtensor import Grid, PerGroup
from jaxq.quantizer import Quantizer, fake_quantize_weight, quantize_weight


@dataclass(frozen=True)
class Consumer:
    """One of the group's weights, without its name: equal layers have equal consumers."""

    op: int  # its contraction's place in the segment
    kind: str
    operands: Operands
    w_ndim: int
    leaf_axes: tuple[int, ...]
    experts: tuple[int, ...]
    views: tuple[View, ...]


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


Results = dict[int, Callable[[Any, list], list]]  # by op, in place of the equation's own, see `evaluate`


def replay(piece: Piece, numbers: Numbers, products: Results | None = None) -> list[jax.Array]:
    """The piece's outputs; `products` give the results of its consumers where the equations are not to."""
    given = {"x": (numbers.x,), "weight": numbers.weights, "bias": numbers.biases, "other": numbers.others}
    changes = dict(products or {})
    for consumer, bias in zip(piece.consumers, numbers.output_biases, strict=True):
        if bias is not None:
            changes[consumer.op] = partial(_biased, bias, changes.get(consumer.op, bind))
    return evaluate(piece.segment, [given[kind][k] for kind, k in piece.slots], changes)


def _biased(bias: jax.Array, result: Callable[[Any, list], list], eqn: Any, args: list) -> list:
    (out,) = result(eqn, args)
    return [out + bias.astype(out.dtype)]


def replay_quantized(
    piece: Piece,
    weights: Quantizer | None,
    activations: Quantizer | None,
    numbers: Numbers,
    s: jax.Array,
    limit: jax.Array,
) -> list[jax.Array]:
    """The piece's outputs with Qa(X / s) and Qw(diag(s) W) (OS+, eq. 6). A static grid spans `[-limit, limit]`."""
    x, scaled = transform(numbers.x, None, s, piece.x_axes), []
    for consumer, w in zip(piece.consumers, numbers.weights, strict=True):
        spread = pull(tuple(reversed(consumer.views)), along(s, consumer.operands.w_axes, consumer.w_ndim))
        scaled.append(w * spread.astype(w.dtype))
    grid = None
    if activations is not None and not activations.dynamic:
        grid = Grid(*grid_from_range(activations.format, -limit, limit))
    products = None
    if weights is not None and activations is not None and _of_integers(piece, weights, activations):
        products = _products(piece, weights, activations, x, grid, scaled)
    elif weights is not None:
        scaled = [fake_quantize_weight(w, weights, c.leaf_axes, c.experts) for w, c in zip(scaled, piece.consumers)]
    if activations is not None:  # not for the products alone: around a post-norm block a residual reads it, too
        x = quantize_activation(x, activations.format, activations.granularity, grid, piece.x_axes)
    return replay(piece, replace(numbers, x=x, weights=tuple(scaled)), products)


def _of_integers(piece: Piece, weights: Quantizer, activations: Quantizer) -> bool:
    """Whether the consumers are products of integers with one scale for each row and column. These are exact in 8
    bits, and take a fraction of the time that float32's take."""
    plain = all(
        c.kind == "linear" and not c.experts and piece.segment.ops[c.op].eqn.params.get("out_sharding") is None
        for c in piece.consumers
    )
    return plain and all(
        isinstance(q.format, Int) and not isinstance(q.granularity, PerGroup) for q in (weights, activations)
    )


def _products(
    piece: Piece, weights: Quantizer, activations: Quantizer, x: jax.Array, grid: Grid | None, scaled: list[jax.Array]
) -> Results:
    rows = activation_integers(x, activations.format, activations.granularity, grid, piece.x_axes)

    def result(consumer: Consumer, w: jax.Array, eqn: Any, _: list) -> list:
        columns = weight_integers(quantize_weight(w, weights, consumer.leaf_axes))
        return [multiply_integers(eqn, consumer.operands, consumer.views, rows, columns)]

    return {c.op: partial(result, c, w) for c, w in zip(piece.consumers, scaled, strict=True)}


def squared_error(outs: list, targets: list, valid: tuple) -> jax.Array:
    """Summed over features and real tokens, in float32."""
    total = jnp.float32(0)
    for out, target, real in zip(outs, targets, valid, strict=True):
        error = jnp.square(out.astype(jnp.float32) - target.astype(jnp.float32))
        total += (error if real is None else jnp.where(real, error, jnp.float32(0))).sum()
    return total
