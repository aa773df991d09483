"""Integers: `value = (code - zero) * scale`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.devices import on_accelerator
from jaxq.formats.division import divide, ratio

# Where float32 numbers are 1 apart: a sum with it is rounded to a whole number, half to even, the low bits of which are
# the significand's.
WHOLE = 1.5 * 2**23
# The smallest scale: machine epsilon of float32, as in the reference. It keeps x / scale finite for any usual x.
SMALLEST_SCALE = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Int:
    """Integers of 2 to 8 bits; `value = (code - zero) * scale`.

    | bits | symmetric: codes, levels | asymmetric: codes, levels |
    |------|--------------------------|---------------------------|
    | 2    | -1 .. 1, 3               | 0 .. 3, 4                 |
    | 3    | -3 .. 3, 7               | 0 .. 7, 8                 |
    | 4    | -7 .. 7, 15              | 0 .. 15, 16               |
    | 5    | -15 .. 15, 31            | 0 .. 31, 32               |
    | 6    | -31 .. 31, 63            | 0 .. 63, 64               |
    | 7    | -63 .. 63, 127           | 0 .. 127, 128             |
    | 8    | -127 .. 127, 255         | 0 .. 255, 256             |

    Symmetric codes leave out `-2**(bits - 1)`, have no zero point (None) and are stored as int8. Asymmetric codes are
    stored as uint8; their zero point is the code of the real number 0, an integer held as float32.

    Raises:
        ValueError: `bits` is not an integer from 2 to 8.
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"Int: bits is {self.bits!r}; possible are the integers from 2 to 8")

    @property
    def qmin(self) -> int:
        return 1 - 2 ** (self.bits - 1) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.symmetric else np.uint8)


def grid_from_range(fmt: Int, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point of float32 ranges `low <= 0 <= high`."""
    width, steps = (jnp.maximum(-low, high), fmt.qmax) if fmt.symmetric else (high - low, fmt.qmax - fmt.qmin)
    scale = jnp.maximum(divide(width, jnp.float32(steps)), SMALLEST_SCALE)
    scale = jnp.where(width == 0, jnp.float32(1), scale)
    if fmt.symmetric:
        return scale, None
    offset = divide(low, scale)
    straight_through = offset + jax.lax.stop_gradient(jnp.rint(offset) - offset)
    return scale, jnp.clip(fmt.qmin - straight_through, fmt.qmin, fmt.qmax)


def encode(fmt: Int, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """`clip(rint(x / scale) + zero, qmin, qmax)`."""
    codes = steps(fmt, x, scale, zero)
    return narrow(codes if zero is None else codes + zero.astype(jnp.float32), fmt.code_dtype)


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 whole numbers as int8 or uint8, which hold them.

    On GPUs and TPUs by one addition: XLA's conversion takes many instructions, to saturate what does not fit. So, now
    and then, does a GPU's conversion of integers: it is given none.

    The low byte of the sum is the code with its highest bit flipped, which an exclusive or undoes. Without an integer's
    operation in between, CUDA 13.0's ptxas takes the store of a float32's low byte for a saturating conversion of the
    float32 (13.1's does not): every code came out as 255.
    """
    if not on_accelerator():
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x + jnp.float32(WHOLE + 128), jnp.int32) ^ 128
    return (((bits << 24) >> 24) if jnp.issubdtype(dtype, jnp.signedinteger) else bits & 255).astype(dtype)


def decode(codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """`(codes - zero) * scale`."""
    steps = codes.astype(jnp.float32)
    return (steps if zero is None else steps - zero.astype(jnp.float32)) * scale


def steps(fmt: Int, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """`code - zero` as float32, differentiable. Moving the clip's bounds saves two operations on every element."""
    offset = jnp.float32(0) if zero is None else zero.astype(jnp.float32)
    return _snap(x, scale, fmt.qmin - offset, fmt.qmax - offset)


@jax.custom_jvp
def _snap(x: jax.Array, scale: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`clip(rint(x / scale), low, high)` with straight-through rounding, for bounds that are whole.

    Rounded by two additions, after which there is no negative zero, as integer codes have none. Behind a barrier: XLA
    leaves them out where it sees that they are of one constant.
    """
    whole = jax.lax.optimization_barrier(jnp.float32(WHOLE))
    return (jnp.clip(ratio(x, scale), low, high) + whole) - whole


@_snap.defjvp
def _snap_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # By hand, because jnp.clip halves the gradient at its bounds, where all values that round to the last code are.
    x, scale, low, high = primals
    dx, dscale, dlow, dhigh = tangents
    quotient = divide(x, scale)
    steps = jnp.rint(quotient)
    clipped = jnp.where(steps < low, dlow, dhigh)
    tangent = jnp.where((steps < low) | (steps > high), clipped, (dx - quotient * dscale) / scale)
    return _snap(x, scale, low, high), tangent
