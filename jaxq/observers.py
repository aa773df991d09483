"""Range estimators: the interval that an array's quantization grid should span, as (measure, merge) pairs.

`measure(x, fmt, valid=None)` gives `(low, high)`, both float32 `[rows]`, of one batch `x`: floats `[rows, tokens,
features]`, each row ranged by itself. A weight has its output channels or groups as rows and one token; an activation
that is ranged per tensor has one row. Tokens where `valid` (bool `[tokens]`) is False, such as padding, do not enter.

`merge(state, current, count)` is the range after one more batch, where `state` is the range after `count >= 1` batches.

Both are pure and work under jit with `fmt` static; shapes that cannot be measured raise a ValueError. They do not look
at values: ranges of non-finite arrays, or of batches without a valid token, are non-finite or meaningless, and the
caller checks. The estimators are those of Outlier Suppression+ (arXiv:2304.09145) and its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxq.formats import Format, Int, fake_quant, grid_from_range

Range = tuple[jax.Array, jax.Array]
Measure = Callable[..., Range]
Merge = Callable[[Range, Range, "int | jax.Array"], Range]


@dataclass(frozen=True)
class Observer:
    """A named (measure, merge) pair, see the module. Equal arguments to a factory give the same, hashable object.

    `clips_tokens`: whether it leaves out whole tokens, which an array needs to have.
    """

    name: str
    measure: Measure
    merge: Merge
    clips_tokens: bool = False


_observer = cache(Observer)


def observe(
    observer: Observer, fmt: Format, batches: Iterable[jax.Array], valids: Iterable[jax.Array | None] | None = None
) -> Range:
    """The range of all `batches`, each measured once (the reference counts its first batch twice) and merged in order.

    Args:
        batches: arrays `[rows, tokens, features]` with the same number of rows.
        valids: for each batch bool `[tokens]` or None.

    Returns:
        low, high: float32 `[rows]`.

    Raises:
        ValueError: no batches, an empty batch, or not as many `valids` as `batches`.
    """
    batches = list(batches)
    valids = [None] * len(batches) if valids is None else list(valids)
    if not batches or len(valids) != len(batches):
        raise ValueError(f"observe: {len(batches)} batches and {len(valids)} valids; need at least one, and as many")
    state = _measure(observer, fmt, batches[0], valids[0])
    for count, (x, valid) in enumerate(zip(batches[1:], valids[1:]), start=1):
        state = observer.merge(state, _measure(observer, fmt, x, valid), count)
    return state


@partial(jax.jit, static_argnums=(0, 1))
def _measure(observer: Observer, fmt: Format, x: jax.Array, valid: jax.Array | None) -> Range:
    return observer.measure(x, fmt, valid)


# Factories ----------------------------------------------------------------------------------------------------------


def min_max() -> Observer:
    """The smallest and largest value of all batches (the reference keeps only its last batch's)."""
    return _observer("min_max", _measure_min_max, _widest)


def average_min_max() -> Observer:
    """The mean over batches of the smallest and largest value."""
    return _observer("average_min_max", _measure_min_max, _mean)


def ema_min_max(decay: float = 0.9) -> Observer:
    """As `average_min_max`, but an exponential moving average that starts with the first batch."""
    return _observer(f"ema_min_max({decay})", _measure_min_max, _moving(decay))


def average_quantile(fraction: float = 0.999) -> Observer:
    """The range clipped to +- the `fraction` quantile of abs(x), found on a histogram; mean over batches."""
    return _observer(f"average_quantile({fraction})", _measure_quantile(fraction), _mean)


def ema_quantile(fraction: float = 0.9999, decay: float = 0.9) -> Observer:
    """As `average_quantile`, but an exponential moving average that starts with the first batch."""
    return _observer(f"ema_quantile({fraction}, {decay})", _measure_quantile(fraction), _moving(decay))


def mse() -> Observer:
    """The range that quantizes with the smallest squared error, by exhaustive search; the widest of all batches.

    Costs 100 passes over a batch, or 100 * 2**bits for asymmetric formats on data of both signs.
    """
    return _observer("mse", _measure_mse, _widest)


def average_mse() -> Observer:
    """As `mse`, but the mean over batches."""
    return _observer("average_mse", _measure_mse, _mean)


def lsq_plus() -> Observer:
    """Mean +- 3 standard deviations (with n - 1): the start of LSQ+ (arXiv:2004.09576) for symmetric weights."""
    return _observer("lsq_plus", _measure_lsq_plus, _mean)


def token_quantile(percentile: float) -> Observer:
    """`token_range` at a fixed percentile: the token-wise clipping of Outlier Suppression; mean over batches."""
    return _observer(f"token_quantile({percentile})", _measure_token_quantile(percentile), _mean, True)


# Merging ------------------------------------------------------------------------------------------------------------


def _widest(state: Range, current: Range, count: int | jax.Array) -> Range:
    del count
    return jnp.minimum(state[0], current[0]), jnp.maximum(state[1], current[1])


def _mean(state: Range, current: Range, count: int | jax.Array) -> Range:
    n = jnp.asarray(count, jnp.float32)
    return (state[0] * n + current[0]) / (n + 1), (state[1] * n + current[1]) / (n + 1)


@cache
def _moving(decay: float) -> Merge:
    _check_fraction("decay", decay)

    def merge(state: Range, current: Range, count: int | jax.Array) -> Range:
        del count
        return decay * state[0] + (1 - decay) * current[0], decay * state[1] + (1 - decay) * current[1]

    return merge


# Measuring ----------------------------------------------------------------------------------------------------------


def _measure_min_max(x: jax.Array, fmt: Format, valid: jax.Array | None = None) -> Range:
    del fmt
    low, high = _token_extrema(x, valid)
    return low.min(axis=1), high.max(axis=1)


def token_range(x: jax.Array, percentile: float | jax.Array, valid: jax.Array | None = None) -> Range:
    """The range without the most extreme tokens (Outlier Suppression, arXiv:2209.13325, section 4.2).

    With M_i, m_i the maximum and minimum of token i: `high` is the largest M_i that is at most the `percentile`
    quantile of all abs(M_i), `low` the smallest m_i that is at least minus that of abs(m_i); the data's own range is
    then clipped to the two.

    Args:
        x: floats `[rows, tokens, features]`.
        percentile: from 0 to 1; may be traced, so that a search over it compiles once.
        valid: bool `[tokens]` or None.

    Returns:
        low, high: float32 `[rows]`.
    """
    smallest, largest = _token_extrema(x, valid)
    upper = _token_quantile(jnp.abs(largest), percentile, valid)
    lower = -_token_quantile(jnp.abs(smallest), percentile, valid)
    high = jnp.where(largest <= upper[:, None], largest, -jnp.inf).max(axis=1)
    low = jnp.where(smallest >= lower[:, None], smallest, jnp.inf).min(axis=1)
    return jnp.clip(smallest.min(axis=1), low, high), jnp.clip(largest.max(axis=1), low, high)


def _token_quantile(a: jax.Array, percentile: float | jax.Array, valid: jax.Array | None) -> jax.Array:
    """The linearly interpolated quantile over the valid tokens of `a` `[rows, tokens]`, by torch.quantile's formula."""
    count = jnp.int32(a.shape[1]) if valid is None else valid.sum(dtype=jnp.int32)
    ordered = jnp.sort(a if valid is None else jnp.where(valid[None], a, jnp.inf), axis=1)
    rank = jnp.asarray(percentile, jnp.float32) * (count - 1).astype(jnp.float32)
    below, above = (jnp.take(ordered, f(rank).astype(jnp.int32), axis=1, mode="clip") for f in (jnp.floor, jnp.ceil))
    weight = rank - jnp.floor(rank)
    return jnp.where(weight < 0.5, below + weight * (above - below), above - (above - below) * (1 - weight))


@cache
def _measure_token_quantile(percentile: float) -> Measure:
    _check_fraction("percentile", percentile)

    def measure(x: jax.Array, fmt: Format, valid: jax.Array | None = None) -> Range:
        del fmt
        return token_range(x, percentile, valid)

    return measure


BINS = 2048


@cache
def _measure_quantile(fraction: float) -> Measure:
    _check_fraction("fraction", fraction)

    def measure(x: jax.Array, fmt: Format, valid: jax.Array | None = None) -> Range:
        """Clips to the middle of the first of 2048 bins of abs(x) up to which `fraction` of the values lie."""
        low, high = _measure_min_max(x, fmt, valid)
        widest = jnp.maximum(-low, high)
        spread = jnp.where(widest > 0, widest, jnp.float32(1))[:, None, None]
        bins = jnp.minimum(jnp.abs(x.astype(jnp.float32)) * BINS / spread, BINS - 1).astype(jnp.int32)
        _, tokens, features = x.shape
        # In float64 and by the number of valid tokens, so that a fraction of the count that is an integer stays one.
        needed = jnp.asarray(np.ceil(fraction * (features * np.arange(tokens + 1))).astype(np.int32))
        enough = needed[tokens if valid is None else valid.sum(dtype=jnp.int32)]

        def halve(_: int, bounds: Range) -> Range:  # the histogram's cumulative count, only where bisection asks
            first, last = bounds
            middle = (first + last) // 2
            inside = bins <= middle[:, None, None]
            inside = inside if valid is None else inside & valid[None, :, None]
            reached = inside.sum(axis=(1, 2), dtype=jnp.int32) >= enough
            return jnp.where(reached, first, middle + 1), jnp.where(reached, middle, last)

        start = jnp.zeros(x.shape[0], jnp.int32)
        steps = BINS.bit_length() - 1  # 2048 = 2**11 bins
        index, _ = lax.fori_loop(0, steps, halve, (start, start + (BINS - 1)))
        clip = (index.astype(jnp.float32) + 0.5) * (widest / BINS)
        return jnp.clip(low, -clip, clip), jnp.clip(high, -clip, clip)

    return measure


def _measure_lsq_plus(x: jax.Array, fmt: Format, valid: jax.Array | None = None) -> Range:
    if not fmt.symmetric:
        raise ValueError(f"lsq_plus ranges symmetric weights; with {fmt} use min_max() or mse()")
    _check(x, valid)
    if x.shape[1] * x.shape[2] < 2:
        raise ValueError(f"lsq_plus needs two values a row for a standard deviation, x has shape {x.shape}")
    where = None if valid is None else valid[None, :, None]
    x = x.astype(jnp.float32)
    mean, deviation = x.mean(axis=(1, 2), where=where), x.std(axis=(1, 2), ddof=1, where=where)
    return mean - 3 * deviation, mean + 3 * deviation


CUTS = 100


def _measure_mse(x: jax.Array, fmt: Format, valid: jax.Array | None = None) -> Range:
    """Searches fractions 1/100 ... 100/100 of the data's range, and for asymmetric formats each zero point too.

    Where the batch is of one sign the range keeps 0 as its other end and only its length is searched. The reference
    decides this on its first batch for all others; here each batch decides for itself.
    """
    least, most = _measure_min_max(x, fmt, valid)
    if fmt.symmetric:
        return _search_length(x, fmt, valid, least, most)
    one_sided = (least >= 0).all() | (most <= 0).all()
    search_both = partial(_search_length_and_zero, x, fmt, valid)
    return lax.cond(one_sided, partial(_search_length, x, fmt, valid), search_both, least, most)


def _search_length(x: jax.Array, fmt: Format, valid: jax.Array | None, least: jax.Array, most: jax.Array) -> Range:
    widest = jnp.maximum(jnp.abs(least), most)
    positive, negative = (least >= 0).all(), (most <= 0).all()

    def candidate(index: jax.Array) -> Range:
        length = widest / CUTS * (index + 1).astype(jnp.float32)
        return jnp.where(positive, jnp.float32(0), -length), jnp.where(negative & ~positive, jnp.float32(0), length)

    return _first_best(x, fmt, valid, candidate, CUTS)


def _search_length_and_zero(
    x: jax.Array, fmt: Format, valid: jax.Array | None, least: jax.Array, most: jax.Array
) -> Range:
    assert isinstance(fmt, Int)  # floats are symmetric
    zeros = fmt.qmax - fmt.qmin + 1

    def candidate(index: jax.Array) -> Range:
        length = (most - least) / CUTS * (index // zeros + 1).astype(jnp.float32)
        start = -(index % zeros + fmt.qmin).astype(jnp.float32) * (length / (fmt.qmax - fmt.qmin))
        return jnp.maximum(start, least), jnp.minimum(length + start, most)

    return _first_best(x, fmt, valid, candidate, CUTS * zeros)


def _first_best(
    x: jax.Array, fmt: Format, valid: jax.Array | None, candidate: Callable[[jax.Array], Range], count: int
) -> Range:
    """For each row the first of `count` candidate ranges with the smallest squared quantization error."""
    x = x.astype(jnp.float32)

    def error(index: jax.Array) -> jax.Array:
        scale, zero = grid_from_range(fmt, *candidate(index))
        zero = None if zero is None else zero[:, None, None]
        squares = (fake_quant(fmt, x, scale[:, None, None], zero) - x) ** 2
        return squares.sum(axis=(1, 2), where=None if valid is None else valid[None, :, None])

    # One candidate at a time: each is a single fused pass over x, without memory of its own, and faster than chunks.
    return candidate(jnp.argmin(lax.map(error, jnp.arange(count)), axis=0))


# Shared -------------------------------------------------------------------------------------------------------------


def _token_extrema(x: jax.Array, valid: jax.Array | None) -> Range:
    """The smallest and largest value of each token, `[rows, tokens]`; of an invalid token +inf and -inf."""
    _check(x, valid)
    low, high = x.min(axis=2).astype(jnp.float32), x.max(axis=2).astype(jnp.float32)
    if valid is None:
        return low, high
    return jnp.where(valid[None], low, jnp.inf), jnp.where(valid[None], high, -jnp.inf)


def _check(x: jax.Array, valid: jax.Array | None) -> None:
    if x.ndim != 3 or x.size == 0:
        raise ValueError(f"x has shape {x.shape}; an observer needs [rows, tokens, features], none of them 0")
    if valid is not None and (valid.shape != (x.shape[1],) or valid.dtype != jnp.bool_):
        raise ValueError(f"valid is {valid.dtype}{list(valid.shape)}; needed for x {x.shape} is bool[{x.shape[1]}]")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
