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

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

COLUMNS, DEPTH = 128, 64  # of a warpgroup's tile: columns of the weight, and rows of its packed bytes
BYTES = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (8, 32), (2, 4))), warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-1
)
PAIRS = plgpu.Layout.TILED(plgpu.Tiling(((32, 4), (8, 4), (1,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
FRAGMENTS = plgpu.Layout.WGMMA


def pairs(packed: jax.Array) -> Any:
    """Packed bytes, uint8 [64, 128], as pairs, int32 [64, 32]."""

    @plgpu.inline_mgpu(
        arg_types=(BYTES,), return_type=plgpu.ShapeDtypeStruct((DEPTH, DEPTH // 2), jnp.int32, layout=PAIRS)
    )
    def moved(ctx: Any, packed: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        rows = packed.registers.reshape(DEPTH // 8, 2)  # [g, h]
        found = np.empty((2, DEPTH // 8), object)  # [a, g]
        for g, (low, high) in enumerate(rows):
            low, high = utils.bitcast(low, word), utils.bitcast(high, word)
            for a, bytes_ in enumerate((0x5410, 0x7632)):
                found[a, g] = _vector(utils.prmt(low, high, utils.c(bytes_, word)), word, 1)
        return _array(found, (DEPTH, DEPTH // 2), PAIRS, signed=True)

    return moved(packed)


def fragments(first: jax.Array, second: jax.Array) -> Any:
    """Two bfloat16 in each word of the pairs, int32 [64, 32], of the bytes b = 0 and 1: as bfloat16 [128, 64]."""

    @plgpu.inline_mgpu(
        arg_types=(PAIRS, PAIRS), return_type=plgpu.ShapeDtypeStruct((COLUMNS, DEPTH), jnp.bfloat16, layout=FRAGMENTS)
    )
    def moved(ctx: Any, first: Any, second: Any) -> Any:
        half = ir.BF16Type.get()
        words = np.stack([a.registers.reshape(2, DEPTH // 8) for a in (first, second)], -1)  # [a, g, b]
        return _array(_each(lambda word: _vector(word, half, 2), words), (COLUMNS, DEPTH), FRAGMENTS)

    return moved(first, second)


def result(sums: jax.Array) -> Any:
    """What fragments were multiplied to, float32 [128, rows], as [rows, 128] in the order of the weight's columns."""
    rows = sums.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(FRAGMENTS,), return_type=plgpu.ShapeDtypeStruct((rows, COLUMNS), jnp.float32, layout=BYTES)
    )
    def moved(ctx: Any, sums: Any) -> Any:
        four = ir.VectorType.get((4,), ir.F32Type.get())
        held = sums.registers.reshape(2, rows // 8, 2)  # [a, g, b], two numbers in each, h
        found = np.empty((rows // 8, 2), object)  # [g, h]
        for g, h in np.ndindex(found.shape):
            found[g, h] = vector.from_elements(four, [_element(held[a, g, b], h) for a in (0, 1) for b in (0, 1)])
        return _array(found, (rows, COLUMNS), BYTES)

    return moved(sums)


def _array(registers: np.ndarray, shape: tuple[int, int], layout: Any, signed: bool | None = None) -> Any:
    layout = layout.to_mgpu()
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def _each(f: Any, registers: np.ndarray) -> np.ndarray:
    return np.vectorize(f, otypes=[object])(registers)


def _vector(register: Any, element: Any, length: int) -> Any:
    return utils.bitcast(register, ir.VectorType.get((length,), element))


def _element(register: Any, i: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
