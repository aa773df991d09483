"""LLM-FP4's alternation: the weights' formats and scales given the activation's, then the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import AnyFloat, Int, fake_quant
from jaxq.formats.floating import Kind, power_of_two, scale_from_width
from jaxq.program.groups import Member
from jaxq.qtensor import PerGroup, PerTensor, pytree, static
from jaxq.quantizer import Quantizer, row_size, rows_of
from jaxq.search import Search
from jaxq.steps.float_search import Candidates, Found, channel_exponents, magnified, search_grids
from jaxq.steps.group import Group, weight_spread
from jaxq.steps.output_error import (
    Metric,
    activation_problem,
    blocks_of,
    diagonal_hessian,
    plain_problem,
    total_error,
    weight_problem,
)


@dataclass(frozen=True)
class Settings:
    """How the two are searched. `magnify`: channels of the activation get exponents of their own; `absorb`: the weights
    take them before they are quantized."""

    candidates: Candidates
    method: Search
    metric: Metric
    budget: int
    rounds: int
    tokens: int | None
    magnify: bool
    absorb: bool


@pytree
class Layer:
    """The real numbers of a group.

    Attributes:
      x: [batches, tokens, channels], float32.
      real: [batches, tokens], 0 for padding, else 1.
      ws: each weight [out, in], its inputs in the order of its leaf.
      reads: for each weight which channel of x each input reads, int32 [in]; None where it is the same order.
      products: whether outputs are products of the matrices x and w; else (convolutions, experts) only the size of the
        channels is known to matter.
    """

    x: jax.Array
    real: jax.Array
    ws: tuple[jax.Array, ...]
    reads: tuple[jax.Array | None, ...]
    products: bool = static()


@pytree
class Input:
    """How an activation is quantized: the tensor's scale and mantissa bits, [1, 1, 1], and each channel's exponent k,
    int32 [channels]."""

    scale: jax.Array
    mantissa: jax.Array
    exponents: jax.Array


@dataclass(frozen=True)
class Solution:
    """What the alternation found; `losses` after each round: the squared error of all outputs, relative to their size
    (empty where outputs are not products of matrices)."""

    weights: tuple[Found, ...]
    input: Input | None
    losses: np.ndarray


def layer_of(group: Group, members: Sequence[Member]) -> Layer:
    """A group's activation and those weights of it that are still to be quantized."""
    x, real = tokens_by_channels(group)
    leaves = [group.weights[m.site.path].astype(jnp.float32) for m in members]
    ws = tuple(rows_of(leaf, m.site.leaf_axes) for leaf, m in zip(leaves, members, strict=True))
    reads = tuple(_reads(m, group) for m in members)
    plain = all(_is_product(m) and w.shape[1] == x.shape[2] for m, w in zip(members, ws, strict=True))
    return Layer(x, real, ws, reads, products=plain)


def input_of(group: Group) -> Layer:
    """A group's activation alone: what reads it is no weight."""
    return Layer(*tokens_by_channels(group), (), (), products=False)


def tokens_by_channels(group: Group) -> tuple[jax.Array, jax.Array]:
    """The group's input as [batches, tokens, channels], and which tokens are real."""
    axes = group.plan.x_axes

    def flat(x: jax.Array) -> jax.Array:
        moved = x.transpose([*(i for i in range(x.ndim) if i not in axes), *axes])
        return moved.reshape(-1, int(np.prod([x.shape[i] for i in axes]))).astype(jnp.float32)

    x = jnp.stack([flat(a) for a in group.x])
    real = [
        jnp.ones(x.shape[1]) if valid is None else flat(jnp.broadcast_to(valid, a.shape))[:, 0]
        for a, valid in zip(group.x, group.valid, strict=True)
    ]
    return x, jnp.stack(real)


def _is_product(member: Member) -> bool:
    """A matrix product without batch axes, along which each weight would meet tokens of its own."""
    x, w, out = (len(shape) for shape in _by_role(member))
    return member.site.kind == "linear" and x + w - 2 * len(member.site.operands.w_axes) == out


def _by_role(member: Member) -> tuple[tuple[int, ...], ...]:
    site = member.site
    return site.shapes[site.operands.x], site.shapes[site.operands.w], site.shapes[2]


def _reads(member: Member, group: Group) -> jax.Array | None:
    """Which channel each of a leaf's inputs reads."""
    axes, shape = member.site.leaf_axes, group.weights[member.site.path].shape
    count = int(np.prod(group.channels))
    if not member.site.operands.w_axes:
        return jnp.zeros(int(np.prod([shape[i] for i in axes])), jnp.int32)
    spread = np.asarray(weight_spread(member, jnp.arange(count).reshape(group.channels)))
    whole = np.broadcast_to(spread, [n if i in axes else spread.shape[i] for i, n in enumerate(shape)])
    order = np.moveaxis(whole, axes, range(-len(axes), 0)).reshape(-1, int(np.prod([shape[i] for i in axes])))[0]
    return None if np.array_equal(order, np.arange(count)) else jnp.asarray(order, jnp.int32)


def alternate(layer: Layer, weights: Quantizer | None, activations: Quantizer | None, how: Settings) -> Solution:
    """Searches the weights given the activation, then the activation given the weights, in turns, and keeps the turn of
    least error. What is not to be quantized stays as it is."""
    fmt = None if activations is None else activations.format
    assert not isinstance(fmt, Int)
    widest = _widest(layer)
    given = None if fmt is None else _unclipped(fmt, widest, how)
    turns = [_turn(layer, given, weights, fmt, how)]
    while fmt is not None and len(turns) <= how.rounds:
        new = _input(layer, turns[-1][1], widest, fmt, how)
        if given is not None and all(
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(given))
        ):
            break
        given = new
        turns.append(_turn(layer, given, weights, fmt, how))
        if weights is None:
            break
    losses = np.asarray([turn[2] for turn in turns], np.float32)
    best = turns[int(losses.argmin()) if layer.products else -1]
    return Solution(best[0], best[3], losses if layer.products else losses[:0])


Turn = tuple[tuple[Found, ...], tuple[jax.Array, ...], jax.Array, Input | None]


def _turn(layer: Layer, given: Input | None, weights: Quantizer | None, fmt: Kind | None, how: Settings) -> Turn:
    """The weights' grids for an input, the weights on them, and the error of both together."""
    if weights is None:
        return (), layer.ws, _loss(layer, layer.ws, given, fmt), given
    pairs = [_weight(layer, w, reads, given, weights, fmt, how) for w, reads in zip(layer.ws, layer.reads, strict=True)]
    found, hats = tuple(f for f, _ in pairs), tuple(hat for _, hat in pairs)
    return found, hats, _loss(layer, hats, given, fmt), given


@jax.jit
def _widest(layer: Layer) -> jax.Array:
    """The largest magnitude of each channel, [channels]."""
    return jnp.max(jnp.abs(layer.x) * layer.real[:, :, None], (0, 1))


@partial(jax.jit, static_argnums=(0, 2))
def _unclipped(fmt: Kind, widest: jax.Array, how: Settings) -> Input:
    """Where the turns begin: the usual format, at the scale at which nothing is clipped."""
    usual = fmt.usual if isinstance(fmt, AnyFloat) else fmt
    mantissa = jnp.full((1, 1, 1), usual.mantissa_bits, jnp.int32)
    scale = scale_from_width(fmt, widest.max().reshape(1, 1, 1), mantissa)
    return Input(scale, mantissa, _exponents(fmt, scale, widest, mantissa, how))


def _exponents(fmt: Kind, scale: jax.Array, widest: jax.Array, mantissa: jax.Array, how: Settings) -> jax.Array:
    return channel_exponents(fmt, scale, widest, mantissa) if how.magnify else jnp.zeros(widest.shape, jnp.int32)


@partial(jax.jit, static_argnums=(4, 5, 6))
def _weight(
    layer: Layer,
    w: jax.Array,
    reads: jax.Array | None,
    given: Input | None,
    quantizer: Quantizer,
    x_fmt: Kind | None,
    how: Settings,
) -> tuple[Found, jax.Array]:
    """The grids of one weight for an input, and the weight on them."""
    fmt = quantizer.format
    assert not isinstance(fmt, Int)
    blocks = w.shape[1] // row_size(w.shape, quantizer.granularity, (1,)) if _grouped(quantizer) else 1
    k = jnp.zeros(layer.x.shape[2], jnp.int32) if given is None else given.exponents
    absorbed = k if how.absorb else jnp.zeros_like(k)
    left = k - absorbed

    def read(channels: jax.Array) -> jax.Array:
        return channels if reads is None else channels[reads]

    def quantized(x: jax.Array, k: jax.Array) -> jax.Array:
        return x if given is None or x_fmt is None else magnified(x, x_fmt, given.scale, k, given.mantissa)

    seen = w * power_of_two(-read(absorbed))[None]
    x = layer.x * power_of_two(absorbed)[None, None]
    if layer.products:
        x = x if reads is None else x[:, :, reads]
        problem = weight_problem(seen, x, layer.real, lambda batch: quantized(batch, read(left)), blocks)
        metric = how.metric
    else:
        hat = quantized(x.reshape(-1, x.shape[2]), left)
        moment = (jnp.square(hat) * layer.real.reshape(-1, 1)).sum(0)
        problem = plain_problem(blocks_of(seen, blocks), read(moment).reshape(blocks, -1), jnp.ones(len(w)))
        metric = diagonal_hessian
    shared = isinstance(quantizer.granularity, PerTensor)
    found = search_grids(problem, fmt, how.candidates, how.method, metric, shared, how.budget)
    hat = fake_quant(fmt, problem.v, found.scale, None, found.mantissa).transpose(1, 0, 2).reshape(w.shape)
    return found, hat * power_of_two(read(absorbed))[None]


def _grouped(quantizer: Quantizer) -> bool:
    return isinstance(quantizer.granularity, PerGroup)


@partial(jax.jit, static_argnums=(3, 4))
def _input(layer: Layer, hats: tuple[jax.Array, ...], widest: jax.Array, fmt: Kind, how: Settings) -> Input:
    """The activation's grid for the weights that read it."""
    every = 1 if how.tokens is None else max(1, layer.real.size // how.tokens)
    x, real = layer.x.reshape(-1, layer.x.shape[2])[::every], layer.real.reshape(-1)[::every]
    if layer.products:
        ws, hats = (tuple(map(_in_order, these, layer.reads)) for these in (layer.ws, hats))
        problem, metric = activation_problem(x, real, ws, hats), how.metric
    else:
        cost = jnp.zeros(x.shape[1]) if hats else jnp.ones(x.shape[1])
        for hat, reads in zip(hats, layer.reads, strict=True):
            cost = cost.at[jnp.arange(len(cost)) if reads is None else reads].add(jnp.square(hat).sum(0))
        problem, metric = plain_problem(x[None], cost, real), diagonal_hessian

    def spread(scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        return power_of_two(-_exponents(fmt, scale, widest, mantissa, how)).reshape(1, 1, -1)

    found = search_grids(problem, fmt, how.candidates, how.method, metric, True, how.budget, spread)
    return Input(found.scale, found.mantissa, _exponents(fmt, found.scale, widest, found.mantissa, how))


def _in_order(w: jax.Array, reads: jax.Array | None) -> jax.Array:
    """A weight's inputs in the order of x's channels."""
    return w if reads is None else w[:, jnp.argsort(reads)]


@partial(jax.jit, static_argnums=3)
def _loss(layer: Layer, hats: tuple[jax.Array, ...], given: Input | None, fmt: Kind | None) -> jax.Array:
    if not layer.products:
        return jnp.float32(0)

    def quantized(x: jax.Array) -> jax.Array:
        if given is None or fmt is None:
            return x
        return magnified(x, fmt, given.scale, given.exponents, given.mantissa)

    ws, hats = (tuple(map(_in_order, these, layer.reads)) for these in (layer.ws, hats))
    return total_error(layer.x, layer.real, quantized, ws, hats)


def own_error(leaf: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], how: Settings) -> Found:
    """The grids of a table's rows by their own squared error."""
    rows = rows_of(leaf.astype(jnp.float32), axes)
    return _own_error(rows, quantizer, how)


@partial(jax.jit, static_argnums=(1, 2))
def _own_error(rows: jax.Array, quantizer: Quantizer, how: Settings) -> Found:
    fmt = quantizer.format
    assert not isinstance(fmt, Int)
    blocks = rows.shape[1] // row_size(rows.shape, quantizer.granularity, (1,)) if _grouped(quantizer) else 1
    problem = plain_problem(blocks_of(rows, blocks), jnp.ones(rows.shape[1] // blocks), jnp.ones(len(rows)))
    shared = isinstance(quantizer.granularity, PerTensor)
    return search_grids(problem, fmt, how.candidates, how.method, diagonal_hessian, shared, how.budget)
