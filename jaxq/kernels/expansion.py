"""Expansions: bfloat16 numbers made from codes of 4 or 8 bits by masks, shifts and an exact operation of bfloat16.

Pairs of codes, one in each half of a 32-bit word, are worked on at once:

| codes                         | bits of the bfloat16                | then            |
|-------------------------------|-------------------------------------|-----------------|
| int4, two's complement        | those of 128, ^ code ^ 8            | less 136        |
| uint4                         | those of 128, ^ code                | less 136        |
| int8: two numbers, its halves | of the low one those of 128, ^ half | less 128        |
|                               | of the high one as an int4's        | less 136, * 16  |
| floats: sign and magnitude    | sign << 15, rest << 7 - M           | * 2**126        |

A float's exponent lands in the bfloat16's, subnormals among subnormals; the factor makes the smallest normal one 1.
Unlike the 8-bit carriers of `jaxq.kernels.carrier` these are what every matrix unit with bfloat16 multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """How a code, or half of one, becomes a bfloat16: `number = value * unit`, exactly.

    Args:
        fields: (mask, shift) of the parts of a code, `code & mask` moves left by `shift`.
        place: of the code's lowest bit in its byte.
        flip: bits that are inverted then.
        less, factor: what is taken off the bfloat16 of these bits, and what it is multiplied by.
        base: what is taken off them depends on the code: it is the bfloat16 of this expansion's bits.
        unit: a power of two. An asymmetric 4-bit integer's value here is its code less 8.
    """

    fields: tuple[tuple[int, int], ...]
    place: int = 0
    flip: int = 0
    less: float = 0.0
    factor: float = 1.0
    unit: float = 1.0
    base: Expansion | None = None

    def bits(self, words: jax.Array, byte: int) -> jax.Array:
        """The bits of two bfloat16, of the codes in a byte, 0 or 1, of both halves of int32 words of any shape."""
        at = 8 * byte + self.place
        moved = [_left(words, shift - at) & _both(mask << shift) for mask, shift in self.fields]
        bits = reduce(or_, moved)
        return bits ^ _both(self.flip) if self.flip else bits

    def finish(self, numbers: jax.Array) -> jax.Array:
        """The numbers, bfloat16 of any shape, that `bits` are before the last operation."""
        if self.less:
            numbers = numbers - jnp.bfloat16(self.less)
        return numbers * jnp.bfloat16(self.factor) if self.factor != 1 else numbers

    def expanded(self, words: jax.Array, numbers: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        """The numbers of words as `bits` takes them; `numbers` are the bfloat16 of the bits of both bytes."""
        found = numbers(self.bits(words, 0), self.bits(words, 1))
        if self.base is not None:
            found = found - numbers(self.base.bits(words, 0), self.base.bits(words, 1))
        return self.finish(found)


def expansions(fmt: Int | Float) -> tuple[Expansion, ...]:
    """Of a byte: of its two codes of 4 bits, the low one first; or of a code of 8 bits, whose value is the sum.

    Raises:
        ValueError: there are none for the format.
    """
    if isinstance(fmt, Int) and fmt.bits == 4:
        code = Expansion(((15, 0),), flip=0x4308 if fmt.symmetric else 0x4300, less=136.0)
        return code, replace(code, place=4)
    if isinstance(fmt, Int) and fmt.bits == 8:
        low, high = Expansion(((15, 0),), flip=0x4300, less=128.0), Expansion(((15, 0),), flip=0x4308, less=136.0)
        return low, replace(high, place=4, factor=16.0)
    if isinstance(fmt, Float) and fmt.bits in (4, 8) and fmt.exponent_bits <= WIDEST_EXPONENT:
        sign = 2 ** (fmt.bits - 1)
        fields = ((sign, 16 - fmt.bits), (sign - 1, 7 - fmt.mantissa_bits))
        code = Expansion(fields, factor=2.0**126, unit=2.0 ** (fmt.bias - 1))
        return (code, replace(code, place=4)) if fmt.bits == 4 else (code,)
    raise ValueError(f"{fmt} has no expansion: formats of 4 and 8 bits do, floats with up to 5 bits of exponent")


def whole_expansions(fmt: Int | Float) -> tuple[Expansion, ...]:
    """As `expansions`, but one of a code of 8 bits."""
    if isinstance(fmt, Int) and fmt.bits == 8:
        return (Expansion(((127, 0),), flip=0x4300, base=Expansion(((128, 0),), flip=0x4300)),)
    return expansions(fmt)


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
    word = half * 0x10001
    return jnp.int32(word - 2**32 if word >= 2**31 else word)
