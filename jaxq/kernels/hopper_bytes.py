"""Packed weights in a Hopper GPU's registers for products in int8: as `jaxq.kernels.hopper_columns`, for bytes.

| tile                    | its registers                                                                         |
|-------------------------|---------------------------------------------------------------------------------------|
| quads [64 s, depth / 4] | of rows 64 a + 16 w + 8 b + q, word 4 g + t: four successive rows of bytes, one column |
| integers [64 s, depth]  | the tensor cores' own: as the quads, four of a row in each word                        |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from jaxq.kernels.hopper_columns import SLICE, number, words
from jaxq.kernels.hopper_registers import PAIRS, as_vector, assembled, moved

QUADS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
INTEGERS = plgpu.Layout.WGMMA_8BIT
# As `hopper_columns.IN_ORDER`: two successive words have four successive rows, 0, 1 and 2, 3 or, for codes to be looked
# up, 0, 2 and 1, 3; lanes with t above 1 have these words in the other order.
BY_BYTES, BY_NIBBLES = (1, 4, 10, 2, 16), (2, 4, 9, 1, 16)
EVEN, ODD = 0x6420, 0x7531  # of two words, the bytes of the first column, and of the second


def quads(part: Any) -> jax.Array:
    """This warpgroup's columns of packed bytes, `hopper_columns.words`'s `part`, as int32 [64 s, depth / 4]."""

    def move(words: np.ndarray) -> np.ndarray:
        pairs = words.reshape(part.shape[1] // (2 * SLICE), -1, 2)  # [a, g, two words]
        flip = arith.muli(_upper(), number(0x4444))
        chosen = [arith.xori(number(bytes_), flip) for bytes_ in (EVEN, ODD)]
        found = np.empty(pairs.shape, object)  # [a, g, b]
        for a, g, b in np.ndindex(found.shape):
            first, second = map(_word, pairs[a, g])
            found[a, g, b] = as_vector(utils.prmt(first, second, chosen[b]), _i32(), 1)
        return found

    found = words(part, BY_BYTES)
    return moved(move, [found], PAIRS, (2 * found.shape[0], found.shape[1] // 2), jnp.int32, QUADS)


def integers(words: jax.Array) -> jax.Array:
    """Quads, int32 [64 s, depth / 4], as the int8 [64 s, depth] that are in them."""
    byte, shape = partial(ir.IntegerType.get_signless, 8), (words.shape[0], 4 * words.shape[1])

    def move(words: np.ndarray) -> np.ndarray:
        return np.vectorize(lambda word: as_vector(word, byte(), 4), otypes=[object])(words)

    return moved(move, [words], QUADS, shape, jnp.int8, INTEGERS)


def looked_up(part: Any, values: Sequence[tuple[int, int]]) -> Iterator[jax.Array]:
    """Of packed codes of 4 bits, `hopper_columns.words`'s `part`: the integers that the low ones stand for, then those
    of the high ones, int8 [64 s, depth].

    A byte permutation takes four nibbles as indices into eight bytes; with its highest bit set, a nibble gives eight
    times that byte's sign, which is 0 here.

    Args:
        values: of the codes 0 to 7 and of those with the sign bit set, from 0 to 127.
    """
    tables = [bytes(table) for table in zip(*((p ^ n, n) for p, n in values))]

    def nibbles(high: bool, first: Any, second: Any) -> Any:
        """Of each byte, the first's nibble below the second's; those of a column come to the same half of the word."""
        low, above = (arith.shrui(first, number(4)), second) if high else (first, arith.shli(second, number(4)))
        both = assembled("lop3.b32 $0, $1, $2, $3, 0xe4;", "=r,r,r,r", low, above, number(0x0F0F0F0F))  # 1: the first's
        return utils.prmt(both, both, number(0x3120))

    def move(high: bool, words: np.ndarray) -> np.ndarray:
        pairs = words.reshape(part.shape[1] // (2 * SLICE), -1, 2)  # [a, g, two words]
        upper = arith.cmpi(arith.CmpIPredicate.ne, _upper(), number(0))
        (x0, x4), (n0, n4) = ((_kept(table[:4]), _kept(table[4:])) for table in tables)
        found = np.empty(pairs.shape, object)  # [a, g, b]
        for a, g in np.ndindex(found.shape[:2]):
            first, second = map(_word, pairs[a, g])
            both = nibbles(high, arith.select(upper, second, first), arith.select(upper, first, second))
            for b in (0, 1):
                codes = arith.shrui(both, number(16)) if b else both
                unsigned = arith.andi(codes, number(0x7777))
                integers = arith.xori(utils.prmt(x0, x4, codes), utils.prmt(n0, n4, unsigned))
                found[a, g, b] = as_vector(integers, ir.IntegerType.get_signless(8), 4)
        return found

    held = words(part, BY_NIBBLES)
    shape = 2 * held.shape[0], 2 * held.shape[1]
    for high in (False, True):
        yield moved(partial(move, high), [held], PAIRS, shape, jnp.int8, INTEGERS)


def _kept(bytes_: bytes) -> Any:
    """Four bytes in a register. A constant would be in those that a warp shares, and be moved from there for each byte
    permutation; so the compiler is not to see that this is one: there is one block along y."""
    word = number(int.from_bytes(bytes_, "little", signed=True))
    return arith.addi(word, arith.muli(utils.thread_idx(), assembled("mov.u32 $0, %ctaid.y;", "=r")))


def _word(register: Any) -> Any:
    return utils.bitcast(register, _i32())


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _upper() -> Any:
    """1 in lanes 4 q + t with t above 1."""
    return arith.andi(arith.shrui(utils.thread_idx(), number(1)), number(1))
