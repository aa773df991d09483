"""One-dimensional searches over a fixed grid of candidates, given a function from candidates to losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Losses = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Search:
    """How a grid is searched: `stride` 1 tries every candidate; a larger one tries every `stride`-th first, then, with
    the stride halved again and again, the neighbours of the `keep` best so far."""

    stride: int = 1
    keep: int = 2


def exhaustive() -> Search:
    """Every candidate."""
    return Search()


def coarse_to_fine(stride: int = 8, keep: int = 3) -> Search:
    """A sparse grid first, then ever finer around the best: about a third of the candidates on 100 of them."""
    return Search(stride, keep)


def search(method: Search, candidates: np.ndarray, losses: Losses) -> tuple[int, np.ndarray]:
    """The index of the first strictly smallest loss, and the losses (NaN where a candidate was not tried).

    Args:
      candidates: [n], at least one.
      losses: from some of the candidates to their losses, both [m]; called at most a few times.
    """
    found = np.full(len(candidates), np.nan, np.float32)
    wanted = np.arange(0, len(candidates), method.stride)
    stride = method.stride
    while True:
        wanted = wanted[np.isnan(found[wanted])]
        if len(wanted):
            found[wanted] = losses(candidates[wanted])
        if stride == 1:
            return _first_smallest(found), found
        stride //= 2
        best = np.argsort(found, kind="stable")[: method.keep]
        near = np.concatenate([best - stride, best + stride])
        wanted = np.unique(near[(near >= 0) & (near < len(candidates))])


def _first_smallest(losses: np.ndarray) -> int:
    if not np.isfinite(losses).any():
        raise ValueError("no candidate has a finite loss")
    return int(np.nanargmin(losses))


def padded(candidates: np.ndarray, multiple: int = 8) -> np.ndarray:
    """The candidates with the last one repeated up to a multiple: a few lengths, so a few compilations."""
    extra = -len(candidates) % multiple
    return np.concatenate([candidates, np.repeat(candidates[-1:], extra)])
