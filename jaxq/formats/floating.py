"""Floating-point numbers of few bits: `value = sign * element * scale`, where the scale *is* the exponent bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats.division import divide, ratio

SMALLEST_NORMAL = -126  # the exponent of float32's; smaller numbers may be flushed to zero
LARGEST_POWER = 127.99999  # float32's largest number is 2**128, nearly


class _SignAndMagnitude:
    """What all floats have in common."""

    symmetric: ClassVar[bool] = True
    code_dtype: ClassVar[np.dtype] = np.dtype(np.uint8)


@dataclass(frozen=True)
class Float(_SignAndMagnitude):
    """Floats of 3 to 8 bits: a sign, `exponent_bits` E >= 1 and `mantissa_bits` M >= 0, with subnormals.

    The elements at scale 1 have IEEE's exponent bias, B = 2**(E - 1) - 1:

        p = 0:  +- (k / 2**M) * 2**(1 - B)          subnormal; k = 0 .. 2**M - 1
        p > 0:  +- (1 + k / 2**M) * 2**(p - B)      p = 1 .. 2**E - 1

    | format | B  | the largest | elements from zero on                            | as in ml_dtypes                  |
    |--------|----|-------------|--------------------------------------------------|----------------------------------|
    | E1M2   | 0  | 3.5         | 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5                   |                                  |
    | E2M1   | 1  | 6           | 0, 0.5, 1, 1.5, 2, 3, 4, 6                       | float4_e2m1fn                    |
    | E3M0   | 3  | 16          | 0, 0.25, 0.5, 1, 2, 4, 8, 16                     |                                  |
    | E2M3   | 1  | 7.5         | 16 steps of 1/8, then 8 each from 2 and 4        | float6_e2m3fn                    |
    | E3M2   | 3  | 28          | 8 steps of 1/16, then 4 each from 0.5, 1 .. 16   | float6_e3m2fn                    |
    | E3M4   | 3  | 31          | 32 steps of 1/64, then 16 each from 0.5 .. 16    |                                  |
    | E4M3   | 7  | 480         | 16 steps of 2**-9, then 8 each from 2**-5 .. 256 | float8_e4m3fn: `reserved=1`, 448 |
    | E5M2   | 15 | 114688      | 8 steps of 2**-16, 4 each from 2**-13 .. 2**16   | float8_e5m2: `reserved=4`, 57344 |

    No code is an infinity or NaN. A code is sign, exponent and mantissa, in this order, in the low bits of a uint8;
    there is a negative zero. LLM-FP4's real-valued exponent bias b (arXiv:2310.16836, eq. 3-5) is the same as a scale,
    2**(B - b): `scale_of_bias` and `bias_of_scale` convert.

    Args:
        reserved: how many codes of each sign, from the top, stand for no number: hardware's infinities and NaNs.

    Raises:
        ValueError: the bits are not such, or fewer than 3 or more than 8 in all, or `reserved` leaves less than half.
    """

    exponent_bits: int
    mantissa_bits: int
    reserved: int = 0

    def __post_init__(self) -> None:
        fields = (self.exponent_bits, self.mantissa_bits, self.reserved)
        if not all(type(n) is int and n >= 0 for n in fields) or self.exponent_bits < 1:
            raise ValueError(f"{self}: exponent_bits is an integer from 1, mantissa_bits and reserved from 0")
        if not 3 <= self.bits <= 8:
            raise ValueError(f"{self}: {self.bits} bits with the sign; possible are 3 to 8")
        if 2 * self.reserved > 2 ** (self.bits - 1):
            raise ValueError(f"{self}: more than half of the {2 ** (self.bits - 1)} codes of each sign are reserved")

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """IEEE's, B."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        """The largest element at scale 1."""
        code = 2 ** (self.bits - 1) - 1 - self.reserved
        exponent, k = divmod(code, 2**self.mantissa_bits)
        return (k / 2**self.mantissa_bits + (exponent > 0)) * 2.0 ** (max(exponent, 1) - self.bias)

    @property
    def splits(self) -> tuple[Float, ...]:
        """What a search of the format may choose from: this one."""
        return (self,)


@dataclass(frozen=True)
class AnyFloat(_SignAndMagnitude):
    """A float of 3 to 8 bits whose split into exponent and mantissa is data: `mantissa` holds the mantissa bits.

    So layers of different formats share one compiled function, and stacked layers one array. Without `mantissa` it is
    the usual one: half of the bits for the exponent (E2M1, E3M2, E4M3).

    Raises:
        ValueError: `bits` is not an integer from 3 to 8.
    """

    bits: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 3 <= self.bits <= 8:
            raise ValueError(f"AnyFloat: bits is {self.bits!r}; possible are the integers from 3 to 8")

    @property
    def usual(self) -> Float:
        return Float(self.bits // 2, self.bits - 1 - self.bits // 2)

    @property
    def splits(self) -> tuple[Float, ...]:
        """What a search of the format chooses from, the widest exponent first; with 8 bits those with 5 exponent bits
        or fewer, as in LLM-FP4."""
        widest = 5 if self.bits == 8 else self.bits - 1
        return tuple(Float(e, self.bits - 1 - e) for e in range(widest, 0, -1))


Kind = Float | AnyFloat
Number = Any  # a Python number where the format says it, an array where it is data


def layout(fmt: Kind, mantissa: jax.Array | None) -> tuple[Number, Number, Number]:
    """The mantissa bits, the exponent of the smallest normal element, and the largest element."""
    if isinstance(fmt, AnyFloat) and mantissa is None:
        fmt = fmt.usual
    if isinstance(fmt, Float):
        return fmt.mantissa_bits, 1 - fmt.bias, jnp.float32(fmt.largest)
    assert mantissa is not None
    m = mantissa.astype(jnp.int32)
    half = jnp.left_shift(1, fmt.bits - 2 - m)  # 2**(E - 1)
    return m, 2 - half, (2 - power_of_two(-m)) * power_of_two(half)


def scale_from_width(fmt: Kind, width: jax.Array, mantissa: jax.Array | None) -> jax.Array:
    """The scale at which the largest element is `width`; 1 where that is 0."""
    m, lowest, largest = layout(fmt, mantissa)
    smallest = power_of_two(jnp.asarray(SMALLEST_NORMAL + m - lowest, jnp.int32))
    scale = jnp.maximum(divide(width, jnp.broadcast_to(largest, width.shape)), smallest)
    return jnp.where(width == 0, jnp.float32(1), scale)


def encode(fmt: Kind, x: jax.Array, scale: jax.Array, mantissa: jax.Array | None) -> jax.Array:
    """Sign, exponent and mantissa of the nearest element: codes of one sign count the elements from zero."""
    m, lowest, largest = layout(fmt, mantissa)
    steps, exponent = _steps(ratio(x, scale), m, lowest, largest)
    magnitude = jnp.abs(steps).astype(jnp.int32) + jnp.left_shift(exponent - lowest, m)
    sign = jnp.signbit(steps).astype(jnp.int32)
    return (magnitude | jnp.left_shift(sign, fmt.bits - 1)).astype(fmt.code_dtype)


def decode(fmt: Kind, codes: jax.Array, scale: jax.Array, mantissa: jax.Array | None) -> jax.Array:
    """By the bits of float32; subnormal elements as (1 + k / 2**m) * 2**lowest, and 2**lowest taken off."""
    m, lowest, _ = layout(fmt, mantissa)
    top = 2 ** (fmt.bits - 1)
    magnitude = codes.astype(jnp.int32) & (top - 1)
    tiny = jnp.right_shift(magnitude, m) == 0
    normal, raised = (jnp.asarray(lowest + k, jnp.int32) << 23 for k in (126, 127))
    bits = jnp.left_shift(magnitude, 23 - m) + jnp.where(tiny, raised, normal)
    taken = jnp.where(tiny, power_of_two(jnp.asarray(lowest, jnp.int32)), jnp.float32(0))
    element = jax.lax.bitcast_convert_type(bits, jnp.float32) - taken
    return jnp.where(codes >= top, -element, element) * scale


def fits_half(fmt: Float) -> bool:
    """Whether float16's exponents, up to 30, hold the format's."""
    return (2 ** (fmt.bits - 1) - 1 - fmt.reserved) >> fmt.mantissa_bits <= 30


def half(fmt: Float, codes: jax.Array) -> jax.Array:
    """The elements times `2**(bias - 15)`, float32, of a format that `fits_half`: the codes are float16's bits but for
    the bias, and CPUs convert those in one instruction, subnormal ones too. (GPUs and TPUs may not.)"""
    top = 2 ** (fmt.bits - 1)
    bits = codes.astype(jnp.uint16)
    bits = (bits & (top - 1)) << (10 - fmt.mantissa_bits) | (bits & top) << (16 - fmt.bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def whole_elements(fmt: Float, codes: jax.Array) -> jax.Array:
    """The elements' magnitudes in units of the smallest, uint8, of a format in which that holds them.

    They count up by 1 with the code, and by twice as much from each power of two on: arithmetic of bytes alone.
    """
    magnitude = codes & jnp.uint8(2 ** (fmt.bits - 1) - 1)
    value = magnitude
    for exponent in range(2, 2**fmt.exponent_bits):
        start = jnp.uint8(exponent << fmt.mantissa_bits)
        value += (jnp.maximum(magnitude, start) - start) << (exponent - 2)
    return value


def elements(fmt: Kind, x: jax.Array, scale: jax.Array, mantissa: jax.Array | None) -> jax.Array:
    return _snap(x, scale, *layout(fmt, mantissa))


def _steps(y: jax.Array, m: Number, lowest: Number, largest: Number) -> tuple[jax.Array, jax.Array]:
    """The element nearest to `y` as `steps * 2**(exponent - m)`; steps are integers, rounded half to even."""
    y = jnp.clip(y, -largest, largest)
    exponent = jnp.maximum(exponent_of(y), lowest)
    return jnp.rint(y * power_of_two(m - exponent)), exponent


@jax.custom_jvp
def _snap(x: jax.Array, scale: jax.Array, m: Number, lowest: Number, largest: Number) -> jax.Array:
    """The element nearest to `x / scale`, with straight-through rounding.

    Rounded by two additions, with 1.5 times the power of two from which on float32 numbers are as far apart as elements
    are there; zeros keep their sign.
    """
    y = jnp.clip(ratio(x, scale), -largest, largest)
    bits = jax.lax.bitcast_convert_type(y, jnp.int32)
    binade = jnp.maximum(bits & 0x7F800000, jnp.left_shift(jnp.asarray(lowest + 127, jnp.int32), 23))
    coarse = binade + jnp.left_shift(jnp.asarray(23 - m, jnp.int32), 23) | 0x400000
    ruler = jax.lax.bitcast_convert_type(coarse, jnp.float32)
    element = jax.lax.bitcast_convert_type((y + ruler) - ruler, jnp.int32)
    return jax.lax.bitcast_convert_type(element | bits & jnp.int32(-(2**31)), jnp.float32)


@_snap.defjvp
def _snap_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, scale, m, lowest, largest = primals
    dx, dscale = tangents[:2]
    quotient = divide(x, scale)
    clipped = jnp.abs(quotient) > largest
    tangent = jnp.where(clipped, jnp.float32(0), (dx - quotient * dscale) / scale)
    return _snap(x, scale, m, lowest, largest), tangent


def exponent_of(x: jax.Array) -> jax.Array:
    """floor(log2(|x|)) of normal float32 numbers, int32, from their bits: XLA's log2 is not exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return (jnp.right_shift(bits, 23) & 255) - 127


def power_of_two(k: jax.Array) -> jax.Array:
    """2**k as float32, exactly, for integers k from -126 to 127: XLA's exp2 is not exact."""
    return jax.lax.bitcast_convert_type(jnp.left_shift(k + 127, 23).astype(jnp.int32), jnp.float32)


def scale_of_bias(fmt: Float, bias: jax.Array) -> jax.Array:
    """The scale that LLM-FP4's real-valued exponent bias b stands for: 2**(B - b), float32; exact for integers.

    Where that is no normal float32 number it is the nearest that is one.
    """
    power = jnp.clip(fmt.bias - bias.astype(jnp.float32), SMALLEST_NORMAL, LARGEST_POWER)
    whole = jnp.floor(power)
    return jnp.exp2(power - whole) * power_of_two(whole.astype(jnp.int32))


def bias_of_scale(fmt: Float, scale: jax.Array) -> jax.Array:
    """LLM-FP4's real-valued exponent bias of a normal scale, b = B - log2(scale), float32; exact for powers of two."""
    scale = scale.astype(jnp.float32)
    whole = exponent_of(scale)
    rest = jnp.log2(scale / power_of_two(whole))  # in [0, 1)
    return (fmt.bias - whole).astype(jnp.float32) - rest
