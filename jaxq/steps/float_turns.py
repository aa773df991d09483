"""LLM-FP4's alternation: the weights' formats and scales given the activation's, then the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import AnyFloat, Int, fake_quant
from jaxq.formats.floating import Kind, power_of_two, scale_from_width
from jaxq.qtensor import PerGroup, PerTensor, pytree
from jaxq.quantizer import Quantizer, row_size, rows_of
from jaxq.search import Search, coarse_to_fine
from jaxq.steps.float_layer import Layer
from jaxq.steps.float_search import Candidates, Found, channel_exponents, log_clips, magnified, search_grids
from jaxq.steps.output_error import (
    Metric,
    Problem,
    activation_problem,
    blocks_of,
    diagonal_hessian,
    output_error,
    plain_problem,
    tokens_within,
    total_error,
    weight_problem,
)


class Exponents(Enum):
    """What becomes of the exponent k of a channel that is magnified by 2**k before it is quantized."""

    NONE = "there is none: one exponent bias for the whole activation"
    PRE_SHIFTED = "the weights absorb 2**-k, and are quantized after that"
    POST_SHIFTED = "the weights are quantized as they are, and their codes keep -k beside them"


@dataclass(frozen=True)
class FloatSearch:
    """How formats and clip ranges are searched.

    Attributes:
      rounds: how often weights and activations take turns, at most; they stop when nothing changes any more.
      clips: the clip values that are tried.
      method: `exhaustive()` or `coarse_to_fine()`.
      metric: `output_error`, `cosine` or `diagonal_hessian`.
      tokens: how many tokens, evenly spaced, the activations' search looks at (their ranges and the weights' search see
        all of them); None is all.
      budget: bytes that it may take beside the layer's own arrays. Candidates are priced for as many rows at a time as
        that allows. Where it does not hold what is summed over tokens, [in, in], weights are searched by as many
        tokens, evenly spaced, as it does hold; activations likewise. Less than a quarter of the budget is never left
        for what grows with the weight: its values to quantize, and its quantized ones.

    Raises:
      ValueError: fewer than one round.
    """

    rounds: int = 3
    clips: Candidates = log_clips()
    method: Search = coarse_to_fine(stride=8, keep=4)
    metric: Metric = output_error
    tokens: int | None = 512
    budget: int = 2**30

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"FloatSearch: rounds is {self.rounds}; at least one is needed")


@pytree
class Input:
    """How an activation is quantized: the tensor's scale and mantissa bits, [1, 1, 1], and each channel's exponent k,
    int32 [channels]."""

    scale: jax.Array
    mantissa: jax.Array
    exponents: jax.Array


@dataclass(frozen=True)
class Solution:
    """What the alternation found; `losses` after each turn: the squared error of all outputs (empty where outputs are
    not products of matrices)."""

    weights: tuple[Found, ...]
    input: Input | None
    exponents: Exponents
    losses: np.ndarray


class _Turn(NamedTuple):
    """The weights' grids for an input, and the error of both together."""

    input: Input | None
    weights: tuple[Found, ...]
    loss: jax.Array


def alternate(
    layer: Layer,
    weights: Quantizer | None,
    activations: Quantizer | None,
    how: FloatSearch,
    tried: Sequence[Exponents],
) -> Solution:
    """Searches the weights given the activation, then the activation given the weights, in turns, and keeps the turn of
    least error. What is not to be quantized stays as it is.

    Of several `tried` exponents those are kept with which the first turn's error is the least.
    """
    fmt = None if activations is None else activations.format
    assert not isinstance(fmt, Int)
    widest = _widest(layer)

    def turn(given: Input | None, exponents: Exponents) -> _Turn:
        return _turn(layer, given, _absorb(exponents), weights, fmt, how)

    firsts = [(e, turn(None if fmt is None else _unclipped(fmt, widest, e), e)) for e in tried]
    exponents, first = min(firsts, key=lambda one: float(one[1].loss))
    turns = [first]
    while fmt is not None and len(turns) <= how.rounds:
        last = turns[-1]
        found = _input(layer, last.weights, last.input, _absorb(exponents), widest, weights, fmt, how, exponents)
        if _same(found, last.input):
            break
        turns.append(turn(found, exponents))
        if weights is None:
            break
    losses = np.asarray([one.loss for one in turns], np.float32)
    best = turns[int(losses.argmin()) if layer.products else -1]
    return Solution(best.weights, best.input, exponents, losses if layer.products else losses[:0])


def _same(a: Input, b: Input | None) -> bool:
    return b is not None and all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def _absorb(exponents: Exponents) -> jax.Array:
    """0 or 1, whether weights take the exponents before they are quantized; data, so that both are one compiled
    function."""
    return jnp.int32(exponents is Exponents.PRE_SHIFTED)


def _turn(
    layer: Layer, given: Input | None, absorb: jax.Array, weights: Quantizer | None, fmt: Kind | None, how: FloatSearch
) -> _Turn:
    both = zip(layer.ws if weights is not None else (), layer.reads)
    found = tuple(_weight(layer, w, reads, given, absorb, weights, fmt, how) for w, reads in both)
    return _Turn(given, found, _loss(layer, found, given, absorb, weights, fmt))


@jax.jit
def _widest(layer: Layer) -> jax.Array:
    """The largest magnitude of each channel, [channels]."""
    return jnp.max(jnp.abs(layer.x) * layer.real[:, :, None], (0, 1))


@partial(jax.jit, static_argnums=(0, 2))
def _unclipped(fmt: Kind, widest: jax.Array, exponents: Exponents) -> Input:
    """Where the turns begin: the usual format, at the scale at which nothing is clipped."""
    usual = fmt.usual if isinstance(fmt, AnyFloat) else fmt
    mantissa = jnp.full((1, 1, 1), usual.mantissa_bits, jnp.int32)
    scale = scale_from_width(fmt, widest.max().reshape(1, 1, 1), mantissa)
    return Input(scale, mantissa, _exponents(fmt, scale, widest, mantissa, exponents))


def _exponents(fmt: Kind, scale: jax.Array, widest: jax.Array, mantissa: jax.Array, exponents: Exponents) -> jax.Array:
    if exponents is Exponents.NONE:
        return jnp.zeros(widest.shape, jnp.int32)
    return channel_exponents(fmt, scale, widest, mantissa)


@partial(jax.jit, static_argnums=(5, 6, 7))
def _weight(
    layer: Layer,
    w: jax.Array,
    reads: jax.Array | None,
    given: Input | None,
    absorb: jax.Array,
    quantizer: Quantizer,
    x_fmt: Kind | None,
    how: FloatSearch,
) -> Found:
    """The grids of one weight for an input."""
    blocks = _blocks(w.shape, quantizer)
    units = _units(given, absorb, w.shape[1], reads, blocks)

    def read(channels: jax.Array) -> jax.Array:
        return channels if reads is None else channels[reads]

    def quantized(x: jax.Array, k: jax.Array) -> jax.Array:
        return x if given is None or x_fmt is None else magnified(x, x_fmt, given.scale, k, given.mantissa)

    k = jnp.zeros(layer.x.shape[2], jnp.int32) if given is None else given.exponents
    if layer.products:
        x = layer.x if reads is None else layer.x[:, :, reads]
        problem = weight_problem(w, x, layer.real, lambda some: quantized(some, read(k)), blocks, how.budget)
        return _searched(problem, quantizer, how.metric, how, units)
    x_hat = quantized(layer.x.reshape(-1, layer.x.shape[2]), k)
    moment = read((jnp.square(x_hat) * layer.real.reshape(-1, 1)).sum(0)).reshape(blocks, -1)
    problem = plain_problem(blocks_of(w, blocks), moment, jnp.ones(len(w), jnp.float32))
    return _searched(problem, quantizer, diagonal_hessian, how, units)


def _units(given: Input | None, absorb: jax.Array, count: int, reads: jax.Array | None, blocks: int) -> jax.Array:
    """The powers of two that the weights' inputs take before they are quantized, [blocks, 1, n]."""
    k = jnp.zeros(count, jnp.int32) if given is None else given.exponents * absorb
    return blocks_of(power_of_two(k if reads is None or given is None else k[reads])[None], blocks)


def _hats(
    layer: Layer, found: tuple[Found, ...], given: Input | None, absorb: jax.Array, quantizer: Quantizer | None
) -> tuple[jax.Array, ...]:
    """Each weight on its grids, [out, in]. Made anew where they are needed, so as not to last."""

    def hat(w: jax.Array, reads: jax.Array | None, own: Found, quantizer: Quantizer) -> jax.Array:
        blocks = _blocks(w.shape, quantizer)
        scale = own.scale * _units(given, absorb, w.shape[1], reads, blocks)
        on_grid = fake_quant(quantizer.format, blocks_of(w, blocks), scale, None, own.mantissa)
        return on_grid.transpose(1, 0, 2).reshape(w.shape)

    if quantizer is None:
        return layer.ws
    return tuple(hat(*each, quantizer) for each in zip(layer.ws, layer.reads, found, strict=True))


def _blocks(shape: tuple[int, ...], quantizer: Quantizer) -> int:
    """How many grids each row of a weight [out, in] has."""
    grouped = isinstance(quantizer.granularity, PerGroup)
    return shape[1] // row_size(shape, quantizer.granularity, (1,)) if grouped else 1


def _searched(
    problem: Problem, quantizer: Quantizer, metric: Metric, how: FloatSearch, units: jax.Array | None = None
) -> Found:
    assert not isinstance(quantizer.format, Int)
    shared = isinstance(quantizer.granularity, PerTensor)
    searched = partial(search_grids, problem, quantizer.format, how.clips, how.method, metric, shared, how.budget)
    return searched(units=units)


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _input(
    layer: Layer,
    weights: tuple[Found, ...],
    given: Input | None,
    absorb: jax.Array,
    widest: jax.Array,
    quantizer: Quantizer | None,
    fmt: Kind,
    how: FloatSearch,
    exponents: Exponents,
) -> Input:
    """The activation's grid for the weights that read it, on the grids found for the input before."""
    outputs = sum(map(len, layer.ws)) if layer.products else 0
    left = max(
        how.budget - 2 * sum(w.nbytes for w in layer.ws), how.budget // 4
    )  # beside weights on grids, and how far off
    most = tokens_within(left, layer.x.shape[2] + outputs)
    every = max(1, layer.real.size // (how.tokens or layer.real.size), -(-layer.real.size // most))
    x, real = layer.x.reshape(-1, layer.x.shape[2])[::every], layer.real.reshape(-1)[::every]
    hats = _hats(layer, weights, given, absorb, quantizer)
    if layer.products:
        ws, hats = (tuple(map(_in_order, these, layer.reads)) for these in (layer.ws, hats))
        problem, metric = activation_problem(x, real, ws, hats), how.metric
    else:
        cost = jnp.full(x.shape[1], 0 if hats else 1, jnp.float32)
        for hat, reads in zip(hats, layer.reads, strict=True):
            cost = cost.at[jnp.arange(len(cost)) if reads is None else reads].add(jnp.square(hat).sum(0))
        problem, metric = plain_problem(x[None], cost, real), diagonal_hessian

    def spread(scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        return power_of_two(-_exponents(fmt, scale, widest, mantissa, exponents)).reshape(1, 1, -1)

    found = search_grids(problem, fmt, how.clips, how.method, metric, True, left, spread)
    return Input(found.scale, found.mantissa, _exponents(fmt, found.scale, widest, found.mantissa, exponents))


def _in_order(w: jax.Array, reads: jax.Array | None) -> jax.Array:
    """A weight's inputs in the order of x's channels."""
    return w if reads is None else w[:, jnp.argsort(reads)]


@partial(jax.jit, static_argnums=(4, 5))
def _loss(
    layer: Layer,
    weights: tuple[Found, ...],
    given: Input | None,
    absorb: jax.Array,
    quantizer: Quantizer | None,
    fmt: Kind | None,
) -> jax.Array:
    if not layer.products:
        return jnp.float32(0)

    def quantized(x: jax.Array) -> jax.Array:
        if given is None or fmt is None:
            return x
        return magnified(x, fmt, given.scale, given.exponents, given.mantissa)

    hats = _hats(layer, weights, given, absorb, quantizer)
    ws, hats = (tuple(map(_in_order, these, layer.reads)) for these in (layer.ws, hats))
    return total_error(layer.x, layer.real, quantized, ws, hats)


def own_error(leaf: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], how: FloatSearch) -> Found:
    """The grids of a table's rows by their own squared error."""
    return _own_error(rows_of(leaf.astype(jnp.float32), axes), quantizer, how)


@partial(jax.jit, static_argnums=(1, 2))
def _own_error(rows: jax.Array, quantizer: Quantizer, how: FloatSearch) -> Found:
    v = blocks_of(rows, _blocks(rows.shape, quantizer))
    return _searched(
        plain_problem(v, jnp.ones(v.shape[2], jnp.float32), jnp.ones(len(rows), jnp.float32)),
        quantizer,
        diagonal_hessian,
        how,
    )
