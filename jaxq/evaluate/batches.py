"""Rows of different lengths in batches of few shapes, so that little is compiled."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

SHORTEST = 16  # rows are 16, 32, 64, ... long
# Tokens in a batch. On a CPU attention's scores should stay in the caches, and below the 32 MiB from which on each
# call gets them from the system anew, page by page.
CPU_TOKENS, TOKENS = 1024, 8192


def default_rows(length: int) -> int:
    """How many windows of `length` tokens run at once where nobody says."""
    return max(1, (CPU_TOKENS if jax.default_backend() == "cpu" else TOKENS) // length)


def batches_at_once() -> int:
    """How many batches run side by side: on a CPU the cores that small operations leave idle serve another batch."""
    return 2 if jax.default_backend() == "cpu" else 1


def by_width(sizes: np.ndarray, batch_size: int, longest: int) -> Iterator[tuple[np.ndarray, int]]:
    """The indices of rows of about the same size, int `[batch_size]`, and the width that they all fit in.

    A batch that is not full is filled up with copies of its last row. Widths double from `SHORTEST` to `longest`.
    """
    below, width = -1, min(SHORTEST, longest)
    while below < sizes.max(initial=-1):
        rows = np.flatnonzero((sizes > below) & (sizes <= width))
        for i in range(0, len(rows), batch_size):
            some = rows[i : i + batch_size]
            yield some[np.minimum(np.arange(batch_size), len(some) - 1)], width
        below, width = width, min(2 * width, longest)


def cut(rows: np.ndarray, width: int) -> np.ndarray:
    """The first `width` columns; zeros, which the mask calls padding too, where there are fewer."""
    return np.pad(rows, ((0, 0), (0, max(0, width - rows.shape[1]))))[:, :width]


def in_order(count: int, batch_size: int) -> Iterator[np.ndarray]:
    """The indices of `count` rows of one size, in order: int `[batch_size]`, the last ones as in `by_width`."""
    for begin in range(0, count, batch_size):
        yield np.minimum(np.arange(begin, begin + batch_size), count - 1)
