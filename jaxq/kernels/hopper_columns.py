"""Columns of packed weights in a Hopper GPU's registers, for `jaxq.kernels.hopper_many`, as in `hopper_registers`.

A block's columns are shared by two warpgroups, 64 or 128 each. Lane l = 4 q + t of warp w of a warpgroup holds

| tile                    | its registers                                                                          |
|-------------------------|----------------------------------------------------------------------------------------|
| words [32 s, depth / 2] | of rows 32 a + 8 w + q and columns 4 g + t, one word: two rows of bytes, two columns   |
| fragments [64 s, depth] | the tensor cores' own, of rows 64 a + 16 w + 8 b + q                                   |
| result [rows, 64 s]     | of rows 8 g + 2 t + h, columns 64 a + 16 w + 2 q and the next                          |
| per row [64 s]          | those of a fragment's rows                                                             |

So row 64 a + 16 w + 8 b + q of a fragment is column 64 a + 16 w + 2 q + b of the weight: `ldmatrix` gives each lane two
columns' bytes side by side, and nothing else is exchanged between lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from jaxq.kernels.hopper_registers import DEPTH, FRAGMENTS, PAIRS, ROWS, as_vector, assembled, element, moved

SLICE = 64  # columns
RESULT = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (8, 16), (2, 2))), warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1
)
# Which of 32 rows of bytes a lane points `ldmatrix` at: the exclusive or of these, for the bits that are set in l.
# Rows are to differ in their last three bits within eight lanes, or these wait for each other.
IN_ORDER = 1, 2, 4, 8, 16  # row 8 p + 2 t + h is in half h of the p-th word of four


def words(part: Any, lanes: tuple[int, ...] = IN_ORDER) -> jax.Array:
    """This warpgroup's columns of packed bytes, int32 [32 s, depth / 2].

    The g-th word of lane 4 q + t has the rows that lanes 2 t and 2 t + 1 of each eight point at, the first in its low
    half, and in each half two columns, the even one first.

    Args:
        part: a reference to uint8 [depth, 128 s] of shared memory, in swizzled tiles (8, 128).
        lanes: as `IN_ORDER`.
    """
    depth, width = part.shape
    slices = width // (2 * SLICE)
    tiled = plgpu.RefType((plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)))
    shape = (32 * slices, depth // 2)
    declared: Any = PAIRS.to_mgpu()

    @plgpu.inline_mgpu(arg_types=(tiled,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=PAIRS))
    def load(_: Any, part: Any) -> Any:
        (strip, *_), _ = ir.MemRefType(part.type).get_strides_and_offset()
        row = _row(lanes)
        below = arith.andi(row, number(7))
        chunk = arith.addi(arith.muli(_bits(7, 2), number(4 * slices)), _bits(5, 2))  # the first 16 of its columns
        start = arith.addi(arith.muli(arith.shrui(row, number(3)), number(strip)), arith.muli(below, number(128)))
        start = arith.addi(start, arith.muli(arith.shrui(chunk, number(3)), number(1024)))
        found = np.empty((slices, depth // 8), object)
        for a in range(slices):
            swizzled = arith.xori(arith.addi(arith.andi(chunk, number(7)), number(4 * a)), below)
            found[a] = list(_loaded(part, arith.addi(start, arith.muli(swizzled, number(16))), strip, depth // 32))
        registers = found.reshape(declared.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=declared, _is_signed=True)

    call: Any = load
    return call(part)


def _bits(lowest: int, count: int) -> Any:
    """Some bits of the thread's number: five of the lane, two of the warp, two of the warpgroup."""
    return arith.andi(arith.shrui(utils.thread_idx(), number(lowest)), number(2**count - 1))


def _row(lanes: tuple[int, ...]) -> Any:
    """Of 32, the one that this lane points at."""
    row = number(0)
    for bit, mask in enumerate(lanes):
        row = arith.xori(row, arith.muli(_bits(bit, 1), number(mask)))
    return row


def _loaded(part: Any, start: Any, strip: int, count: int) -> Iterator[Any]:
    """Four words for each 32 rows of bytes; `start` is where this lane points at first."""
    word, byte = (ir.IntegerType.get_signless(bits) for bits in (32, 8))
    first = utils.getelementptr(utils.memref_ptr(part), [start], byte)
    eight = ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m = 8, n = 8>")
    for four in range(count):
        where = utils.getelementptr(first, [4 * four * strip], byte)
        op = nvvm.LdMatrixOp(
            where,
            4,
            nvvm.MMALayout.col,
            eight,
            nvvm.LdStMatrixEltType.B16,
            results=[llvm.StructType.get_literal([word] * 4)],
        )
        yield from (as_vector(llvm.extractvalue(word, op.result, [i]), word, 1) for i in range(4))


def result(sums: jax.Array) -> jax.Array:
    """What fragments were multiplied to, [64 s, rows], as [rows, 64 s] in the order of the weight's columns."""
    width, rows = sums.shape

    def move(sums: np.ndarray) -> np.ndarray:
        two = sums.flat[0].type
        held = sums.reshape(width // SLICE, rows // 8, 2)  # [a, g, b], two numbers in each, h
        found = np.empty((rows // 8, width // SLICE, 2), object)  # [g, a, h]
        for g, a, h in np.ndindex(found.shape):
            found[g, a, h] = vector.from_elements(two, [element(held[a, g, b], h) for b in (0, 1)])
        return found

    return moved(move, [sums], FRAGMENTS, (rows, width), sums.dtype, RESULT)


def per_row(numbers: jax.Array) -> jax.Array:
    """A number for each of the weight's columns, float32 [64 s] as a row of a result, for each of a fragment's rows."""
    (width,) = numbers.shape

    def move(numbers: np.ndarray) -> np.ndarray:
        one = ir.VectorType.get((1,), ir.F32Type.get())
        found = np.empty((width // SLICE, 2), object)  # [a, b]
        for (a, b), two in zip(np.ndindex(found.shape), np.repeat(numbers.reshape(-1), 2)):
            found[a, b] = vector.from_elements(one, [element(two, b)])
        return found

    return moved(move, [numbers], RESULT.reduce(0), (width,), jnp.float32, ROWS)


def scaled(numbers: jax.Array, factors: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """Fragments, bfloat16 [64 s, 64], times the factors of their columns: `numbers * first + bfloat16(numbers *
    second)`, rounded once more, or `numbers * first`.

    Args:
        factors: for each of as many groups as the 64 channels have, one or two: bfloat16 [64 s] as a row of a result.
    """
    groups, kinds = len(factors), len(factors[0])

    def move(numbers: np.ndarray, *factors: np.ndarray) -> np.ndarray:
        word, half = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        held = numbers.reshape(-1, DEPTH // 8, 2)  # [a, g, b]
        found = np.empty(held.shape, object)
        for group, a, b in np.ndindex(groups, len(held), 2):
            here = (by.reshape(-1)[a : a + 1] for by in factors[kinds * group : kinds * (group + 1)])
            pairs = [utils.bitcast(by.item(), word) for by in here]
            first, *second = (utils.prmt(pair, pair, number((0x1010, 0x3232)[b])) for pair in pairs)
            for g in range(DEPTH // 8 * group // groups, DEPTH // 8 * (group + 1) // groups):
                given = utils.bitcast(held[a, g, b], word)
                made = assembled("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", given, *(second or [first]))
                if second:
                    made = assembled("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", given, first, made)
                found[a, g, b] = as_vector(made, half, 2)
        return found

    every = [by for of_group in factors for by in of_group]
    layouts = FRAGMENTS, *(RESULT.reduce(0),) * len(every)
    return moved(move, [numbers, *every], layouts, numbers.shape, jnp.bfloat16, FRAGMENTS)


def number(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(32))
