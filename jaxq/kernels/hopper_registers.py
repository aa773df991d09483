"""How a Hopper GPU's registers hold the tiles of `jaxq.kernels.hopper_matmul`, and how they are taken for others.

A warpgroup has four warps of 32 lanes; lane l of warp w is 4 q + t, q below 8 and t below 4. It holds

| tile                    | its registers                                                                              |
|-------------------------|--------------------------------------------------------------------------------------------|
| packed bytes [64, 128]  | of rows 8 g + 2 t + h, four bytes, n = 32 w + 4 q + i                                      |
| pairs [64, 32]          | of rows 32 a + 8 w + q and columns 4 g + t, one word: bytes 2 a and 2 a + 1 of both rows h |
| fragments [128, 64]     | the tensor cores' own: of rows 64 a + 16 w + 8 b + q, columns 8 g + 2 t and the next       |
| result [rows, 128]      | as the packed bytes                                                                        |
| deep bytes [128, 128]   | of rows 16 g + 4 t + (h ^ (t & 2)), four bytes, n = 32 w + 4 q + i                         |
| quads [128, 32]         | of rows 64 a + 16 w + 8 b + q, word 4 g + t: byte 2 a + b of all four rows h               |
| integers [128, 128]     | the tensor cores' own: as the quads, four columns a word                                   |

So row 64 a + 16 w + 8 b + q of a fragment is column n = 32 w + 4 q + 2 a + b of the weight, and each lane has the bytes
that its fragments are made from: nothing is exchanged between lanes. A pair's low half is the byte of row h = 0 and its
high half that of h = 1, so that a nibble of each is a pair of successive channels of one column.

Deep bytes lie so because lanes t and t + 2 would otherwise wait for the same banks of shared memory.

But for `looked_up` and `store_rows` the functions move registers and compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxq.kernels.gpu import COLUMNS

DEPTH = 64  # rows of packed bytes in a warpgroup's tile of COLUMNS columns
BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (8, 32), (2, 4))), warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1
)
PAIRS = plgpu.Layout.TILED(plgpu.Tiling(((32, 4), (8, 4), (1,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
FRAGMENTS = plgpu.Layout.WGMMA
DEEP_BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 128), (16, 32), (4, 4))), warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1
)
QUADS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
INTEGERS = plgpu.Layout.WGMMA_8BIT
FIRST, SECOND = 0x5140, 0x7362  # bytes 0, 0, 1, 1 of two words in turn, and bytes 2, 2, 3, 3


def pairs(packed: jax.Array) -> jax.Array:
    """Packed bytes, uint8 [64, 128], as pairs, int32 [64, 32]."""

    def move(packed: np.ndarray) -> np.ndarray:
        word = ir.IntegerType.get_signless(32)
        found = np.empty((2, DEPTH // 8), object)  # [a, g]
        for g, rows in enumerate(packed.reshape(DEPTH // 8, 2)):  # [g, h]
            first, second = (utils.bitcast(row, word) for row in rows)
            for a, bytes_ in enumerate((0x5410, 0x7632)):
                found[a, g] = _vector(utils.prmt(first, second, _number(bytes_)), word, 1)
        return found

    return _moved(move, [packed], BYTES, (DEPTH, DEPTH // 2), jnp.int32, PAIRS)


def fragments(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two bfloat16 in each word of the pairs, int32 [64, 32], of the bytes b = 0 and 1: as bfloat16 [128, 64]."""

    def move(*words: np.ndarray) -> np.ndarray:
        both = np.stack([w.reshape(2, DEPTH // 8) for w in words], -1)  # [a, g, b]
        half = ir.BF16Type.get()
        return np.vectorize(lambda word: _vector(word, half, 2), otypes=[object])(both)

    return _moved(move, [first, second], PAIRS, (COLUMNS, DEPTH), jnp.bfloat16, FRAGMENTS)


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
                found[g, h] = _vector(loaded, byte, 4)
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
                    found[a, g, b] = _vector(utils.prmt(first, second, half), word, 1)
        return found

    return _moved(move, [packed], DEEP_BYTES, (COLUMNS, packed.shape[0] // 4), jnp.int32, QUADS)


def integers(words: jax.Array) -> jax.Array:
    """Quads, int32 [128, depth / 4], as the int8 [128, depth] that are in them."""
    byte, shape = partial(ir.IntegerType.get_signless, 8), (words.shape[0], 4 * words.shape[1])

    def move(words: np.ndarray) -> np.ndarray:
        return np.vectorize(lambda word: _vector(word, byte(), 4), otypes=[object])(words)

    return _moved(move, [words], QUADS, shape, jnp.int8, INTEGERS)


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
                found[a, g, b] = _vector(arith.xori(found_in(tables[0], codes), found_in(tables[1], unsigned)), byte, 4)
        return found

    for high in (False, True):
        yield _moved(partial(move, high), [packed], DEEP_BYTES, (COLUMNS, packed.shape[0]), jnp.int8, INTEGERS)


def result(sums: jax.Array) -> jax.Array:
    """What fragments were multiplied to, [128, rows], as [rows, 128] in the order of the weight's columns."""
    rows = sums.shape[1]

    def move(sums: np.ndarray) -> np.ndarray:
        four = ir.VectorType.get((4,), ir.VectorType(sums.flat[0].type).element_type)
        held = sums.reshape(2, rows // 8, 2)  # [a, g, b], two numbers in each, h
        found = np.empty((rows // 8, 2), object)  # [g, h]
        for g, h in np.ndindex(found.shape):
            found[g, h] = vector.from_elements(four, [_element(held[a, g, b], h) for a in (0, 1) for b in (0, 1)])
        return found

    return _moved(move, [sums], FRAGMENTS, (rows, COLUMNS), sums.dtype, BYTES)


def store_rows(out: Any, y: jax.Array, count: Any) -> None:
    """Stores the first `count` rows, or all, of y [rows, 128], held as the packed bytes, of float32 or bfloat16.

    Args:
        out: a reference to [rows, 128] of an array in device memory, of which the rows after those need not be there.
    """
    words = y.dtype.itemsize  # of four numbers

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), BYTES, plgpu.Layout.WG_SPLAT(y.shape)))
    def store(_: Any, out: Any, y: Any, count: Any) -> None:
        word, wide = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        (stride, _), _ = ir.MemRefType(out.type).get_strides_and_offset()

        def number(value: int) -> Any:
            return utils.c(value, word)

        thread = arith.remui(utils.thread_idx(), number(128))
        row = arith.muli(arith.remui(thread, number(4)), number(2))
        column = arith.muli(arith.divui(thread, number(4)), number(4))
        at = arith.addi(arith.muli(row, number(stride)), column)
        start = utils.getelementptr(utils.memref_ptr(out), [arith.extui(wide, at)], y.mlir_dtype)
        values = ",".join(f"${i + 2}" for i in range(words))
        left = arith.subi(count.registers.flat[0], row)
        for (g, h), four in np.ndenumerate(y.registers.reshape(-1, 2)):
            below = 8 * g + h
            to = utils.getelementptr(start, [below * stride], y.mlir_dtype)
            held = utils.bitcast(four, ir.VectorType.get((words,), word))
            given = [left, to, *(_element(held, i) for i in range(words))]
            asm = f"{{ .reg .pred p; setp.gt.s32 p, $0, {below}; @p st.global.v{words}.b32 [$1], {{{values}}}; }}"
            constraints = ",".join(["r", "l", *"r" * words])
            llvm.inline_asm(ir.Type.parse("!llvm.void"), given, asm, constraints, has_side_effects=True)

    call: Any = store
    call(out, y, lax.broadcast(jnp.int32(count), y.shape))


def _moved(
    move: Callable[..., np.ndarray], arrays: list, held: Any, shape: tuple[int, int], dtype: Any, layout: Any
) -> jax.Array:
    """Arrays, all of a layout `held`, as another of another layout, with the registers that `move` makes of theirs."""
    declared = layout.to_mgpu()

    @plgpu.inline_mgpu(arg_types=(held,) * len(arrays), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout))
    def moved(_: Any, *arrays: Any) -> Any:
        registers = move(*(a.registers for a in arrays)).reshape(declared.registers_shape(shape))
        signed = True if jnp.issubdtype(dtype, jnp.integer) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=declared, _is_signed=signed)

    call: Any = moved  # JAX gives it its own first argument
    return call(*arrays)


def _number(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _swapped() -> Any:
    """What is to be flipped in a selection of two words' bytes if this lane has the words in the other order."""
    upper = arith.andi(utils.thread_idx(), _number(2))  # of a warp's 32 lanes, 4 q + t, those with t above 1
    return arith.muli(upper, _number(0x2222))


def _vector(register: Any, element: Any, length: int) -> Any:
    return utils.bitcast(register, ir.VectorType.get((length,), element))


def _element(register: Any, i: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
