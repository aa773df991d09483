"""The joint search of LLM-FP4 (arXiv:2310.16836, section 4.1): of a float format and of its clipping range.

A clipping range is an exponent bias is a scale. Candidates are multiples of the scale at which nothing is clipped: the
bias itself may be zero or negative, so multiples of it would mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import AnyFloat, Float, divide, fake_quant
from jaxq.formats.floating import layout, power_of_two, scale_from_width
from jaxq.search import Search, best_of, coarse, refine
from jaxq.steps.output_error import Metric, Problem, blocks_of
from jaxq.steps.parts import MOST, Part, in_parts, rows_within


class Candidates(Protocol):
    """What is tried in place of the scale at which nothing is clipped; `whole` is the index of that scale itself."""

    @property
    def count(self) -> int: ...

    @property
    def whole(self) -> int: ...

    def at(self, i: jax.Array, scale: jax.Array, mantissa: jax.Array) -> jax.Array: ...


@dataclass(frozen=True)
class Clips:
    """Clip values as fractions of the largest magnitude, in ascending order; 1 is among them."""

    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        r = np.asarray(self.ratios)
        if 1.0 not in self.ratios or not np.isfinite(r).all() or (np.diff(r) <= 0).any() or r[0] <= 0:
            raise ValueError(f"clip ratios are positive, ascending and contain 1; found {self.ratios[:5]} ...")

    @property
    def count(self) -> int:
        return len(self.ratios)

    @property
    def whole(self) -> int:
        return self.ratios.index(1.0)

    def at(self, i: jax.Array, scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        del mantissa
        return scale * jnp.asarray(self.ratios, jnp.float32)[i]


def linear_clips(lowest: float = 0.2, highest: float = 1.2, count: int = 100) -> Clips:
    """Equally spaced clip values, the one nearest to the largest magnitude moved onto it."""
    return _with_one(np.linspace(lowest, highest, count))


def log_clips(lowest: float = 0.5, highest: float = 2.0, count: int = 100) -> Clips:
    """Clip values equally spaced in their logarithm, i.e. in the exponent bias; the one nearest to the largest
    magnitude moved onto it. Above it nothing is clipped either, but the elements lie elsewhere: but for the clipped and
    the subnormal ones they are the same every factor of two, so that two octaves are enough."""
    return _with_one(np.geomspace(lowest, highest, count))


def _with_one(ratios: np.ndarray) -> Clips:
    if not ratios[0] <= 1 <= ratios[-1]:
        raise ValueError(f"clip ratios from {ratios[0]} to {ratios[-1]} do not contain 1, where nothing is clipped")
    ratios[np.abs(ratios - 1).argmin()] = 1.0
    return Clips(tuple(float(r) for r in ratios))


class Found(NamedTuple):
    """The best of each row's grids, [rows, blocks, 1], or [1, 1, 1] where one is shared; its format's mantissa bits,
    [1, 1, 1]; and the loss summed over all rows."""

    scale: jax.Array
    mantissa: jax.Array
    loss: jax.Array


Spread = Callable[[jax.Array, jax.Array], jax.Array]

# The rows that choose a format for all, where a search is not exhaustive: formats differ by more than so many rows do.
DECIDING = 128


def search_grids(
    problem: Problem,
    fmt: Float | AnyFloat,
    candidates: Candidates,
    method: Search,
    metric: Metric,
    shared: bool,
    budget: int,
    spread: Spread = lambda scale, _: jnp.ones_like(scale[:, :1]),
    units: jax.Array | None = None,
) -> Found:
    """The best format and scales for the vectors of a problem; one format for all of them.

    A coarse search tries all formats on some of the rows, and refines the best one on all rows.

    Args:
      fmt: `AnyFloat` tries all its splits, `Float` is the only one.
      metric: what is minimized.
      shared: one scale for all rows of all blocks, else one each.
      budget: bytes that may be taken beside the problem. So many rows as it allows are searched, or, where the scale is
        shared, priced, at a time.
      spread: from a shared scale and the mantissa bits to what multiplies it in each channel, [1, 1, n].
      units: [1, blocks, n], powers of two of which the elements are multiples to be quantized; None for 1.
    """
    mantissas = jnp.asarray([split.mantissa_bits for split in fmt.splits], jnp.int32).reshape(-1, 1, 1, 1)
    units = jnp.ones((1, 1, 1), jnp.float32) if units is None else units
    rows, blocks = len(problem.v), problem.blocks
    size = _rows_at_once(problem, 0 if shared else candidates.count * len(mantissas), budget)

    def width_of(some: Problem) -> jax.Array:
        seen = jnp.where(some.real[:, None, None] > 0, jnp.abs(blocks_of(some.v, blocks)) / units, 0)
        return seen.max(keepdims=True) if shared else seen.max(2, keepdims=True)

    def scale_at(i: jax.Array, width: jax.Array, mantissa: jax.Array) -> jax.Array:
        return candidates.at(i.reshape(width.shape), scale_from_width(fmt, width, mantissa), mantissa)

    def priced(some: Problem, scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        grid, v = scale * (units * spread(scale, mantissa)), blocks_of(some.v, blocks)
        return metric(some, fake_quant(fmt, v, grid, None, mantissa).reshape(some.v.shape))

    def best(
        mantissas: jax.Array, shape: tuple, loss_of: Callable, fine: bool, decide: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The formats, or the best of them if these rows `decide`; for each the best candidates, and their losses."""

        def first(mantissa: jax.Array) -> jax.Array:
            return coarse(method, candidates.count, candidates.whole, shape, loss_of(mantissa))

        def last(mantissa: jax.Array, losses: jax.Array) -> tuple[jax.Array, jax.Array]:
            return best_of(refine(method, losses, loss_of(mantissa)) if fine else losses)

        if not decide:
            return mantissas, *jax.lax.map(lambda mantissa: last(mantissa, first(mantissa)), mantissas)
        tables = jax.lax.map(first, mantissas)
        own = tables.min(1).reshape(len(tables), -1).sum(1).argmin()
        i, losses = last(mantissas[own], tables[own])
        return mantissas[own][None], i[None], losses[None]

    def of_all(mantissas: jax.Array, every: int, fine: bool) -> Found:
        """For each format, or the best of them, the scale for all rows, and their loss; of each `every`-th row."""

        def wider(width: jax.Array, part: Part) -> jax.Array:
            return jnp.maximum(width, width_of(problem.of(part)))

        width = in_parts(rows, size, wider, jnp.zeros((1, 1, 1), jnp.float32))

        def loss_of(mantissa: jax.Array) -> Callable[[jax.Array], jax.Array]:
            def loss(i: jax.Array) -> jax.Array:
                def add(total: jax.Array, part: Part) -> jax.Array:
                    some = problem.of(part)
                    found = priced(some, scale_at(i, width, mantissa), mantissa)
                    return total + (found * (some.real * part.new)[:, None]).sum()

                return in_parts(rows, size, add, jnp.float32(0), every)

            return loss

        mantissas, i, losses = best(mantissas, (), loss_of, fine, True)
        return Found(scale_at(i[0], width, mantissas[0])[None], mantissas, losses)

    def of_each(mantissas: jax.Array, every: int, fine: bool) -> Found:
        """For each format, or the best of them, each row's and block's scale, and the loss of all; likewise."""
        decide = size >= rows
        count = 1 if decide else len(mantissas)

        def step(found: Found, part: Part) -> Found:
            some = problem.of(part)
            width = width_of(some)

            def loss_of(mantissa: jax.Array) -> Callable[[jax.Array], jax.Array]:
                return lambda i: priced(some, scale_at(i, width, mantissa), mantissa)

            own, i, losses = best(mantissas, width.shape[:2], loss_of, fine, decide)
            scales = jax.vmap(lambda i, mantissa: scale_at(i, width, mantissa))(i, own)
            losses = (losses * part.new[None, :, None]).sum((1, 2))
            return Found(part.put(found.scale, scales, 1), own, found.loss + losses)

        scales = jnp.zeros((count, -(-rows // every), blocks, 1), jnp.float32)
        return in_parts(rows, size, step, Found(scales, mantissas[:count], jnp.zeros(count, jnp.float32)), every)

    search, every = of_all if shared else of_each, max(1, rows // DECIDING)
    if len(mantissas) > 1 and method.stride > 1 and (every > 1 or size < rows):
        found = search(mantissas, every, False)
        mantissas = found.mantissa[found.loss.argmin()][None]
    found = search(mantissas, 1, True)
    return jax.tree.map(lambda a: a[found.loss.argmin()], found)


# Arrays of the size of the vectors that pricing one candidate makes, and of that of all losses that a search makes.
PASSING, TABLES = 6, 3


def _rows_at_once(problem: Problem, tried: int, budget: int) -> int:
    """How many rows can be searched at a time, whose losses of all `tried` candidates are kept."""
    blocks = problem.blocks
    outputs = 0 if problem.factor is None else blocks * problem.factor.shape[2]
    return min(MOST, rows_within(budget, PASSING * (problem.v.shape[1] + outputs) + TABLES * blocks * tried))


def channel_exponents(fmt: Float | AnyFloat, scale: jax.Array, widest: jax.Array, mantissa: jax.Array) -> jax.Array:
    """LLM-FP4's integer part of each channel's exponent bias, k_c in [0, 2**E - 1] (eq. 10-12): the power of two by
    which a channel may be magnified before it is quantized at the tensor's `scale`.

    The paper rounds to the nearest k, which clips up to 29 % of a channel's width. Of 3 mantissa bits or more that is
    several times the error of rounding, so that there no more is clipped than the step below the largest element.

    Args:
      scale: the tensor's, [1, 1, 1].
      widest: each channel's largest magnitude, [in]; a channel that is all zero gets 0.
      mantissa: [1, 1, 1].

    Returns:
      int32 [in].
    """
    m, _, largest = layout(fmt, mantissa)
    most = jnp.asarray(jnp.left_shift(1, fmt.bits - 1 - m) - 1, jnp.float32)
    room = divide(jnp.broadcast_to(scale.ravel() * jnp.ravel(largest), widest.shape), jnp.where(widest > 0, widest, 1))
    bits = jnp.ravel(jnp.asarray(m, jnp.int32))
    step = 1 / (power_of_two(bits + 1) - 1)  # below the largest element, relative to it
    clipped = jnp.where(bits >= 3, jnp.log2(1 + step), jnp.float32(0.5))
    k = jnp.minimum(jnp.floor(jnp.log2(jnp.maximum(room, 1)) + clipped), most.ravel()).astype(jnp.int32)
    return jnp.where(widest > 0, k, 0)


def magnified(x: jax.Array, fmt: Float | AnyFloat, scale: jax.Array, k: jax.Array, mantissa: jax.Array) -> jax.Array:
    """Q(x 2**k) 2**-k: the activation [tokens, in] as its contractions see it."""
    return fake_quant(fmt, x, scale.reshape(1, 1) * power_of_two(-k)[None], None, mantissa.reshape(1, 1))
