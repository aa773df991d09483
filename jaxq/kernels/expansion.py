"""Expansions: bfloat16 numbers made from 4-bit codes by masks, shifts and one exact operation of bfloat16.

Pairs of codes, one in each half of a 32-bit word, are worked on at once:

| codes                            | bits of the bfloat16                | then      |
|----------------------------------|-------------------------------------|-----------|
| int4, two's complement           | those of 128, ^ code ^ 8            | less 136  |
| uint4                            | those of 128, ^ code                | less 136  |
| E2M1, E1M2, E3M0: sign-magnitude | sign << 12, rest << 7 - M           | * 2**126  |

A float's exponent lands in the bfloat16's, subnormals among subnormals; the factor makes the smallest normal one 1.
Unlike the 8-bit carriers of `jaxq.kernels.carrier` these are what every matrix unit with bfloat16 multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp

from jaxq.formats import Float, Int, decode


@dataclass(frozen=True)
class Expansion:
    """How a 4-bit code becomes a bfloat16: `number = code's value * unit`, exactly.

    Args:
        fields: (mask, shift) of the parts of a code, `code & mask` moves left by `shift`.
        flip: bits that are inverted then.
        less, factor: what is taken off the bfloat16 of these bits, and what it is multiplied by.
        unit: a power of two. An asymmetric integer's value here is its code less 8.
    """

    fields: tuple[tuple[int, int], ...]
    flip: int = 0
    less: float = 0.0
    factor: float = 1.0
    unit: float = 1.0

    def bits(self, words: jax.Array, nibble: int) -> jax.Array:
        """The bits of two bfloat16, of the codes in a nibble, 0 to 3, of both halves of int32 words of any shape."""
        moved = [_left(words, shift - 4 * nibble) & _both(mask << shift) for mask, shift in self.fields]
        bits = reduce(or_, moved)
        return bits ^ _both(self.flip) if self.flip else bits

    def finish(self, numbers: jax.Array) -> jax.Array:
        """The numbers, bfloat16 of any shape, that `bits` are before the last operation."""
        if self.less:
            numbers = numbers - jnp.bfloat16(self.less)
        return numbers * jnp.bfloat16(self.factor) if self.factor != 1 else numbers


def expansion(fmt: Int | Float) -> Expansion:
    """Of a format of 4 bits.

    Raises:
        ValueError: the format is not one of 4 bits.
    """
    if isinstance(fmt, Int) and fmt.bits == 4:
        return Expansion(((15, 0),), flip=0x4308 if fmt.symmetric else 0x4300, less=136.0)
    if isinstance(fmt, Float) and fmt.bits == 4:
        rest = (7, 7 - fmt.mantissa_bits)
        return Expansion(((8, 12), rest), factor=2.0**126, unit=2.0 ** (fmt.bias - 1))
    raise ValueError(f"{fmt} is not a format of 4 bits; `jaxq.kernels.plain` multiplies any")


def code_values(fmt: Int | Float, codes: jax.Array) -> jax.Array:
    """The plain meaning: what codes, uint8 of any shape with values below 16, stand for at scale 1, float32."""
    if isinstance(fmt, Float):
        return decode(fmt, codes, jnp.ones((1,) * codes.ndim))
    return (codes ^ jnp.uint8(8 * fmt.symmetric)).astype(jnp.float32) - 8


def _left(words: jax.Array, shift: int) -> jax.Array:
    """Bits that come from another half are masked off by the caller."""
    if shift == 0:
        return words
    return words << shift if shift > 0 else words >> -shift


def _both(half: int) -> jax.Array:
    """Sixteen bits in both halves of a word."""
    word = half * 0x10001
    return jnp.int32(word - 2**32 if word >= 2**31 else word)
