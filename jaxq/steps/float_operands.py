"""LLM-FP4's two searches of a layer: the weights' formats and scales for an input, and the input's for weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxq.formats import AnyFloat, Int, fake_quant
from jaxq.formats.floating import Kind, power_of_two, scale_from_width
from jaxq.qtensor import PerGroup, PerTensor, pytree
from jaxq.quantizer import Quantizer, row_size, rows_of
from jaxq.search import Search, coarse_to_fine
from jaxq.steps.float_layer import Layer
from jaxq.steps.float_search import Candidates, Found, channel_exponents, log_clips, magnified, search_grids
from jaxq.steps.output_error import (
    ROW_INPUTS,
    Metric,
    Problem,
    activation_problem,
    blocks_of,
    diagonal_hessian,
    output_error,
    plain_problem,
    total_error,
    weight_problem,
)
from jaxq.steps.parts import MOST, Part, Reader, in_parts, rows_within


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
      budget: bytes that it may take beside the layer's own arrays. So many rows as it allows are worked on at a time.
        Weights are searched by sums over all tokens, [in, in] and [out, in]; if these take more than three quarters of
        it, by as many tokens, evenly spaced, as half of it holds. Activations need [in, in] or, if that is smaller,
        [out, in], out being the outputs of all weights that read them, and are searched by no more tokens than half of
        the rest holds. The least that it counts for are these, and 512 rows of in + out, in float32:
        4 (in min(in, out) + 512 (in + out)) bytes.

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
    """How an activation is quantized.

    Attributes:
      scale: the tensor's, [1, 1, 1].
      mantissa: its mantissa bits, [1, 1, 1].
      exponents: each channel's k, by whose 2**k it is magnified before; int32 [channels].
      absorb: 1 if the weights take 2**-k before they are quantized, 0 if their codes keep it beside them; an int32
        scalar, so that both are one compiled function.
    """

    scale: jax.Array
    mantissa: jax.Array
    exponents: jax.Array
    absorb: jax.Array


@jax.jit
def widest_of(layer: Layer) -> jax.Array:
    """The largest magnitude of each channel, [channels]."""
    x, real = layer.x.reshape(-1, layer.x.shape[2]), layer.real.reshape(-1, 1)

    def wider(most: jax.Array, part: Part) -> jax.Array:
        return jnp.maximum(most, jnp.max(jnp.abs(part.of(x)) * part.of(real), 0))

    # In parts, as XLA's CPU library makes an array of half the size of x of a maximum over all tokens.
    return in_parts(len(x), MOST, wider, jnp.zeros(x.shape[1], jnp.float32))


@partial(jax.jit, static_argnums=(0, 2))
def unclipped(fmt: Kind, widest: jax.Array, shifted: bool, absorb: jax.Array) -> Input:
    """The usual format at the scale at which nothing is clipped. `shifted`: whether channels have exponents."""
    usual = fmt.usual if isinstance(fmt, AnyFloat) else fmt
    mantissa = jnp.full((1, 1, 1), usual.mantissa_bits, jnp.int32)
    scale = scale_from_width(fmt, widest.max().reshape(1, 1, 1), mantissa)
    return Input(scale, mantissa, _exponents(fmt, scale, widest, mantissa, shifted), absorb)


def _exponents(fmt: Kind, scale: jax.Array, widest: jax.Array, mantissa: jax.Array, shifted: bool) -> jax.Array:
    return channel_exponents(fmt, scale, widest, mantissa) if shifted else jnp.zeros(widest.shape, jnp.int32)


@partial(jax.jit, static_argnums=(4, 5, 6))
def search_weight(
    layer: Layer,
    w: jax.Array,
    reads: jax.Array | None,
    given: Input | None,
    quantizer: Quantizer,
    x_fmt: Kind | None,
    how: FloatSearch,
) -> Found:
    """The grids of one weight for an input (None: in full precision)."""
    blocks, budget = _blocks(w.shape, quantizer), _budget(layer, how)
    units, quantized = _units(w, reads, given, blocks), partial(_quantized, x_fmt, given)
    if layer.products:
        problem, metric = weight_problem(w, layer.x, layer.real, quantized, blocks, reads, budget), how.metric
    else:
        x, real, ones = layer.x.reshape(-1, layer.x.shape[2]), layer.real.reshape(-1, 1), jnp.ones(len(w), jnp.float32)
        moment = _squares(len(x), x.shape[1], lambda part: quantized(part.of(x)) * part.of(real), budget)
        moment = moment if reads is None else moment[reads]
        problem, metric = plain_problem(w, moment.reshape(blocks, -1), ones), diagonal_hessian
    return _searched(problem, quantizer, metric, how, budget, units)


def _budget(layer: Layer, how: FloatSearch) -> int:
    """The bytes that a search of the layer may take: what `FloatSearch` says it needs, if that is more."""
    channels, outputs = layer.x.shape[2], sum(map(len, layer.ws))
    return max(how.budget, _sum_size(layer) + 4 * SPARE * (channels + outputs))


# The rows, of inputs and of outputs, that there is room for at any budget.
SPARE = 512


def _sum_size(layer: Layer) -> int:
    """The bytes of what an activation's error costs: a sum over outputs or, if they are fewer, what is summed."""
    channels = layer.x.shape[2]
    return 4 * channels * min(channels, sum(map(len, layer.ws)))


def _quantized(fmt: Kind | None, given: Input | None, x: jax.Array) -> jax.Array:
    """What contractions read in place of x, [tokens, channels]."""
    if given is None or fmt is None:
        return x
    return magnified(x, fmt, given.scale, given.exponents, given.mantissa)


def _units(w: jax.Array, reads: jax.Array | None, given: Input | None, blocks: int) -> jax.Array:
    """The powers of two that the weight's inputs take before they are quantized, [1, blocks, n]."""
    if given is None:
        return jnp.ones((1, blocks, w.shape[1] // blocks), jnp.float32)
    k = given.exponents * given.absorb
    return blocks_of(power_of_two(k if reads is None else k[reads])[None], blocks)


def _readers(
    layer: Layer, found: tuple[Found, ...], given: Input | None, quantizer: Quantizer | None
) -> tuple[Reader, ...]:
    """The layer's weights, on their grids; inputs in the order of x's channels where outputs are products."""

    def reader(w: jax.Array, reads: jax.Array | None, own: Found | None) -> Reader:
        order = None if reads is None or not layer.products else jnp.argsort(reads)
        blocks = 1 if quantizer is None else _blocks(w.shape, quantizer)
        units = _units(w, reads, given, blocks)

        def rows(part: Part) -> tuple[jax.Array, jax.Array]:
            some = hat = part.of(w)
            if own is not None and quantizer is not None:
                v, scale = blocks_of(some, blocks), part.of(own.scale) * units
                hat = fake_quant(quantizer.format, v, scale, None, own.mantissa).reshape(some.shape)
            return (some, hat) if order is None else (some[:, order], hat[:, order])

        return Reader(len(w), rows)

    grids = found or (None,) * len(layer.ws)
    return tuple(map(reader, layer.ws, layer.reads, grids))


def _blocks(shape: tuple[int, ...], quantizer: Quantizer) -> int:
    """How many grids each row of a weight [out, in] has."""
    grouped = isinstance(quantizer.granularity, PerGroup)
    return shape[1] // row_size(shape, quantizer.granularity, (1,)) if grouped else 1


def _searched(
    problem: Problem,
    quantizer: Quantizer,
    metric: Metric,
    how: FloatSearch,
    budget: int,
    units: jax.Array | None = None,
) -> Found:
    assert not isinstance(quantizer.format, Int)
    shared, rest = isinstance(quantizer.granularity, PerTensor), budget - problem.made
    return search_grids(problem, quantizer.format, how.clips, how.method, metric, shared, rest, units=units)


@partial(jax.jit, static_argnums=(4, 5, 6, 7))
def search_input(
    layer: Layer,
    weights: tuple[Found, ...],
    given: Input,
    widest: jax.Array,
    quantizer: Quantizer | None,
    fmt: Kind,
    how: FloatSearch,
    shifted: bool,
) -> Input:
    """The activation's grid for the weights that read it, on the grids found for the input before."""
    budget = _budget(layer, how)
    rest = budget - _sum_size(layer)
    every = _token_stride(layer, how, rest // 2)
    x, real = layer.x.reshape(-1, layer.x.shape[2])[::every], layer.real.reshape(-1)[::every]
    readers = _readers(layer, weights, given, quantizer)
    if layer.products:
        problem, metric = activation_problem(x, real, readers, rest // 2), how.metric
    else:
        cost = jnp.full(x.shape[1], 0 if readers else 1, jnp.float32)
        for w, reads, reader in zip(layer.ws, layer.reads, readers, strict=True):
            more = _squares(len(w), w.shape[1], reader.quantized, rest)
            cost = cost.at[jnp.arange(len(cost)) if reads is None else reads].add(more)
        problem, metric = plain_problem(x, cost[None], real), diagonal_hessian

    def spread(scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        return power_of_two(-_exponents(fmt, scale, widest, mantissa, shifted)).reshape(1, 1, -1)

    rest = budget - problem.made - x.nbytes
    found = search_grids(problem, fmt, how.clips, how.method, metric, True, rest, spread)
    k = _exponents(fmt, found.scale, widest, found.mantissa, shifted)
    return Input(found.scale, found.mantissa, k, given.absorb)


def _token_stride(layer: Layer, how: FloatSearch, budget: int) -> int:
    """Each how many-th token the activations' search looks at: it takes them, and what they lose."""
    count, channels = layer.real.size, layer.x.shape[2]
    lost = min(channels, sum(map(len, layer.ws)))
    return max(1, count // (how.tokens or count), -(-count // rows_within(budget, channels + lost)))


def _squares(count: int, channels: int, rows: Callable[[Part], jax.Array], budget: int) -> jax.Array:
    """The sum of the squares of rows that are made a part at a time, [channels]."""

    def add(total: jax.Array, part: Part) -> jax.Array:
        return total + (jnp.square(rows(part)) * part.new[:, None]).sum(0)

    size = min(MOST, rows_within(budget, ROW_INPUTS * channels))
    return in_parts(count, size, add, jnp.zeros(channels, jnp.float32))


@partial(jax.jit, static_argnums=(3, 4, 5))
def error_of(
    layer: Layer,
    weights: tuple[Found, ...],
    given: Input | None,
    quantizer: Quantizer | None,
    fmt: Kind | None,
    how: FloatSearch,
) -> jax.Array:
    """The squared error of all outputs; 0 where they are not products of matrices."""
    if not layer.products:
        return jnp.float32(0)
    readers, quantized = _readers(layer, weights, given, quantizer), partial(_quantized, fmt, given)
    return total_error(layer.x, layer.real, quantized, readers, _budget(layer, how))


def own_error(leaf: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], how: FloatSearch) -> Found:
    """The grids of a table's rows by their own squared error."""
    return _own_error(rows_of(leaf.astype(jnp.float32), axes), quantizer, how)


@partial(jax.jit, static_argnums=(1, 2))
def _own_error(rows: jax.Array, quantizer: Quantizer, how: FloatSearch) -> Found:
    blocks = _blocks(rows.shape, quantizer)
    ones = jnp.ones((blocks, rows.shape[1] // blocks), jnp.float32)
    problem = plain_problem(rows, ones, jnp.ones(len(rows), jnp.float32))
    return _searched(problem, quantizer, diagonal_hessian, how, how.budget)
