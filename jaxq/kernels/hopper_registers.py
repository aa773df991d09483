"""How a Hopper GPU's registers hold the tiles of `jaxq.kernels.hopper_matmul`, and how they are taken for others; those
of `hopper_many` are in `hopper_columns`.

A warpgroup has four warps of 32 lanes; lane l of warp w is 4 q + t, q below 8 and t below 4. It holds

| tile                    | its registers                                                                              |
|-------------------------|--------------------------------------------------------------------------------------------|
| packed bytes [64, 128]  | of rows 8 g + 2 t + h, four bytes, n = 32 w + 4 q + i                                      |
| pairs [64, 32]          | of rows 32 a + 8 w + q and columns 4 g + t, one word: bytes 2 a and 2 a + 1 of both rows h |
| fragments [128, 64]     | the tensor cores' own: of rows 64 a + 16 w + 8 b + q, columns 8 g + 2 t and the next       |
| x [rows, 64]            | of rows 8 r + q, columns 8 g + 2 t and the next; all warps the same                        |
| result [rows, 128]      | as the packed bytes                                                                        |
| columns [128]           | those of a fragment's rows                                                                 |

So row 64 a + 16 w + 8 b + q of a fragment is column n = 32 w + 4 q + 2 a + b of the weight, and each lane has the bytes
that its fragments are made from: nothing is exchanged between lanes. A pair's low half is the byte of row h = 0 and its
high half that of h = 1, so that a nibble of each is a pair of successive channels of one column.

The functions move registers and compute nothing, but for `less` and `multiplied`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from jaxq.kernels.gpu import COLUMNS

DEPTH = 64  # rows of packed bytes in a warpgroup's tile of COLUMNS columns
BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (8, 32), (2, 4))), warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1
)
PAIRS = plgpu.Layout.TILED(plgpu.Tiling(((32, 4), (8, 4), (1,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
FRAGMENTS = plgpu.Layout.WGMMA
ROWS = FRAGMENTS.reduce(1)
X = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 8), (2,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)


def pairs(packed: jax.Array) -> jax.Array:
    """Packed bytes, uint8 [64, 128], as pairs, int32 [64, 32]."""

    def move(packed: np.ndarray) -> np.ndarray:
        word = ir.IntegerType.get_signless(32)
        found = np.empty((2, DEPTH // 8), object)  # [a, g]
        for g, rows in enumerate(packed.reshape(DEPTH // 8, 2)):  # [g, h]
            first, second = (utils.bitcast(row, word) for row in rows)
            for a, bytes_ in enumerate((0x5410, 0x7632)):  # 0 to 3 are the first's, 4 to 7 the second's
                found[a, g] = as_vector(utils.prmt(first, second, utils.c(bytes_, word)), word, 1)
        return found

    return moved(move, [packed], BYTES, (DEPTH, DEPTH // 2), jnp.int32, PAIRS)


def fragments(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two bfloat16 in each word of pairs, int32 [n / 2, 32], of the bytes b = 0 and 1: as bfloat16 [n, 64]."""

    def move(*words: np.ndarray) -> np.ndarray:
        both = np.stack([w.reshape(-1, DEPTH // 8) for w in words], -1)  # [a, g, b]
        half = ir.BF16Type.get()
        return np.vectorize(lambda word: as_vector(word, half, 2), otypes=[object])(both)

    return moved(move, [first, second], PAIRS, (2 * first.shape[0], DEPTH), jnp.bfloat16, FRAGMENTS)


def result(sums: jax.Array) -> jax.Array:
    """What fragments were multiplied to, [128, rows], as [rows, 128] in the order of the weight's columns."""
    rows = sums.shape[1]

    def move(sums: np.ndarray) -> np.ndarray:
        four = ir.VectorType.get((4,), ir.VectorType(sums.flat[0].type).element_type)
        held = sums.reshape(2, rows // 8, 2)  # [a, g, b], two numbers in each, h
        found = np.empty((rows // 8, 2), object)  # [g, h]
        for g, h in np.ndindex(found.shape):
            found[g, h] = vector.from_elements(four, [element(held[a, g, b], h) for a in (0, 1) for b in (0, 1)])
        return found

    return moved(move, [sums], FRAGMENTS, (rows, COLUMNS), sums.dtype, BYTES)


def columns(numbers: jax.Array) -> jax.Array:
    """A number for each of the weight's columns, float32 [128] as a row of bytes, for each of a fragment's rows."""

    def move(numbers: np.ndarray) -> np.ndarray:
        (four,) = numbers.flat
        one = ir.VectorType.get((1,), ir.F32Type.get())
        found = np.empty((2, 2), object)  # [a, b]
        for a, b in np.ndindex(found.shape):
            found[a, b] = vector.from_elements(one, [element(four, 2 * a + b)])
        return found

    return moved(move, [numbers], BYTES.reduce(0), (COLUMNS,), jnp.float32, ROWS)


def less(numbers: jax.Array, factor: float, taken: Sequence[jax.Array]) -> jax.Array:
    """`numbers * factor - taken` in one operation, bfloat16 [n, 64]; taken off each row is float32 [n], of numbers that
    bfloat16 holds, or as many of these as the 64 channels have groups.

    XLA's and LLVM's own products and differences stay two.
    """

    def move(numbers: np.ndarray, *less: np.ndarray) -> np.ndarray:
        word, half = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        by = utils.c(int(np.float32(factor).view(np.uint32) >> 16) * 0x10001, word)
        found = numbers.reshape(-1, DEPTH // 8, 2).copy()  # [a, g, b]
        for group, a, b in np.ndindex(len(less), len(found), 2):
            one = element(less[group].reshape(-1, 2)[a, b], 0)
            both = assembled("cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", one)
            for g in _part(DEPTH // 8, group, len(less)):
                given = utils.bitcast(found[a, g, b], word)
                fused = assembled("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", given, by, both)
                found[a, g, b] = as_vector(fused, half, 2)
        return found

    layouts = FRAGMENTS, *(ROWS,) * len(taken)
    return moved(move, [numbers, *(-a for a in taken)], layouts, numbers.shape, jnp.bfloat16, FRAGMENTS)


def multiplied(sums: jax.Array, numbers: jax.Array, x: jax.Array, factors: Sequence[jax.Array] = ()) -> jax.Array:
    """`sums + numbers x^T`: float32 [128, rows] of fragments, bfloat16 [128, 64] and x bfloat16 [rows, 64].

    With factors, float32 [128] for each of as many groups of the 64 channels, those of a group are added times these.

    By the instructions of a warp, which multiply 16 columns with 8 rows. Those of a warpgroup seem to take as long for
    8 rows as for many more, and limited the speed at which weights are read.
    """
    rows = sums.shape[1]

    def move(sums: np.ndarray, numbers: np.ndarray, x: np.ndarray, *factors: np.ndarray) -> np.ndarray:
        found, numbers, x = (a.reshape(shape) for a, shape in zip((sums, numbers, x), shapes))
        found = found.copy()
        for group, a, r in np.ndindex(max(len(factors), 1), 2, rows // 8):
            held = [element(found[a, r, b], h) for b in (0, 1) for h in (0, 1)]
            four = [utils.c(0.0, ir.F32Type.get())] * 4 if factors else held
            for j in _part(DEPTH // 16, group, max(len(factors), 1)):
                left = [numbers[a, 2 * j + high, b] for high in (0, 1) for b in (0, 1)]
                four = _multiply_add(four, left, [x[r, 2 * j], x[r, 2 * j + 1]])
            if factors:
                by = [element(factors[group].reshape(2, 2)[a, b], 0) for b in (0, 1)]
                four = [math.fma(part, by[i // 2], held[i]) for i, part in enumerate(four)]
            for b in (0, 1):
                pair = ir.VectorType.get((2,), ir.F32Type.get())
                found[a, r, b] = vector.from_elements(pair, four[2 * b : 2 * b + 2])
        return found

    shapes = (2, rows // 8, 2), (2, DEPTH // 8, 2), (rows // 8, DEPTH // 8)
    layouts = FRAGMENTS, FRAGMENTS, X, *(ROWS,) * len(factors)
    return moved(move, [sums, numbers, x, *factors], layouts, (COLUMNS, rows), jnp.float32, FRAGMENTS)


def _part(length: int, part: int, parts: int) -> range:
    """The indices of one of equal parts."""
    return range(length * part // parts, length * (part + 1) // parts)


def _multiply_add(four: list, left: list, right: list) -> list:
    """One matrix instruction of a warp: four sums."""
    word, number = ir.IntegerType.get_signless(32), ir.F32Type.get()
    given = [*(utils.bitcast(a, word) for a in (*left, *right)), *four]
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    found: Any = llvm.inline_asm(llvm.StructType.get_literal([number] * 4), given, text, constraints)
    return [llvm.extractvalue(number, found, [i]) for i in range(4)]


def store_rows(out: Any, y: jax.Array, count: Any, layout: Any = BYTES) -> None:
    """Stores the first `count` rows, or all, of y [rows, n], of float32 or bfloat16.

    Args:
        out: a reference to [rows, n] of an array in device memory, of which the rows after those need not be there.
        layout: of y: lane 4 q + t of warp w has rows 8 g + 2 t + h and of each 32 c columns c successive ones, the
            8 w + q-th. `BYTES` is that with c = 4.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, plgpu.Layout.WG_SPLAT(y.shape)))
    def store(_: Any, out: Any, y: Any, count: Any) -> None:
        word, wide = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        (stride, _), _ = ir.MemRefType(out.type).get_strides_and_offset()
        (successive,) = ir.VectorType(y.registers.flat[0].type).shape
        words = successive * utils.bitwidth(y.mlir_dtype) // 32

        def number(value: int) -> Any:
            return utils.c(value, word)

        thread = arith.remui(utils.thread_idx(), number(128))
        row = arith.muli(arith.remui(thread, number(4)), number(2))
        column = arith.muli(arith.divui(thread, number(4)), number(successive))
        at = arith.addi(arith.muli(row, number(stride)), column)
        start = utils.getelementptr(utils.memref_ptr(out), [arith.extui(wide, at)], y.mlir_dtype)
        values = ",".join(f"${i + 2}" for i in range(words))
        kind = f"v{words}.b32" if words > 1 else "b32"
        left = arith.subi(count.registers.flat[0], row)
        for (g, a, h), held in np.ndenumerate(y.registers.reshape(y.shape[0] // 8, -1, 2)):
            below = 8 * g + h
            to = utils.getelementptr(start, [below * stride + 32 * successive * a], y.mlir_dtype)
            held = utils.bitcast(held, ir.VectorType.get((words,), word))
            given = [left, to, *(element(held, i) for i in range(words))]
            asm = f"{{ .reg .pred p; setp.gt.s32 p, $0, {below}; @p st.global.{kind} [$1], {{{values}}}; }}"
            constraints = ",".join(["r", "l", *"r" * words])
            llvm.inline_asm(ir.Type.parse("!llvm.void"), given, asm, constraints, has_side_effects=True)

    call: Any = store
    call(out, y, lax.broadcast(jnp.int32(count), y.shape))


def moved(
    move: Callable[..., np.ndarray], arrays: list, held: Any, shape: tuple[int, ...], dtype: Any, layout: Any
) -> jax.Array:
    """Arrays, all of a layout `held` or of one each, as another of another layout, with the registers that `move` makes
    of theirs."""
    declared = layout.to_mgpu()

    @plgpu.inline_mgpu(
        arg_types=held if isinstance(held, tuple) else (held,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
    )
    def made(_: Any, *arrays: Any) -> Any:
        registers = move(*(a.registers for a in arrays)).reshape(declared.registers_shape(shape))
        signed = True if jnp.issubdtype(dtype, jnp.integer) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=declared, _is_signed=signed)

    call: Any = made  # JAX gives it its own first argument
    return call(*arrays)


def assembled(text: str, constraints: str, *given: Any) -> Any:
    """A word that an instruction makes."""
    return llvm.inline_asm(ir.IntegerType.get_signless(32), given, text, constraints)


def as_vector(register: Any, kind: Any, length: int) -> Any:
    return utils.bitcast(register, ir.VectorType.get((length,), kind))


def element(register: Any, i: int) -> Any:
    """A number of a vector."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
