"""Products of low-bit numbers in plain jnp: what every kernel means, and what runs where there is none.

An operand is integers times a scale, whatever its format: an integer's code less the zero point, a float in units of
its smallest step. So a product is one of integers, exact, and the scales of its rows and columns come after it:

    y[m, n] = (sum over k of X[m, k] W[k, n]) * scale_x[m] * scale_w[n]

| format             | largest integer | 8-bit carriers, sums in int32                            |
|--------------------|-----------------|----------------------------------------------------------|
| Int(b)             | 2**(b-1) - 1    | yes                                                      |
| Int(b), asymmetric | 2**(b-1)        | yes: codes less 2**(b-1), the zero points come after     |
| E1M2, E2M1, E3M0   | 7, 12, 64       | yes; E2M1's activations with exponents: 96; E1M2's: 14   |
| E2M3               | 60              | yes, without exponents                                   |
| wider floats       | from 448 on     | no: bfloat16 holds them all exactly; sums in float32     |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.contraction import dynamic_grid
from jaxq.devices import on_gpu
from jaxq.formats import Float, Format, Int, decode, elements
from jaxq.formats.floating import layout, power_of_two, whole_elements
from jaxq.kernels.dots import ROWS_FOR_LIBRARIES, dot, exact_dot
from jaxq.qtensor import Granularity, Grid, Packed, QTensor, pytree, static

Products = Literal["int8", "xla", "float", "decoded"]

# The largest integer of a float format beyond which elements are not counted in units of the smallest: sums of up to
# 2**126 of these might overflow. Such weights are multiplied in units of 1, such activations as they are.
WIDEST = 2**40
# Formats whose codes are a machine's numbers, bit for bit: accelerators decode these in one instruction.
MACHINE_FLOATS = {Float(4, 3, reserved=1): jnp.float8_e4m3fn, Float(5, 2, reserved=4): jnp.float8_e5m2}


@pytree
class Integers:
    """`(values + center) * scale`, of whole numbers of a magnitude up to `bound`, unless that is None.

    `center` (None: 0) is what brings an asymmetric integer's codes around 0, so that 8 bits hold them. Each
    value may have been multiplied by a power of two up to `2**reach`, `bound` being the largest magnitude before that.
    `digits` are the significant bits that a value has at most, where they are fewer than the bound's. `int8` are the
    values as a kernel wrote them, where one did: `values`, which derivatives pass, is then only their conversion.
    """

    values: jax.Array
    scale: jax.Array | None = None
    center: jax.Array | None = None
    bound: int | None = static(default=None)
    reach: int = static(default=0)
    digits: int | None = static(default=None)
    int8: jax.Array | None = None

    @property
    def significant(self) -> int | None:
        """The significant bits that a value has at most."""
        return self.digits or (None if self.bound is None else self.bound.bit_length())

    @property
    def largest(self) -> int | None:
        return None if self.bound is None else self.bound << self.reach

    @property
    def centered(self) -> jax.Array:
        """`values + center`, which may be beyond the integers' own 8 bits: in float32."""
        return self.values if self.center is None else self.values.astype(jnp.float32) + self.center

    @property
    def numbers(self) -> jax.Array:
        """What they stand for."""
        return self.centered if self.scale is None else self.centered * self.scale


def element_scale(w: Integers, fmt: Int | Float, columns: int) -> jax.Array:
    """The scales [groups, columns] of a weight's elements, which are those of its integers but for a float's unit, in
    which `weight_integers` counts unless it is a machine's."""
    scale = jnp.ones((1, 1)) if w.scale is None else w.scale
    scale = jnp.broadcast_to(scale, (scale.shape[0], columns))
    if isinstance(fmt, Int) or fmt in MACHINE_FLOATS:
        return scale
    return scale * jnp.float32(2.0 ** (fmt.bias - 1 + fmt.mantissa_bits))


def weight_integers(leaf: QTensor | Packed) -> Integers:
    """A weight's integers, of the leaf's shape: int8 where they fit, else float32; of a machine's format its numbers as
    they are. Its exponents are left to x; scales and centers have one number for each group."""
    fmt, bound, grid = leaf.format, largest_integer(leaf.format), leaf.grid
    if isinstance(fmt, Int):
        half, zero = middle(fmt), grid.zero
        if isinstance(leaf, Packed) and leaf.planes[0].dtype == jnp.int8:  # as they are: no pass over memory
            values = leaf.laid_out(leaf.planes[0])
        else:
            codes = leaf.unpack().codes if isinstance(leaf, Packed) else leaf.codes
            values = codes if half == 0 else (codes.astype(jnp.int16) - half).astype(jnp.int8)
        return Integers(values, grid.factor, None if zero is None else half - zero, bound=bound)
    leaf = leaf.unpack() if isinstance(leaf, Packed) else leaf
    if fmt in MACHINE_FLOATS:  # in units of 1: a conversion is all that XLA fuses into a product on GPUs
        return Integers(lax.bitcast_convert_type(leaf.codes, MACHINE_FLOATS[fmt]), grid.factor)
    if bound > WIDEST:
        return Integers(decode(fmt, leaf.codes, jnp.float32(1), None, grid.over(leaf.shape).mantissa), grid.factor)
    finest = _finest(fmt, grid.mantissa, leaf.ndim)
    return Integers(_whole(leaf), grid.factor * power_of_two(finest), bound=bound)


def decoded(leaf: QTensor | Packed) -> Integers:
    """A weight's numbers as they are, in place of `weight_integers`: what those in groups are multiplied as."""
    return Integers(replace(leaf, exponents=None).dequantize())


def _whole(leaf: QTensor) -> jax.Array:
    """A float weight's elements in units of the smallest: int8 where they fit, else float32."""
    fmt, codes = leaf.format, leaf.codes
    if isinstance(fmt, Float) and largest_integer(fmt) <= 127:
        values = lax.bitcast_convert_type(whole_elements(fmt, codes), jnp.int8)
        return jnp.where(codes >= 2 ** (fmt.bits - 1), -values, values)
    mantissa = leaf.grid.over(leaf.shape).mantissa
    values = decode(fmt, codes, power_of_two(-_finest(fmt, mantissa, leaf.ndim)), None, mantissa)
    return values.astype(jnp.int8) if largest_integer(fmt) <= 127 else values


def activation_integers(
    x: jax.Array, fmt: Format, granularity: Granularity, grid: Grid | None, axes: tuple[int, ...]
) -> Integers:
    """An activation's integers, float32 of the shape of x; they are what `quantize_activation` makes of it, over the
    scale. Gradients pass the rounding straight through."""
    if grid is None:
        grid = dynamic_grid(lax.stop_gradient(x), fmt, granularity, axes)
    grid = grid.over(x.shape)
    values = elements(fmt, x, grid.scale, grid.zero, grid.mantissa)
    if isinstance(fmt, Int):
        center = None if grid.zero is None else middle(fmt) - grid.zero
        return Integers(values if center is None else values - center, grid.scale, center, largest_integer(fmt))
    if largest_integer(fmt) > WIDEST:
        return Integers(values * grid.scale)
    finest = _finest(fmt, grid.mantissa, x.ndim)
    scale = grid.scale * power_of_two(finest)
    digits = 1 + max(split.mantissa_bits for split in fmt.splits)
    return Integers(values * power_of_two(-finest), scale, bound=largest_integer(fmt), digits=digits)


def largest_integer(fmt: Format) -> int:
    """The largest magnitude among a format's integers; of an `AnyFloat`, whatever its split."""
    if isinstance(fmt, Int):
        return 2 ** (fmt.bits - 1) - fmt.symmetric
    return max(int(f.largest * 2.0 ** (f.mantissa_bits - 1 + f.bias)) for f in fmt.splits)


def middle(fmt: Int) -> int:
    """What is taken off an integer's codes so that 8 bits hold them."""
    return 0 if fmt.symmetric else 2 ** (fmt.bits - 1)


def _finest(fmt: Any, mantissa: jax.Array | None, ndim: int) -> jax.Array:
    """The exponent of a float format's smallest step at scale 1, int32 of rank `ndim`."""
    m, lowest, _ = layout(fmt, mantissa)
    finest = jnp.asarray(lowest - m, jnp.int32)
    return finest.reshape((1,) * (ndim - finest.ndim) + finest.shape)


# Products of [M, K] and [K, N] ----------------------------------------------------------------------------------------


def shifted(x: Integers, exponents: jax.Array, reach: int) -> Integers:
    """x with the weight's exponents [1, K], which differ by `reach` at most: integers again, and a scale."""
    least = exponents.min().astype(jnp.int32)
    factor = power_of_two(exponents.astype(jnp.int32) - least)
    bound = None if x.bound is None else x.bound * (2 if x.center is not None else 1)
    scale = power_of_two(least).reshape(1, 1)
    values = x.centered * factor.astype(x.values.dtype)
    return Integers(values, scale if x.scale is None else x.scale * scale, None, bound, reach, x.digits)


def product(
    x: Integers, w: Integers, sums: jax.Array | None, products: Products, precision: Any = None, k_axis: int = 0
) -> jax.Array:
    """y [M, N], float32.

    Args:
      x: values [M, K], scale and center [M, 1] or [1, 1]. With `bound` None they are no integers, of any float dtype.
      w: values [K, N] of int8 or float32, scale and center [1, N] or [1, 1].
      sums: of w's values over k, int32 [1, N]; None where they are not known beforehand.
      precision: as for `lax.dot_general`; of use for activations that are no integers.
      k_axis: 1 where w's values come as [N, K]: on CPU an 8-bit product with a transpose is some ten times slower.
    """
    if fits_int8(x, w.bound, products):
        y = _int8_product(x, w, sums, k_axis)
    else:
        y = _float_product(x, replace(w, values=w.values.T) if k_axis else w, precision)
    for scale in (x.scale, w.scale):
        y = y if scale is None else y * scale
    return y


def fits_int8(x: Integers, bound: int | None, products: Products) -> bool:
    """Whether a product of x, values [M, K], and a weight's integers is one in 8 bits, with exact sums in int32."""
    small = x.largest is not None and max(x.largest, bound or 256) <= 128 and x.values.shape[1] * 2**14 < 2**31
    return small and products != "float" and not _doubled()


def _doubled() -> bool:
    """Whether XLA makes twice the sum of a product in int8: on an H100 that of JAX 0.11.2 does, of every shape that was
    tried but vectors, where its GPU programs are not tuned, and none of them where they are, as is usual."""
    return on_gpu() and "--xla_gpu_autotune_level=0" in os.environ.get("XLA_FLAGS", "")


def _int8_product(x: Integers, w: Integers, sums: jax.Array | None, k_axis: int) -> jax.Array:
    """The product of the values is exact; centers come after, in float32."""
    assert x.bound is not None and w.bound is not None
    if x.center is not None and sums is None:
        sums = w.values.sum(k_axis, dtype=jnp.int32)[None]
    return corrected(exact_dot(x.values, x.int8, w.values, k_axis), x, w, sums)


def corrected(y: jax.Array, x: Integers, w: Integers, sums: jax.Array | None) -> jax.Array:
    """The product of x and w from that of their values, y: (X + a)(W + b) = XW + a (sum(W) + K b) + b sum(X)."""
    if x.center is not None:
        assert sums is not None
        total = sums.astype(jnp.float32)
        y = y + x.center * (total if w.center is None else total + x.values.shape[1] * w.center)
    if w.center is not None:
        y = y + x.values.sum(1, keepdims=True) * w.center
    return y


def _float_product(x: Integers, w: Integers, precision: Any) -> jax.Array:
    """In the activation's own dtype; of integers, in bfloat16, which holds them, or on CPU in float32."""
    if x.bound is None:
        dtype = jnp.float32 if x.values.dtype == jnp.float16 else x.values.dtype  # float16 does not hold all of them
        weights = w.centered.astype(dtype)
        if on_gpu() and x.values.shape[0] >= ROWS_FOR_LIBRARIES:
            weights = lax.optimization_barrier(weights)
        return dot(x.centered.astype(dtype), weights, precision=precision)

    def multiply(dtype: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda x, w: dot(x.astype(dtype), w.astype(dtype))

    return lax.platform_dependent(x.centered, w.centered, cpu=multiply(jnp.float32), default=multiply(jnp.bfloat16))
