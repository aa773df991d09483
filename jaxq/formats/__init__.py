"""Number formats: how real numbers become codes and codes become real numbers.

A format is a frozen description; where its codes lie (scale, zero point, for `AnyFloat` the mantissa bits) is data.
Everything here is elementwise: `scale`, `zero` and `mantissa` have the rank of `x` and broadcast against it, and all
arithmetic is float32. Arguments that a format has no use for are None.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq.formats import floating, integer
from jaxq.formats.division import divide
from jaxq.formats.floating import AnyFloat, Float, bias_of_scale, scale_of_bias
from jaxq.formats.integer import SMALLEST_SCALE, Int

__all__ = [
    "SMALLEST_SCALE",
    "AnyFloat",
    "Float",
    "Format",
    "Int",
    "bias_of_scale",
    "decode",
    "divide",
    "elements",
    "encode",
    "fake_quant",
    "grid_from_range",
    "scale_of_bias",
]

Format = Int | Float | AnyFloat


def grid_from_range(
    fmt: Format, low: jax.Array, high: jax.Array, mantissa: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """The scale and zero point with which the codes of `fmt` span `[low, high]`, extended to contain 0.

    symmetric:  scale = max(-low, high) / qmax,             zero = None
    asymmetric: scale = (high - low) / (qmax - qmin),       zero = clip(qmin - rint(low / scale), qmin, qmax)
    floats:     scale = max(-low, high) / largest,          zero = None

    (Outlier Suppression+, the reference's observers; LLM-FP4, eq. 5 solved for the exponent bias.) An integer's scale
    is at least 2**-23, a float's such that its smallest step is a normal float32 number. A range that is just {0} gets
    scale 1: any would do, and this one may be divided by or folded.

    Args:
        low, high: any shape, the same for both.
        mantissa: for `AnyFloat` the mantissa bits, broadcastable against `low`; None is the usual split.

    Returns:
        scale and zero, float32, of the shape of `low`; zero is None for symmetric formats.
    """
    low = jnp.minimum(low.astype(jnp.float32), 0)
    high = jnp.maximum(high.astype(jnp.float32), 0)
    if isinstance(fmt, Int):
        return integer.grid_from_range(fmt, low, high)
    return floating.scale_from_width(fmt, jnp.maximum(-low, high), mantissa), None


def encode(
    fmt: Format, x: jax.Array, scale: jax.Array, zero: jax.Array | None = None, mantissa: jax.Array | None = None
) -> jax.Array:
    """The codes of `x`: the nearest value of the format, ties to the even code, clipped to the format's range.

    Floats without mantissa bits have powers of two next to each other, all of them with an odd significand: there ties
    go to the larger magnitude (IEEE 754-2019, 4.3.1, precision 1).

    Args:
        x: any shape, any float dtype, without NaN.
        scale, zero, mantissa: of the rank of `x`, broadcastable against it; `zero` and `mantissa` hold integers.

    Returns:
        codes of the shape of `x`, of `fmt.code_dtype`: int8 for symmetric integers, else uint8.

    Raises:
        TypeError: `x` is not of a float dtype.
    """
    x, scale = _checked(x), scale.astype(jnp.float32)
    if isinstance(fmt, Int):
        return integer.encode(fmt, x, scale, zero)
    return floating.encode(fmt, x, scale, mantissa)


def decode(
    fmt: Format, codes: jax.Array, scale: jax.Array, zero: jax.Array | None = None, mantissa: jax.Array | None = None
) -> jax.Array:
    """The values of `codes`, float32. Shapes as for `encode`."""
    scale = scale.astype(jnp.float32)
    if isinstance(fmt, Int):
        return integer.decode(codes, scale, zero)
    return floating.decode(fmt, codes, scale, mantissa)


def fake_quant(
    fmt: Format, x: jax.Array, scale: jax.Array, zero: jax.Array | None = None, mantissa: jax.Array | None = None
) -> jax.Array:
    """`decode(encode(x))` without the codes: bit for bit the same values, in the shape and dtype of `x`.

    Differentiable: rounding passes gradients straight through. With respect to `x` the gradient is 1 where `x` lies
    within the codes' range and 0 where it is clipped; for `scale` and `zero` it is the one of LSQ and LSQ+
    (arXiv:1902.08153 eq. 3, arXiv:2004.09576 eq. 4-6) before any gradient scaling.

    Arguments and errors as for `encode`; NaN stays NaN.
    """
    return (elements(fmt, x, scale, zero, mantissa) * scale.astype(jnp.float32)).astype(x.dtype)


def elements(
    fmt: Format, x: jax.Array, scale: jax.Array, zero: jax.Array | None = None, mantissa: jax.Array | None = None
) -> jax.Array:
    """What `fake_quant` multiplies by the scale: an integer's code less the zero point, a float's element at scale 1.

    float32 of the shape of `x`; differentiable as `fake_quant` is; arguments and errors as for it.
    """
    x, scale = _checked(x), scale.astype(jnp.float32)
    if isinstance(fmt, Int):
        return integer.steps(fmt, x, scale, zero)
    return floating.elements(fmt, x, scale, mantissa)


def _checked(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"cannot quantize an array of dtype {x.dtype}; cast it to a float dtype first")
    return x.astype(jnp.float32)
