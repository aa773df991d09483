"""Packed weights in a Hopper GPU's registers for products in int8: as `jaxq.kernels.hopper_registers`, for bytes.

| tile                    | its registers                                                                |
|-------------------------|------------------------------------------------------------------------------|
| deep bytes [128, 128]   | of rows 16 g + 4 t + (h ^ (t & 2)), four bytes, n = 32 w + 4 q + i           |
| quads [128, 32]         | of rows 64 a + 16 w + 8 b + q, word 4 g + t: byte 2 a + b of all four rows h |
| integers [128, 128]     | the tensor cores' own: as the quads, four columns a word                     |

Deep bytes lie so because lanes t and t + 2 would otherwise wait for the same banks of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxq.kernels.gpu import COLUMNS
from jaxq.kernels.hopper_registers import as_vector, moved

DEEP_BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 128), (16, 32), (4, 4))), warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1
)
QUADS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
INTEGERS = plgpu.Layout.WGMMA_8BIT
FIRST, SECOND = 0x5140, 0x7362  # bytes 0, 0, 1, 1 of two words in turn, and bytes 2, 2, 3, 3


def deep_bytes(part: Any) -> jax.Array:
    """Packed bytes of shared memory, a reference to uint8 [128, 128] in swizzled tiles (8, 128), as `DEEP_BYTES`."""
    tiled = plgpu.RefType((plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)))
    declared: Any = DEEP_BYTES.to_mgpu()

    @plgpu.inline_mgpu(
        arg_types=(tiled,), return_type=plgpu.ShapeDtypeStruct((COLUMNS, COLUMNS), jnp.uint8, layout=DEEP_BYTES)
    )
    def load(_: Any, part: Any) -> Any:
        word, byte = (ir.IntegerType.get_signless(bits) for bits in (32, 8))
        (tile, *_), _ = ir.MemRefType(part.type).get_strides_and_offset()

        def number(value: int) -> Any:
            return utils.c(value, word)

        def bits(value: Any, lowest: int, count: int, to: int) -> Any:
            """Some bits of a value at another place."""
            return arith.shli(arith.andi(arith.shrui(value, number(lowest)), number(2**count - 1)), number(to))

        thread = arith.remui(utils.thread_idx(), number(128))  # 32 w + 4 q + t
        start = arith.addi(arith.muli(bits(thread, 1, 1, 0), number(tile)), bits(thread, 2, 2, 2))
        row = arith.ori(bits(thread, 0, 1, 9), bits(thread, 1, 1, 8))  # 128 (4 (t % 2) + (h ^ (t & 2))), with h = 0
        chunk = arith.xori(bits(thread, 4, 3, 4), arith.shrui(row, number(3)))
        found = np.empty((COLUMNS // 16, 4), object)  # [g, h]
        for h in range(4):
            place = arith.xori(arith.ori(row, chunk), number(128 * h + 16 * h))
            first = utils.getelementptr(utils.memref_ptr(part), [arith.addi(start, place)], byte)
            for g in range(len(found)):
                loaded = llvm.load(word, utils.getelementptr(first, [2 * g * tile], byte))
                found[g, h] = as_vector(loaded, byte, 4)
        registers = found.reshape(declared.registers_shape((COLUMNS, COLUMNS)))
        return mgpu.FragmentedArray(_registers=registers, _layout=declared, _is_signed=False)

    call: Any = load
    return call(part)


def quads(packed: jax.Array) -> jax.Array:
    """Packed bytes, uint8 [128, 128] as `DEEP_BYTES`, as quads, int32 [128, 32]."""

    def move(packed: np.ndarray) -> np.ndarray:
        word, swapped = ir.IntegerType.get_signless(32), _swapped()
        halves = [arith.xori(_number(bytes_), swapped) for bytes_ in (0x5410, 0x7632)]
        rows = np.vectorize(lambda row: utils.bitcast(row, word), otypes=[object])(packed.reshape(-1, 4))  # [g, h]
        found = np.empty((2, len(rows), 2), object)  # [a, g, b]
        for g, (h0, h1, h2, h3) in enumerate(rows):
            for a, bytes_ in enumerate((FIRST, SECOND)):
                first, second = (utils.prmt(*pair, _number(bytes_)) for pair in ((h0, h1), (h2, h3)))
                for b, half in enumerate(halves):
                    found[a, g, b] = as_vector(utils.prmt(first, second, half), word, 1)
        return found

    return moved(move, [packed], DEEP_BYTES, (COLUMNS, packed.shape[0] // 4), jnp.int32, QUADS)


def integers(words: jax.Array) -> jax.Array:
    """Quads, int32 [128, depth / 4], as the int8 [128, depth] that are in them."""
    byte, shape = partial(ir.IntegerType.get_signless, 8), (words.shape[0], 4 * words.shape[1])

    def move(words: np.ndarray) -> np.ndarray:
        return np.vectorize(lambda word: as_vector(word, byte(), 4), otypes=[object])(words)

    return moved(move, [words], QUADS, shape, jnp.int8, INTEGERS)


def looked_up(packed: jax.Array, values: Sequence[tuple[int, int]]) -> Iterator[jax.Array]:
    """Of packed codes of 4 bits, uint8 [128, 128] as `DEEP_BYTES`: the integers that the low ones stand for, then those
    of the high ones, int8 [128, 128].

    A byte permutation takes four nibbles as indices into eight bytes; with its highest bit set, a nibble gives eight
    times that byte's sign, which is 0 here.

    Args:
        values: of the codes 0 to 7 and of those with the sign bit set, from 0 to 127.
    """
    tables = [int.from_bytes(bytes(table), "little") for table in zip(*((p ^ n, n) for p, n in values))]

    def move(high: bool, packed: np.ndarray) -> np.ndarray:
        word, byte = (ir.IntegerType.get_signless(bits) for bits in (32, 8))
        four, swapped = _number(4), _swapped()
        pairs = [arith.xori(_number(bytes_), swapped) for bytes_ in (FIRST, SECOND)]

        def nibbles(first: Any, second: Any) -> Any:
            """Of each byte, the first's nibble below the second's."""
            low, above = (arith.shrui(first, four), second) if high else (first, arith.shli(second, four))
            return arith.ori(arith.andi(low, _number(0x0F0F0F0F)), arith.andi(above, _number(-0x0F0F0F10)))

        def found_in(table: int, indices: Any) -> Any:
            low, above = (half - (half >> 31 << 32) for half in (table % 2**32, table >> 32))
            return utils.prmt(_number(low), _number(above), indices)

        rows = np.vectorize(lambda row: utils.bitcast(row, word), otypes=[object])(packed.reshape(-1, 4))  # [g, h]
        found = np.empty((2, len(rows), 2), object)  # [a, g, b]
        for g, (h0, h1, h2, h3) in enumerate(rows):
            two = nibbles(h0, h1), nibbles(h2, h3)
            for a, b in np.ndindex(2, 2):
                codes = utils.prmt(*two, pairs[a])
                codes = arith.shrui(codes, _number(16)) if b else codes
                unsigned = arith.andi(codes, _number(0x7777))
                found[a, g, b] = as_vector(
                    arith.xori(found_in(tables[0], codes), found_in(tables[1], unsigned)), byte, 4
                )
        return found

    for high in (False, True):
        yield moved(partial(move, high), [packed], DEEP_BYTES, (COLUMNS, packed.shape[0]), jnp.int8, INTEGERS)


def _number(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _swapped() -> Any:
    """What is to be flipped in a selection of two words' bytes if this lane has the words in the other order."""
    upper = arith.andi(utils.thread_idx(), _number(2))  # of a warp's 32 lanes, 4 q + t, those with t above 1
    return arith.muli(upper, _number(0x2222))
