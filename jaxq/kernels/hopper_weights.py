"""Packed weights as left operands of a Hopper GPU's tensor cores, for products in bfloat16 or in int8.

| product  | codes                      | what is multiplied                              | bytes a step |
|----------|----------------------------|-------------------------------------------------|--------------|
| bfloat16 | all of `expansion`         | value * unit                                    | 64           |
| int8     | int8                       | value                                           | 128          |
|          | int4, uint4                | value * 16: the nibble in the byte's high half  |              |
|          | E2M1, E1M2                 | value in units of its smallest step, plus bias  |              |

A warpgroup takes 128 columns of a step's bytes from shared memory. A float's code is looked up, which byte permutation
does in eight bytes; there is no room for both signs, but there is for what a negative number is and for by how much a
positive one differs, and a code with its sign bit set finds no difference: see `hopper_registers.looked_up`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Float, Int
from jaxq.kernels import hopper_registers as registers
from jaxq.kernels.carrier import int8_carrier
from jaxq.kernels.expansion import expansions, whole_expansions
from jaxq.kernels.gpu import COLUMNS
from jaxq.kernels.plain import largest_integer

MAGNITUDES = {Float(2, 1): (0, 1, 2, 3, 4, 6, 8, 12), Float(1, 2): tuple(range(8))}  # of the codes 0 to 7


@dataclass(frozen=True)
class Weights:
    """How codes are multiplied: a product is `unit * value + bias`, in sums over K.

    Args:
        depth: rows of packed bytes of a step.
        fragments: of a step's packed bytes, a reference to uint8 [depth, 256] in shared memory, and a column: what the
            128 columns from there on are, [128, depth] for each of a byte's codes, made one after the other.
        sums: the dtype that they are added up in.
    """

    depth: int
    fragments: Callable[[Any, Any], Iterator[jax.Array]]
    sums: Any
    unit: float = 1.0
    bias: int = 0


def weights(fmt: Int | Float, dtype: Any) -> Weights:
    """For products with activations of a dtype, bfloat16 or int8.

    Raises:
        ValueError: the format is not among the dtype's in the table above.
    """
    if dtype == jnp.bfloat16:
        return Weights(registers.DEPTH, lambda part, column: _expanded(fmt, part, column), jnp.float32, _unit(fmt))
    if isinstance(fmt, Int) and fmt.bits in (4, 8):
        unit = 16.0 if fmt.bits == 4 else 1.0
        return Weights(2 * registers.DEPTH, lambda part, column: _moved(fmt, part, column), jnp.int32, unit)
    if fmt in MAGNITUDES:
        unit, bias = 2.0 ** (fmt.bias - 1 + fmt.mantissa_bits), largest_integer(fmt)
        return Weights(2 * registers.DEPTH, lambda part, column: _found(fmt, part, column), jnp.int32, unit, bias)
    raise ValueError(f"{fmt} is not multiplied in int8: integers of 4 and 8 bits are, E2M1 and E1M2")


def _unit(fmt: Int | Float) -> float:
    return expansions(fmt)[0].unit


def _expanded(fmt: Int | Float, part: Any, column: Any) -> Iterator[jax.Array]:
    words = registers.pairs(plgpu.layout_cast(part[:, pl.ds(column, COLUMNS)], registers.BYTES))
    for expansion in whole_expansions(fmt):
        yield expansion.expanded(words, registers.fragments)


def _moved(fmt: Int, part: Any, column: Any) -> Iterator[jax.Array]:
    words = registers.quads(registers.deep_bytes(part.at[:, pl.ds(column, COLUMNS)]))
    for half in (words,) if fmt.bits == 8 else int8_carrier(fmt).halves(words):
        yield registers.integers(half)


def _found(fmt: Float, part: Any, column: Any) -> Iterator[jax.Array]:
    packed = registers.deep_bytes(part.at[:, pl.ds(column, COLUMNS)])
    bias = largest_integer(fmt)
    yield from registers.looked_up(packed, [(bias + v, bias - v) for v in MAGNITUDES[fmt]])
