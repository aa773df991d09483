"""What a compiled kernel that `ptx` runs finds in memory: tensor maps, shared memory and its barriers.

Written, as `ptx`, against NVIDIA's PTX ISA 9.0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# The n-th buffer is at (n + 1) * BUFFER; tensor maps are at MAPS, 128 bytes each; the shared memory of a cluster's n-th
# block is at (n + 1) * PEER, beside where each block has its own.
PEER, BUFFER, MAPS = 1 << 24, 1 << 32, 1 << 48


@dataclass(frozen=True)
class Tiled:
    """A matrix in device memory as a tensor map shows it: tiles of 8 rows of 128 bytes, `box` of them a copy."""

    matrix: np.ndarray
    box: tuple[int, int]

    def copy(self, at: list[int]) -> np.ndarray:
        """The bytes of the box at a tile, [rows, columns, 8, 128]; an axis with one tile only is left out of `at`. What
        is out of bounds is 0."""
        rows, columns = self._box(at)
        bytes_ = self.matrix.view(np.uint8)
        box = np.zeros((8 * self.box[0], 128 * self.box[1]), np.uint8)
        found = bytes_[rows, columns]
        box[: found.shape[0], : found.shape[1]] = found
        return box.reshape(self.box[0], 8, self.box[1], 128).swapaxes(1, 2)

    def store(self, at: list[int], bytes_: np.ndarray) -> None:
        """The same way back; what is out of bounds is left out."""
        box = bytes_.reshape(*self.box, 8, 128).swapaxes(1, 2).reshape(8 * self.box[0], -1)
        here = self.matrix.view(np.uint8)[self._box(at)]
        here[:] = box[: here.shape[0], : here.shape[1]]

    def _box(self, at: list[int]) -> tuple[slice, slice]:
        height, width = -(-self.matrix.shape[0] // 8), self.matrix.view(np.uint8).shape[1] // 128
        *left, row, column = at
        assert (row, column) == (0, 0), "whole tiles"
        row, column = (left.pop(0) if n > 1 else 0 for n in (height, width))
        assert not left
        return slice(8 * row, 8 * (row + self.box[0])), slice(128 * column, 128 * (column + self.box[1]))


@dataclass(frozen=True)
class Rows:
    """A matrix in device memory as a tensor map shows it, `length` numbers of `count` rows a copy."""

    matrix: np.ndarray
    length: int
    count: int = 1

    def copy(self, at: list[int]) -> np.ndarray:
        """The bytes of the numbers at a row and column. What is out of bounds is 0."""
        row, column = at
        box = np.zeros((self.count, self.length), self.matrix.dtype)
        found = self.matrix[row : row + self.count, column : column + self.length]
        box[: found.shape[0], : found.shape[1]] = found
        return box.view(np.uint8)


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
    """What the warpgroups of a block share, and the blocks of its cluster."""

    maps: list[Tiled | Rows]
    buffers: list[np.ndarray]
    shared: np.ndarray = field(default_factory=lambda: np.zeros(232448, np.uint8))
    barriers: dict[int, Barrier] = field(default_factory=dict)
    cluster: list[Block] = field(default_factory=list)

    copies: list[tuple[np.ndarray, np.ndarray, int]] = field(default_factory=list)

    def copy(self, where: np.ndarray, bytes_: np.ndarray, barrier: int) -> None:
        """Begins a copy into shared memory; until it ends, nothing of use is there."""
        self.shared[where] = 0x7F
        self.copies.append((where, bytes_, barrier))

    def land(self) -> int:
        """Ends all copies; how many they were."""
        found, self.copies = self.copies, []
        for where, bytes_, barrier in found:
            self.shared[where] = bytes_
            self.barriers[barrier].move(expected=-len(bytes_))
        return len(found)

    def of(self, address: int) -> tuple[Block, int]:
        """The block that an address of shared memory is in, and where."""
        return (self.cluster[address // PEER - 1] if address >= PEER else self), address % PEER

    def bytes_at(self, address: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The memory, and where in it the bytes are, [128, length]."""
        at = address.astype(np.int64)[:, None] + np.arange(length)
        which = int(at[0, 0]) // BUFFER
        assert (at // BUFFER == which).all()
        if which == 0:
            block, _ = self.of(int(at[0, 0]))
            return block.shared, at % PEER
        return self.buffers[which - 1].reshape(-1).view(np.uint8), at % BUFFER


def swizzled(address: np.ndarray) -> np.ndarray:
    return address ^ ((address >> 7 & 7) << 4)
