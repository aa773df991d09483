"""The joint search of LLM-FP4 (arXiv:2310.16836, section 4.1): of a float format and of its clipping range.

A clipping range is an exponent bias is a scale. Candidates are multiples of the scale at which nothing is clipped: the
bias itself may be zero or negative, so multiples of it would mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import AnyFloat, Float, divide, fake_quant
from jaxq.formats.floating import layout, power_of_two, scale_from_width
from jaxq.search import Search, best_of, coarse, refine
from jaxq.steps.output_error import Metric, Problem


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
    """The best of each row's grids, [blocks, rows, 1], or [1, 1, 1] where one is shared; its format's mantissa bits,
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
      budget: bytes that the arrays made on the way may take; rows are priced in as many parts as that needs.
      spread: from a shared scale and the mantissa bits to what multiplies it in each channel, [1, 1, n].
      units: [blocks, 1, n], powers of two of which the elements are multiples to be quantized; None for 1.
    """
    mantissas = jnp.asarray([split.mantissa_bits for split in fmt.splits], jnp.int32).reshape(-1, 1, 1, 1)
    units = jnp.ones((1, 1, 1), jnp.float32) if units is None else units
    width = jnp.where(problem.real[:, None] > 0, jnp.abs(problem.v) / units, 0)
    width = width.max(keepdims=True) if shared else width.max(2, keepdims=True)

    def scale_at(i: jax.Array, width: jax.Array, mantissa: jax.Array) -> jax.Array:
        return candidates.at(i.reshape(width.shape), scale_from_width(fmt, width, mantissa), mantissa)

    def loss_of(rows: slice, mantissa: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """From candidates to the losses of some of the rows in a format."""
        some, widths = _rows(problem, rows), width if shared else width[:, rows]
        parts = _parts(some, budget)

        def loss(i: jax.Array) -> jax.Array:
            scale = scale_at(i, widths, mantissa)
            found = priced(some, fmt, scale, units * spread(scale, mantissa), mantissa, metric, parts)
            return (found * some.real[None]).sum() if shared else found

        return loss

    def sparse(rows: slice, mantissa: jax.Array) -> jax.Array:
        shape = () if shared else width[:, rows].shape[:2]
        return coarse(method, candidates.count, candidates.whole, shape, loss_of(rows, mantissa))

    sampled = len(mantissas) > 1 and method.stride > 1
    every = max(1, len(problem.real) // DECIDING) if sampled else 1
    tables = jax.lax.map(partial(sparse, slice(None, None, every)), mantissas)
    best = tables.min(1).reshape(len(mantissas), -1).sum(1).argmin()
    mantissa, all_rows = mantissas[best], slice(None)
    first = tables[best] if every == 1 else sparse(all_rows, mantissa)
    i, losses = best_of(refine(method, first, loss_of(all_rows, mantissa)))
    return Found(scale_at(i, width, mantissa), mantissa, losses.sum())


def _rows(problem: Problem, rows: slice) -> Problem:
    gradient = None if problem.gradient is None else problem.gradient[:, rows]
    v, energy, real = problem.v[:, rows], problem.energy[:, rows], problem.real[rows]
    return replace(problem, v=v, gradient=gradient, energy=energy, real=real)


# Arrays of the size of the vectors that pricing one candidate makes.
PASSING = 6


def _parts(problem: Problem, budget: int) -> int:
    """Into how many parts the rows are split; where the problem alone exceeds the budget, into small ones."""
    lasting = sum(a.nbytes for a in (problem.v, problem.hessian, problem.factor, problem.gradient) if a is not None)
    passing = PASSING * problem.v.nbytes
    if problem.factor is not None:
        passing += PASSING * problem.v.nbytes * problem.factor.shape[1] // problem.v.shape[2]
    return min(len(problem.real), -(-passing // max(budget - lasting, budget // 8)))


def priced(
    problem: Problem,
    fmt: Float | AnyFloat,
    scale: jax.Array,
    units: jax.Array,
    mantissa: jax.Array,
    metric: Metric,
    parts: int,
) -> jax.Array:
    """The loss of each row at the given scales, [blocks, rows], a part of the rows at a time, where they lie."""
    blocks, rows, _ = problem.v.shape
    size = -(-rows // parts)

    def one(start: jax.Array) -> jax.Array:
        def some(a: jax.Array, axis: int = 1) -> jax.Array:
            return a if a.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(a, start, size, axis)

        gradient = None if problem.gradient is None else some(problem.gradient)
        v, energy, real = some(problem.v), some(problem.energy), some(problem.real, 0)
        few = replace(problem, v=v, gradient=gradient, energy=energy, real=real)
        return metric(few, fake_quant(fmt, v, some(scale) * units, None, mantissa))

    def step(losses: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.dynamic_update_slice_in_dim(losses, one(start), start, 1), None

    if parts == 1:
        return one(jnp.int32(0))
    # The last part overlaps the one before it.
    starts = jnp.minimum(jnp.arange(parts, dtype=jnp.int32) * size, rows - size)
    return jax.lax.scan(step, jnp.zeros((blocks, rows), jnp.float32), starts)[0]


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
