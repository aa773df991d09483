"""Packed weights as left operands of a Hopper GPU's tensor cores, for products in bfloat16 or in int8.

| product  | codes            | what is multiplied                             | bytes at once | ns: at all, a row |
|----------|------------------|------------------------------------------------|---------------|-------------------|
| bfloat16 | int4, uint4      | value * unit: see `expansion`                  | 64            | 140, 3.6          |
|          | floats of 4 bits |                                                | 64            | 198, 3.5          |
|          | of 8 bits        |                                                | 64            | 124, 1.6          |
| int8     | int8             | value                                          | 128           | 164, 1.45         |
|          | int4, uint4      | value * 16: the nibble in the byte's high half | 128           | 140, 3.6          |
|          | E2M1, E1M2       | value in units of its smallest step, plus bias | 128           | 480, 3.1          |

The nanoseconds are of a block with 64 columns a warpgroup, fitted, as those in `hopper_tiles.tiles`, to 430 times on an
H200, of 1 to 8192 rows and up to 8192 x 28672 weights.

A float's code is looked up, which byte permutation does in eight bytes; there is no room for both signs, but there is
for what a negative number is and for by how much a positive one differs, and a code with its sign bit set finds no
difference: see `hopper_bytes.looked_up`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Float, Int
from jaxq.kernels import hopper_bytes as in_int8
from jaxq.kernels import hopper_columns as columns
from jaxq.kernels import hopper_registers as registers
from jaxq.kernels.carrier import int8_carrier
from jaxq.kernels.expansion import expansions
from jaxq.kernels.hopper_registers import DEPTH
from jaxq.kernels.plain import largest_integer

MAGNITUDES = {Float(2, 1): (0, 1, 2, 3, 4, 6, 8, 12), Float(1, 2): tuple(range(8))}  # of the codes 0 to 7


Zeros = Sequence[Sequence[jax.Array]] | None


@dataclass(frozen=True)
class Weights:
    """How codes are multiplied: a product is `unit * value + bias`, in sums over K.

    Args:
        depth: rows of packed bytes that are expanded at once.
        fragments: of these, a reference to uint8 [depth, 128 s] in shared memory, and zeros: what this warpgroup's
            columns of them are, [64 s, depth] for each of a byte's codes, made one after the other. The zeros are, for
            each of these codes, what is taken off when it is expanded, times the unit: float32 [64 s] for as many
            groups as the channels have; or None.
        sums: the dtype that they are added up in.
        ns: that this takes, and each row of x in it.
    """

    depth: int
    fragments: Callable[[Any, Zeros], Iterator[jax.Array]]
    sums: Any
    ns: tuple[float, float]
    unit: float = 1.0
    bias: int = 0


def weights(fmt: Int | Float, dtype: Any) -> Weights:
    """For products with activations of a dtype, bfloat16 or int8.

    Raises:
        ValueError: the format is not among the dtype's in the table above.
    """
    if dtype == jnp.bfloat16:
        ns = (124, 1.6) if fmt.bits == 8 else (140, 3.6) if isinstance(fmt, Int) else (198, 3.5)
        return Weights(DEPTH, partial(_expanded, fmt), jnp.float32, ns, expansions(fmt)[0].unit)
    deep = 2 * DEPTH
    if isinstance(fmt, Int) and fmt.bits == 8:
        return Weights(deep, partial(_moved, fmt), jnp.int32, (164, 1.45))
    if isinstance(fmt, Int) and fmt.bits == 4:
        return Weights(deep, partial(_moved, fmt), jnp.int32, (140, 3.6), 16.0)
    if fmt in MAGNITUDES:
        unit, bias = 2.0 ** (fmt.bias - 1 + fmt.mantissa_bits), largest_integer(fmt)
        return Weights(deep, partial(_found, fmt), jnp.int32, (480, 3.1), unit, bias)
    raise ValueError(f"{fmt} is not multiplied in int8: integers of 4 and 8 bits are, E2M1 and E1M2")


def _expanded(fmt: Int | Float, part: Any, zeros: Zeros) -> Iterator[jax.Array]:
    made = expansions(fmt)
    held = made[0].flipped(columns.words(part))
    for code, e in enumerate(made):
        bits = registers.fragments(e.bits(held, 0), e.bits(held, 1))
        if e.less:
            middle = jnp.full((bits.shape[0],), e.less)
            taken = zeros[code] if zeros else [plgpu.layout_cast(middle, registers.ROWS)]
            yield registers.less(bits, e.factor, taken)
        else:
            yield bits * jnp.bfloat16(e.factor)


def _moved(fmt: Int, part: Any, _: Any) -> Iterator[jax.Array]:
    words = in_int8.quads(part)
    for half in (words,) if fmt.bits == 8 else int8_carrier(fmt).halves(words):
        yield in_int8.integers(half)


def _found(fmt: Float, part: Any, _: Any) -> Iterator[jax.Array]:
    bias = largest_integer(fmt)
    yield from in_int8.looked_up(part, [(bias + v, bias - v) for v in MAGNITUDES[fmt]])
