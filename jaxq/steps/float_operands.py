"""LLM-FP4's two searches of a layer: the weights' formats and scales for an input, and the input's for weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        it allows. Weights are searched by sums over all tokens, [in, in]; if these take more than three quarters of it,
        by as many tokens, evenly spaced, as half of it holds, and activations by no more tokens either. Whatever it is,
        the activations' search takes two arrays of the size of the weights that read them, and a quarter of it.

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
    return jnp.max(jnp.abs(layer.x) * layer.real[:, :, None], (0, 1))


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
    blocks = _blocks(w.shape, quantizer)
    units = _units(w, reads, given, blocks)
    if layer.products:
        x, there = (layer.x, given) if reads is None else (layer.x[:, :, reads], _read(given, reads))
        quantized = partial(_quantized, x_fmt, there)
        problem = weight_problem(w, x, layer.real, quantized, blocks, how.budget)
        return _searched(problem, quantizer, how.metric, how, units)
    x_hat = _quantized(x_fmt, given, layer.x.reshape(-1, layer.x.shape[2]))
    moment = (jnp.square(x_hat) * layer.real.reshape(-1, 1)).sum(0)
    moment = moment if reads is None else moment[reads]
    problem = plain_problem(blocks_of(w, blocks), moment.reshape(blocks, -1), jnp.ones(len(w), jnp.float32))
    return _searched(problem, quantizer, diagonal_hessian, how, units)


def _quantized(fmt: Kind | None, given: Input | None, x: jax.Array) -> jax.Array:
    """What contractions read in place of x, [tokens, channels]."""
    if given is None or fmt is None:
        return x
    return magnified(x, fmt, given.scale, given.exponents, given.mantissa)


def _read(given: Input | None, reads: jax.Array | None) -> Input | None:
    """An input's exponents in the order in which a weight reads the channels."""
    return given if given is None or reads is None else replace(given, exponents=given.exponents[reads])


def _units(w: jax.Array, reads: jax.Array | None, given: Input | None, blocks: int) -> jax.Array:
    """The powers of two that the weight's inputs take before they are quantized, [blocks, 1, n]."""
    there = _read(given, reads)
    k = jnp.zeros(w.shape[1], jnp.int32) if there is None else there.exponents * there.absorb
    return blocks_of(power_of_two(k)[None], blocks)


def _on_grids(
    layer: Layer, found: tuple[Found, ...], given: Input | None, quantizer: Quantizer | None
) -> tuple[jax.Array, ...]:
    """Each weight on its grids, [out, in]. Made anew where they are needed, so as not to last."""

    def hat(w: jax.Array, reads: jax.Array | None, own: Found, quantizer: Quantizer) -> jax.Array:
        blocks = _blocks(w.shape, quantizer)
        scale = own.scale * _units(w, reads, given, blocks)
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
    fmt, budget = quantizer.format, how.budget
    return search_grids(problem, fmt, how.clips, how.method, metric, shared, budget, units=units)


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
    budget = max(how.budget - 2 * sum(w.nbytes for w in layer.ws), how.budget // 4)  # w_hat and w - w_hat take the rest
    every = _token_stride(layer, how, budget)
    x, real = layer.x.reshape(-1, layer.x.shape[2])[::every], layer.real.reshape(-1)[::every]
    hats = _on_grids(layer, weights, given, quantizer)
    if layer.products:
        ws, hats = (tuple(map(_in_order, these, layer.reads)) for these in (layer.ws, hats))
        problem, metric = activation_problem(x, real, ws, hats), how.metric
    else:
        cost = jnp.full(x.shape[1], 0 if hats else 1, jnp.float32)
        for hat, reads in zip(hats, layer.reads, strict=True):
            cost = cost.at[jnp.arange(len(cost)) if reads is None else reads].add(jnp.square(hat).sum(0))
        problem, metric = plain_problem(x[None], cost, real), diagonal_hessian

    def spread(scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        return power_of_two(-_exponents(fmt, scale, widest, mantissa, shifted)).reshape(1, 1, -1)

    found = search_grids(problem, fmt, how.clips, how.method, metric, True, budget, spread)
    k = _exponents(fmt, found.scale, widest, found.mantissa, shifted)
    return Input(found.scale, found.mantissa, k, given.absorb)


def _token_stride(layer: Layer, how: FloatSearch, budget: int) -> int:
    """Each how many-th token the activations' search looks at."""
    count, outputs = layer.real.size, sum(map(len, layer.ws)) if layer.products else 0
    most = tokens_within(budget, layer.x.shape[2] + outputs)
    return max(1, count // (how.tokens or count), -(-count // most))


def _in_order(w: jax.Array, reads: jax.Array | None) -> jax.Array:
    """A weight's inputs in the order of x's channels."""
    return w if reads is None else w[:, jnp.argsort(reads)]


@partial(jax.jit, static_argnums=(3, 4))
def error_of(
    layer: Layer, weights: tuple[Found, ...], given: Input | None, quantizer: Quantizer | None, fmt: Kind | None
) -> jax.Array:
    """The squared error of all outputs; 0 where they are not products of matrices."""
    if not layer.products:
        return jnp.float32(0)
    hats = _on_grids(layer, weights, given, quantizer)
    ws, hats = (tuple(map(_in_order, these, layer.reads)) for these in (layer.ws, hats))
    return total_error(layer.x, layer.real, partial(_quantized, fmt, given), ws, hats)


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
