"""How a Hopper GPU's registers hold the tiles of `jaxq.kernels.hopper_matmul`, and how they are taken for others.

A warpgroup has four warps of 32 lanes; lane l of warp w is 4 q + t, q below 8 and t below 4. It holds

| tile                    | its registers                                                                              |
|-------------------------|--------------------------------------------------------------------------------------------|
| packed bytes [64, 128]  | of rows 8 g + 2 t + h, four bytes, n = 32 w + 4 q + i                                      |
| pairs [64, 32]          | of rows 32 a + 8 w + q and columns 4 g + t, one word: bytes 2 a and 2 a + 1 of both rows h |
| fragments [128, 64]     | the tensor cores' own: of rows 64 a + 16 w + 8 b + q, columns 8 g + 2 t and the next       |
| result [rows, 128]      | as the packed bytes                                                                        |

So row 64 a + 16 w + 8 b + q of a fragment is column n = 32 w + 4 q + 2 a + b of the weight, and each lane has the bytes
that its fragments are made from: nothing is exchanged between lanes. A pair's low half is the byte of row h = 0 and its
high half that of h = 1, so that a nibble of each is a pair of successive channels of one column.

The three functions move registers and compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable
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


def pairs(packed: jax.Array) -> jax.Array:
    """Packed bytes, uint8 [64, 128], as pairs, int32 [64, 32]."""

    def move(packed: np.ndarray) -> np.ndarray:
        word = ir.IntegerType.get_signless(32)
        found = np.empty((2, DEPTH // 8), object)  # [a, g]
        for g, rows in enumerate(packed.reshape(DEPTH // 8, 2)):  # [g, h]
            first, second = (utils.bitcast(row, word) for row in rows)
            for a, bytes_ in enumerate((0x5410, 0x7632)):  # 0 to 3 are the first's, 4 to 7 the second's
                found[a, g] = _vector(utils.prmt(first, second, utils.c(bytes_, word)), word, 1)
        return found

    return _moved(move, [packed], BYTES, (DEPTH, DEPTH // 2), jnp.int32, PAIRS)


def fragments(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two bfloat16 in each word of the pairs, int32 [64, 32], of the bytes b = 0 and 1: as bfloat16 [128, 64]."""

    def move(*words: np.ndarray) -> np.ndarray:
        both = np.stack([w.reshape(2, DEPTH // 8) for w in words], -1)  # [a, g, b]
        half = ir.BF16Type.get()
        return np.vectorize(lambda word: _vector(word, half, 2), otypes=[object])(both)

    return _moved(move, [first, second], PAIRS, (COLUMNS, DEPTH), jnp.bfloat16, FRAGMENTS)


def result(sums: jax.Array) -> jax.Array:
    """What fragments were multiplied to, float32 [128, rows], as [rows, 128] in the order of the weight's columns."""
    rows = sums.shape[1]

    def move(sums: np.ndarray) -> np.ndarray:
        four = ir.VectorType.get((4,), ir.F32Type.get())
        held = sums.reshape(2, rows // 8, 2)  # [a, g, b], two numbers in each, h
        found = np.empty((rows // 8, 2), object)  # [g, h]
        for g, h in np.ndindex(found.shape):
            found[g, h] = vector.from_elements(four, [_element(held[a, g, b], h) for a in (0, 1) for b in (0, 1)])
        return found

    return _moved(move, [sums], FRAGMENTS, (rows, COLUMNS), jnp.float32, BYTES)


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


def _vector(register: Any, element: Any, length: int) -> Any:
    return utils.bitcast(register, ir.VectorType.get((length,), element))


def _element(register: Any, i: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
