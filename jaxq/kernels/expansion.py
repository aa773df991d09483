"""Expansions: bfloat16 numbers made from codes of 4 or 8 bits by masks, shifts and one fused multiply-add of bfloat16.

Pairs of codes, one in each half of a 32-bit word, are worked on at once:

| codes                      | bits of the bfloat16              | times               | less                |
|----------------------------|-----------------------------------|---------------------|---------------------|
| integers, their sign bit   | code, or code << 4: all numbers   | 2**127, or          | what stands for 0,  |
| inverted                   | below 2**8 are so many 2**-133    | 2**123              | times 2**-6         |
| floats: sign and magnitude | sign << 15, rest << 7 - M         | 2**126              | 0                   |

A float's exponent lands in the bfloat16's, subnormals among subnormals; the factor makes the smallest normal one 1.
Unlike the 8-bit carriers of `jaxq.kernels.carrier` these are what every matrix unit with bfloat16 multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp

from jaxq.formats import Float, Int, decode
from jaxq.kernels.layout import unpack_codes

WIDEST_EXPONENT = 5  # of a float: sums of numbers with wider ones may overflow


@dataclass(frozen=True)
class Expansion:
    """How a code becomes a bfloat16: `bits * factor - less = value * unit`, exactly.

    Args:
        fields: (mask, shift) of the parts of a code, `code & mask` moves left by `shift`.
        factor: what the bfloat16 of these bits is multiplied by.
        place: of the code's lowest bit in its byte.
        flip: bits of all bytes that are inverted first.
        middle: the (inverted) code that stands for 0, unless a zero point says another.
        unit: a power of two.
    """

    fields: tuple[tuple[int, int], ...]
    factor: float
    place: int = 0
    flip: int = 0
    middle: int = 0
    unit: float = 1.0

    @property
    def less(self) -> float:
        """What is taken off."""
        return self.middle * self.unit

    def flipped(self, words: jax.Array) -> jax.Array:
        """int32 words of packed bytes, of any shape, as `bits` takes them."""
        return words ^ _word(self.flip * 0x1010101) if self.flip else words

    def bits(self, words: jax.Array, byte: int) -> jax.Array:
        """The bits of two bfloat16, of the codes in a byte, 0 or 1, of both halves of int32 words of any shape."""
        code, taken = sum(mask for mask, _ in self.fields), sum(mask << shift for mask, shift in self.fields)
        if len(self.fields) > 1 and code < 16:  # a product has copies of a code side by side: fewer instructions
            copies = sum(1 << shift - self.place for _, shift in self.fields)
            return (_left(words, -8 * byte) & _both(code << self.place)) * jnp.int32(copies) & _both(taken)
        at = 8 * byte + self.place
        return reduce(or_, [_left(words, shift - at) & _both(mask << shift) for mask, shift in self.fields])


def expansions(fmt: Int | Float) -> tuple[Expansion, ...]:
    """Of the codes of a byte: of two of 4 bits, the low one first, or of one of 8 bits.

    Raises:
        ValueError: there are none for the format.
    """
    if isinstance(fmt, Int) and fmt.bits == 4:
        flip = 0x88 if fmt.symmetric else 0
        low = Expansion(((15, 0),), 2.0**127, flip=flip, middle=8, unit=2.0**-6)
        return low, replace(low, fields=((15, 4),), factor=2.0**123, place=4)
    if isinstance(fmt, Int) and fmt.bits == 8:  # as they are packed: two's complement
        return (Expansion(((255, 0),), 2.0**127, flip=0x80, middle=128, unit=2.0**-6),)
    if isinstance(fmt, Float) and fmt.bits in (4, 8) and fmt.exponent_bits <= WIDEST_EXPONENT:
        sign = 2 ** (fmt.bits - 1)
        fields = ((sign, 16 - fmt.bits), (sign - 1, 7 - fmt.mantissa_bits))
        code = Expansion(fields, 2.0**126, unit=2.0 ** (fmt.bias - 1))
        return (code, replace(code, place=4)) if fmt.bits == 4 else (code,)
    raise ValueError(f"{fmt} has no expansion: formats of 4 and 8 bits do, floats with up to 5 bits of exponent")


def code_values(fmt: Int | Float, codes: jax.Array) -> jax.Array:
    """The plain meaning: what codes, uint8 of any shape, as they are packed, stand for at scale 1, float32."""
    if isinstance(fmt, Float):
        return decode(fmt, codes, jnp.ones((1,) * codes.ndim))
    middle = 2 ** (fmt.bits - 1)
    flipped = codes ^ jnp.uint8(middle) if fmt.symmetric or fmt.bits == 8 else codes
    return flipped.astype(jnp.float32) - middle


def packed_values(fmt: Int | Float, packed: jax.Array, k: int) -> jax.Array:
    """Of packed codes, uint8 [K * bits / 8, N]: float32 [K, N]."""
    return code_values(fmt, unpack_codes((packed,), fmt.bits, k))


def _left(words: jax.Array, shift: int) -> jax.Array:
    """Bits that come from another half are masked off by the caller."""
    if shift == 0:
        return words
    return words << shift if shift > 0 else words >> -shift


def _both(half: int) -> jax.Array:
    """Sixteen bits in both halves of a word."""
    return _word(half * 0x10001)


def _word(bits: int) -> jax.Array:
    return jnp.int32(bits - 2**32 if bits >= 2**31 else bits)
