"""Carriers: machine numbers that hold a weight's value exactly, made from packed codes by masks and shifts.

A byte of a carrier consists of fields of the code, each moved to its place. Four bytes are worked on at once, as one
32-bit word, so that eight codes cost 2 to 9 operations, and nothing is looked up or converted:

| codes                            | carrier           | how                             | carrier               |
|----------------------------------|-------------------|---------------------------------|-----------------------|
| int4, two's complement           | int8              | code << 4                       | code * 16             |
| uint4                            | int8              | (code ^ 8) << 4                 | (code - 8) * 16       |
| uint4                            | e4m3              | code; below 8 it is subnormal   | code * smallest       |
| int4                             | e4m3              | code ^ 8                        | (code + 8) * smallest |
| E2M1, E1M2, E3M0: sign-magnitude | e5m2, e4m3fn      | sign << 4, rest << m - M        | element * 2**(B - b)  |

A float's exponent lands in the carrier's, subnormals among subnormals, so that only the exponents' biases differ:
m and b are the carrier's mantissa bits and bias. So it is with e4m3fn and e4m3b11fnuz, but for the negative zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import Float, Int
from jaxq.kernels.layout import unpack_codes


@dataclass(frozen=True)
class Carrier:
    """How a weight becomes a machine number: `carrier = (value + offset) * unit`, exactly.

    Args:
        dtype: of the machine number.
        fields: (mask, shift) of the parts of a 4-bit code; `(code ^ flip) & mask` moves left by `shift`.
        unit: a power of two.
        flip: bits of the code that are inverted first: 8 takes int4 to uint4, and back, at an offset of +-8.
        offset: what the flip adds to a code's value.
    """

    dtype: Any
    fields: tuple[tuple[int, int], ...]
    unit: float
    flip: int = 0
    offset: int = 0

    def halves(self, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The carriers' bytes of the low and the high nibbles of int32 words of any shape, as int32 words."""
        if self.flip:
            words = words ^ _everywhere(self.flip * 17)
        low = [(words << shift) & _everywhere(mask << shift) for mask, shift in self.fields]
        high = [(words >> (4 - shift)) & _everywhere(mask << shift) for mask, shift in self.fields]
        return sum(low[1:], low[0]), sum(high[1:], high[0])

    def of_codes(self, codes: jax.Array) -> jax.Array:
        """The plain meaning: carriers of codes, uint8 of any shape with values below 16."""
        fields = [((codes ^ jnp.uint8(self.flip)) & jnp.uint8(mask)) << shift for mask, shift in self.fields]
        return jax.lax.bitcast_convert_type(sum(fields[1:], fields[0]), self.dtype)

    def of_numbers(self, numbers: jax.Array) -> jax.Array:
        """The plain meaning: carriers of numbers of 8 bits, as in `number_carrier`."""
        if numbers.dtype == jnp.int8:
            return numbers.astype(self.dtype)
        if self.dtype != jnp.float8_e4m3b11fnuz:
            return jax.lax.bitcast_convert_type(numbers, self.dtype)
        values = jax.lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn).astype(jnp.float32)
        return (values * self.unit).astype(self.dtype)

    def of_packed(self, packed: jax.Array, k: int) -> jax.Array:
        """The plain meaning: carriers [k, N] of packed codes, uint8 [ceil(k/2), N]."""
        return self.of_codes(unpack_codes((packed,), 4, k))


def _everywhere(byte: int) -> jax.Array:
    """A byte in all four of a word."""
    return jnp.int32(int.from_bytes(bytes([byte]) * 4, "little", signed=True))


def int8_carrier(fmt: Int) -> Carrier:
    """4-bit integers for a product with int8 activations."""
    return Carrier(jnp.int8, ((15, 4),), 16.0, *((0, 0) if fmt.symmetric else (8, -8)))


def float_carrier(fmt: Int | Float, dtype: Any) -> Carrier:
    """4-bit integers or floats for a product with bfloat16 or 8-bit float activations.

    Integers become unsigned ones of 4 bits, which the four significant bits of an e4m3 hold: the product has their
    offset taken off by the activation's row sums, as for any zero point.

    Args:
        dtype: the machine's 8-bit float: e5m2 (not for integers), e4m3fn or e4m3b11fnuz (not for floats: a code of
            negative zero would be its NaN).

    Raises:
        ValueError: the format is not one of 4 bits, or the dtype cannot hold it.
    """
    info = jnp.finfo(dtype)
    smallest = 2.0 ** (info.minexp - info.nmant)  # the value of the byte 1
    if isinstance(fmt, Int) and fmt.bits == 4 and info.nmant == 3:
        return Carrier(dtype, ((15, 0),), smallest, *((8, 8) if fmt.symmetric else (0, 0)))
    if isinstance(fmt, Float) and fmt.bits == 4 and jnp.dtype(dtype) != jnp.float8_e4m3b11fnuz:
        shift = info.nmant - fmt.mantissa_bits
        return Carrier(dtype, ((8, 4), (7, shift)), 2.0 ** (info.minexp - (1 - fmt.bias)))
    raise ValueError(f"{fmt} has no carrier in {np.dtype(dtype).name}: 4-bit integers have one in e4m3, floats in e5m2")


def number_carrier(numbers: Any, activations: Any, e4m3: Any) -> Carrier:
    """Numbers of 8 bits for a product with activations of a dtype.

    Args:
        numbers: int8, which are there as such, or e4m3fn or e5m2, which are there as uint8.
        e4m3: the machine's own, e4m3fn or e4m3b11fnuz, whose numbers are 16 times smaller.
    """
    if jnp.dtype(numbers) == jnp.int8:
        return Carrier(jnp.int8 if jnp.dtype(activations) == jnp.int8 else jnp.bfloat16, (), 1.0)
    if jnp.dtype(numbers) == jnp.float8_e4m3fn and e4m3 == jnp.float8_e4m3b11fnuz:
        return Carrier(e4m3, (), 2.0**-4)
    return Carrier(numbers, (), 1.0)


def without_negative_zeros(words: jax.Array) -> jax.Array:
    """Signed magnitudes, four in an int32 word, where negative zeros have become positive ones."""
    magnitudes = words & _everywhere(127)
    not_zero = (magnitudes + _everywhere(127)) & _everywhere(128)
    return magnitudes | words & not_zero
