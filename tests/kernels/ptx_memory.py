"""What a compiled kernel that `ptx` runs finds in memory: tensor maps, shared memory and its barriers.

Written, as `ptx`, against NVIDIA's PTX ISA 9.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BUFFER, MAPS = 1 << 32, 1 << 48  # the n-th buffer is at (n + 1) * BUFFER; tensor maps are at MAPS, 128 bytes each


@dataclass(frozen=True)
class Tiled:
    """A matrix in device memory as a tensor map shows it: tiles of 8 rows of 128 bytes, `box` of them a copy."""

    matrix: np.ndarray
    box: tuple[int, int]

    def copy(self, at: list[int]) -> np.ndarray:
        """The bytes of the box at a tile, [rows, columns, 8, 128]; an axis with one tile only is left out of `at`. What
        is out of bounds is 0."""
        height, width = self.matrix.shape[0] // 8, self.matrix.view(np.uint8).shape[1] // 128
        tiles = self.matrix.view(np.uint8).reshape(height, 8, width, 128).swapaxes(1, 2)
        *left, row, column = at
        assert (row, column) == (0, 0), "whole tiles"
        row, column = (left.pop(0) if n > 1 else 0 for n in (height, width))
        found = tiles[row : row + self.box[0], column : column + self.box[1]]
        assert not left
        missing = [(0, of - there) for of, there in zip(self.box, found.shape)]
        return np.pad(found, [*missing, (0, 0), (0, 0)])


@dataclass(frozen=True)
class Rows:
    """A matrix in device memory as a tensor map shows it, `length` numbers of a row a copy."""

    matrix: np.ndarray
    length: int

    def copy(self, at: list[int]) -> np.ndarray:
        """The bytes of the numbers at a row and column. What is out of bounds is 0."""
        row, column = at
        found = self.matrix[row : row + 1, column : column + self.length]
        missing = (0, 1 - found.shape[0]), (0, self.length - found.shape[1])
        return np.pad(found, missing).view(np.uint8)


@dataclass
class Barrier:
    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def move(self, arrivals: int = 0, expected: int = 0) -> None:
        self.bytes += expected
        self.pending -= arrivals
        assert self.pending >= 0
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1


@dataclass
class Block:
    """What the warpgroups of a block share."""

    maps: list[Tiled | Rows]
    buffers: list[np.ndarray]
    shared: np.ndarray = field(default_factory=lambda: np.zeros(232448, np.uint8))
    barriers: dict[int, Barrier] = field(default_factory=dict)

    def bytes_at(self, address: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The memory, and where in it the bytes are, [128, length]."""
        at = address.astype(np.int64)[:, None] + np.arange(length)
        which = int(at[0, 0]) // BUFFER
        assert (at // BUFFER == which).all()
        memory = self.shared if which == 0 else self.buffers[which - 1].reshape(-1).view(np.uint8)
        return memory, at % BUFFER


def swizzled(address: np.ndarray) -> np.ndarray:
    return address ^ ((address >> 7 & 7) << 4)
