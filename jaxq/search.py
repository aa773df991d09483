"""One-dimensional searches over a fixed grid of candidates, given a function from candidates to losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Losses = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Search:
    """How a grid is searched: the first candidate (of a threshold: no scaling, so that it is never worse than that) and
    the middle of every `stride` candidates, then, with the stride halved again and again, the neighbours at that stride
    of the best so far. Losses of quantized numbers are rough on the small scale, and the best one hides among its like.

    Attributes:
      stride: of the sparse grid; 1 is every candidate.
      keep: of how many the neighbours are tried in any case: so many at the last stride, one less at each coarser one.
      within: those of all others, too, whose loss is at most by this share above the least so far. Losses are not
        negative then. `search_each` leaves it out: its searches share one compiled call, and so one number.
    """

    stride: int = 1
    keep: int = 3
    within: float = 0.0

    def __post_init__(self) -> None:
        if self.stride < 1 or self.keep < 1:
            raise ValueError(f"a search needs a stride and a number to keep of at least 1, not {self}")
        if not self.within >= 0:
            raise ValueError(f"a search keeps losses within a share of the least that is not negative, not {self}")


def exhaustive() -> Search:
    """Every candidate."""
    return Search()


def coarse_to_fine(stride: int = 8, keep: int = 3, within: float = 0.1) -> Search:
    """A sparse grid first, then ever finer around the best and all that are about as good.

    The steeper the losses, the fewer candidates: of 101 about 25 where channels stand out, all where none matters.
    Where many searches run at once and each tries as many (LLM-FP4), about 25, with a `keep` of 4 about 30.
    """
    return Search(stride, keep, within)


def search(method: Search, candidates: np.ndarray, losses: Losses) -> tuple[int, np.ndarray]:
    """The index of the first strictly smallest loss, and the losses (NaN where a candidate was not tried).

    Args:
      candidates: [n], at least one.
      losses: from some of the candidates to their losses, both [m]; called at most a few times.
    """
    found = np.full(len(candidates), np.nan, np.float32)
    wanted, stride = _first_tried(method, len(candidates)), method.stride
    while True:
        wanted = wanted[np.isnan(found[wanted])]
        if len(wanted):
            found[wanted] = losses(candidates[wanted])
        if stride == 1:
            return _first_smallest(found), found
        stride //= 2
        alike = int((found <= (1 + method.within) * np.fmin.reduce(found)).sum())
        best = np.argsort(found, kind="stable")[: max(alike, _kept(method, stride))]
        near = np.concatenate([best - stride, best + stride])
        wanted = np.unique(near[(near >= 0) & (near < len(candidates))])


def _kept(method: Search, stride: int) -> int:
    return max(1, method.keep - (stride.bit_length() - 1))


def _first_tried(method: Search, count: int) -> np.ndarray:
    middles = np.arange(min(method.stride, count) // 2, count, method.stride)
    return np.union1d(0, middles)


def _first_smallest(losses: np.ndarray) -> int:
    if not np.isfinite(losses).any():
        raise ValueError("no candidate has a finite loss")
    return int(np.nanargmin(losses))


def padded(candidates: np.ndarray, multiple: int = 64) -> np.ndarray:
    """The candidates with the last one repeated up to a multiple: a few lengths, so a few compilations."""
    extra = -len(candidates) % multiple
    return np.concatenate([candidates, np.repeat(candidates[-1:], extra)])


def search_each(
    method: Search, count: int, sure: int, shape: tuple[int, ...], loss: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Many searches of `method` at once, inside a compiled call, each with a choice of its own; all try as many
    candidates, so that `within` does not apply.

    Args:
      count: how many candidates there are.
      sure: the index of a candidate that is tried in any case.
      shape: of the choices.
      loss: from indices of candidates, int32 [*shape], to their losses, float32 [*shape]; NaN loses.

    Returns:
      the index of the first smallest loss, int32 [*shape], and that loss.
    """
    return best_of(refine(method, coarse(method, count, sure, shape, loss), loss))


def coarse(
    method: Search, count: int, sure: int, shape: tuple[int, ...], loss: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The first part of `search_each`: the sparse grid's losses, [count, *shape]; infinity elsewhere."""
    first = np.union1d(_first_tried(method, count), sure)
    found = jax.lax.map(lambda i: loss(jnp.broadcast_to(i, shape)), jnp.asarray(first, jnp.int32))
    return jnp.full((count, *shape), jnp.inf, jnp.float32).at[first].set(_ordered(found))


def refine(method: Search, losses: jax.Array, loss: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The second part: ever finer around the best so far."""
    steps, stride = [], method.stride
    while stride > 1:
        stride //= 2
        ranks = range(_kept(method, stride))
        steps += [(rank, move, rank == 0 and move < 0) for rank in ranks for move in (-stride, stride)]
    if not steps:
        return losses

    def one(state: tuple[jax.Array, jax.Array], step: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        losses, best = state
        rank, move, starts = step
        best = jax.lax.cond(starts, lambda: _smallest(losses, method.keep), lambda: best)
        i = jnp.clip(best[rank] + move, 0, len(losses) - 1)
        return (jnp.put_along_axis(losses, i[None], _ordered(loss(i))[None], 0, inplace=False), best), None

    # One after the other, so that the loss is compiled once.
    start = losses, jnp.zeros((method.keep, *losses.shape[1:]), jnp.int32)
    ranks, moves, starts = (np.asarray(column) for column in zip(*steps))
    (losses, _), _ = jax.lax.scan(one, start, (np.int32(ranks), np.int32(moves), starts))
    return losses


def _ordered(losses: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(losses), jnp.inf, losses)


def best_of(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index of the first smallest loss along the first axis, and that loss."""
    found = losses.argmin(0).astype(jnp.int32)
    return found, jnp.take_along_axis(losses, found[None], 0)[0]


def _smallest(losses: jax.Array, count: int) -> jax.Array:
    """The indices of the `count` smallest along the first axis."""
    found = []
    for _ in range(count):
        found.append(losses.argmin(0).astype(jnp.int32)[None])
        losses = jnp.put_along_axis(losses, found[-1], jnp.inf, 0, inplace=False)
    return jnp.concatenate(found)


def each(loss: Callable[[jax.Array], jax.Array], candidates: jax.Array, count: int | jax.Array) -> jax.Array:
    """`loss` of the first `count` candidates, one after the other inside one compiled call; zeros for the rest."""

    def step(i: jax.Array, losses: jax.Array) -> jax.Array:
        return losses.at[i].set(loss(candidates[i]))

    return jax.lax.fori_loop(0, count, step, jnp.zeros(candidates.shape, jnp.float32))
