"""Number formats: how real numbers become codes and codes become real numbers.

A format is a frozen description; where its codes lie (scale, zero point) is data. Everything here is elementwise:
`scale` and `zero` have the rank of `x` and broadcast against it, and all arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

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


Format = Int


def grid_from_range(fmt: Format, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point with which the codes of `fmt` span `[low, high]`, extended to contain 0.

    symmetric:  scale = max(-low, high) / qmax,             zero = None
    asymmetric: scale = (high - low) / (qmax - qmin),       zero = clip(qmin - rint(low / scale), qmin, qmax)

    (Outlier Suppression+, the reference's observers.) The scale is at least 2**-23. A range that is just {0} gets
    scale 1, where the reference has 2**-23: the same values, and a scale that may be divided by or folded.

    Args:
        low, high: any shape, the same for both.

    Returns:
        scale and zero, float32, of the shape of `low`; zero is None for symmetric formats.
    """
    low = jnp.minimum(low.astype(jnp.float32), 0)
    high = jnp.maximum(high.astype(jnp.float32), 0)
    width, steps = (jnp.maximum(-low, high), fmt.qmax) if fmt.symmetric else (high - low, fmt.qmax - fmt.qmin)
    scale = jnp.maximum(divide(width, jnp.float32(steps)), SMALLEST_SCALE)
    scale = jnp.where(width == 0, jnp.float32(1), scale)
    if fmt.symmetric:
        return scale, None
    offset = divide(low, scale)
    straight_through = offset + jax.lax.stop_gradient(jnp.rint(offset) - offset)
    return scale, jnp.clip(fmt.qmin - straight_through, fmt.qmin, fmt.qmax)


def encode(fmt: Format, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """The codes of `x`, rounded half to even and clipped: `clip(rint(x / scale) + zero, qmin, qmax)`.

    Args:
        x: any shape, any float dtype, without NaN.
        scale, zero: of the rank of `x`, broadcastable against it; `zero` holds integers or is None.

    Returns:
        codes of the shape of `x`, int8 (symmetric) or uint8.

    Raises:
        TypeError: `x` is not of a float dtype.
    """
    steps = _steps(fmt, x, scale, zero)
    return (steps if zero is None else steps + zero.astype(jnp.float32)).astype(fmt.code_dtype)


def decode(fmt: Format, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """The values of `codes`, float32: `(codes - zero) * scale`. Shapes as for `encode`."""
    del fmt  # an integer's code is its own value
    steps = codes.astype(jnp.float32)
    return (steps if zero is None else steps - zero.astype(jnp.float32)) * scale.astype(jnp.float32)


def fake_quant(fmt: Format, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """`decode(encode(x))` without the codes: bit for bit the same values, in the shape and dtype of `x`.

    Differentiable: rounding passes gradients straight through. With respect to `x` the gradient is 1 where `x` lies
    within the codes' range and 0 where it is clipped; for `scale` and `zero` it is the one of LSQ and LSQ+
    (arXiv:1902.08153 eq. 3, arXiv:2004.09576 eq. 4-6) before any gradient scaling.

    Arguments and errors as for `encode`; NaN stays NaN.
    """
    return (_steps(fmt, x, scale, zero) * scale.astype(jnp.float32)).astype(x.dtype)


def _steps(fmt: Format, x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """`code - zero` as float32. Moving the clip's bounds by `zero` saves two operations on every element."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"cannot quantize an array of dtype {x.dtype}; cast it to a float dtype first")
    offset = jnp.float32(0) if zero is None else zero.astype(jnp.float32)
    return _snap(x.astype(jnp.float32), scale.astype(jnp.float32), fmt.qmin - offset, fmt.qmax - offset)


@jax.custom_jvp
def _snap(x: jax.Array, scale: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`clip(rint(x / scale), low, high)` with straight-through rounding."""
    steps = jnp.clip(jnp.rint(divide(x, scale)), low, high)
    return jnp.where(steps == 0, jnp.float32(0), steps)  # no negative zero: integer codes have none


@_snap.defjvp
def _snap_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # By hand, because jnp.clip halves the gradient at its bounds, where all values that round to the last code are.
    x, scale, low, high = primals
    dx, dscale, dlow, dhigh = tangents
    ratio = divide(x, scale)
    steps = jnp.rint(ratio)
    clipped = jnp.where(steps < low, dlow, dhigh)
    tangent = jnp.where((steps < low) | (steps > high), clipped, (dx - ratio * dscale) / scale)
    return _snap(x, scale, low, high), tangent


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, correctly rounded in every context; equal ranks.

    XLA turns a division by a broadcast or constant into a multiplication by the reciprocal, and `(a / b) / c` into
    `a / (b * c)`, depending on what it is compiled with. That moves values across rounding ties, so that the codes of
    the same `x` would differ between eager and jit, or between a scale and its repetition. Operands that are selected
    elementwise are left alone.
    """
    return jnp.where(b == b, a, b) / jnp.where(a == a, b, jnp.ones_like(b))
