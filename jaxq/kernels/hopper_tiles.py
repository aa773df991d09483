"""How `jaxq.kernels.hopper_many` cuts a product into tiles, and K into steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxq.formats.scales import Scales
from jaxq.kernels.hopper_columns import SLICE
from jaxq.kernels.hopper_weights import Weights
from jaxq.kernels.layout import HALF

MULTIPLYING = 2  # warpgroups of a block
SHARED = 226 << 10  # bytes of shared memory of a block, for its steps under way
UNDER_WAY = 3  # steps at least, if deeper ones are to be taken
PROCESSORS = 132
MOST_SUMS = 256  # of a warpgroup's 64 columns, or half of 128 columns', whose sums then take half of the registers
SCALING = 85  # ns of a block with 64 columns a warpgroup, to scale 64 bytes' codes in one place of a byte (H200)


class Groups(NamedTuple):
    """Of channels: how many one has, how its scales are stored, and the bytes of its numbers for each column; none
    where there is but one group."""

    size: int
    scales: Scales = "real"
    held: int = 0

    def each(self, depth: int) -> int:
        """How many are touched by as many successive channels."""
        return max(1, depth // self.size)


@dataclass(frozen=True)
class Shape:
    """Of one product: [m, k] by [k, n] in tiles of `rows` and, for a warpgroup, `slices` times 64 columns; K in
    `splits` parts of `steps` steps of `depth` rows of packed bytes, of `codes` each."""

    m: int
    n: int
    codes: int
    groups: Groups
    slices: int
    rows: int
    splits: int
    depth: int
    steps: int
    under_way: int

    @property
    def columns(self) -> int:
        """Of a warpgroup."""
        return SLICE * self.slices

    @property
    def down(self) -> int:
        return -(-self.m // self.rows)

    @property
    def across(self) -> int:
        return -(-self.n // (MULTIPLYING * self.columns))


def shape_of(m: int, k: int, n: int, bits: int, dtype: Any, made: Weights, groups: Groups) -> Shape:
    """For weights of so many bits, `made` for activations of a dtype."""
    codes, packed = 8 // bits, k * bits // 8
    slices, rows, splits = tiles(m, packed, n, made, codes if groups.held else 0)

    def step_bytes(depth: int) -> int:
        columns = MULTIPLYING * SLICE * slices
        return depth * (columns + codes * rows * dtype.itemsize) + codes * groups.held * groups.each(depth) * columns

    # What is expanded at once, or twice that, so that one half is expanded while the other is multiplied; channels of
    # successive bytes are to be successive, too.
    twice = 2 * made.depth
    fits = step_bytes(twice) * UNDER_WAY <= SHARED and (codes == 1 or twice <= HALF)
    depth = twice if fits else made.depth
    steps = -(-packed // depth // splits)
    under_way = min(SHARED // step_bytes(depth), steps)
    return Shape(m, n, codes, groups, slices, rows, splits, depth, steps, under_way)


def tiles(m: int, depth: int, n: int, made: Weights, scaled: int = 0) -> tuple[int, int, int]:
    """How many slices of 64 columns a warpgroup multiplies at a time, how many rows of x a block, and into how many
    parts K is cut, for weights of `depth` bytes a column, of which so many codes of a byte are scaled by groups: what
    should take the least time. That of a tile's end, of reading the weights and of adding up parts are as measured,
    too."""
    runs, (run, row) = depth // made.depth, made.ns
    run += SCALING * scaled

    def ns(choice: tuple[int, int, int]) -> float:
        slices, rows, splits = choice
        rounds = -(-(-(-m // rows) * -(-n // (MULTIPLYING * SLICE * slices)) * splits) // PROCESSORS)
        work = rounds * (-(-runs // splits) * slices * (run + row * rows) + 4000)
        return max(work, depth * n / 4300) + (m * n * splits / 700 + 700 if splits > 1 else 0)

    each = 16 if made.sums == jnp.int32 else 8  # what the tensor cores take
    shapes = [(slices, rows) for slices in (1, 2) for rows in range(each, MOST_SUMS // slices + 1, each)]
    choices = ((*shape, splits) for shape in shapes for splits in range(1, max(1, min(8, runs // 2)) + 1))
    return min(choices, key=ns)
