"""What a Hopper GPU does in place of `jaxq.kernels.plain`: see `hopper_matmul` and `hopper_quantize` beside it."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.devices import device_kind
from jaxq.formats import Float, Format, Int
from jaxq.kernels.expansion import WIDEST_EXPONENT
from jaxq.kernels.layout import fits
from jaxq.kernels.plain import Integers, largest_integer
from jaxq.qtensor import Grid, InputQuant, PerToken

COLUMNS = 128  # of the weight, that a warpgroup multiplies at once
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")  # how `jax.Device.device_kind` begins
MOST_ROWS = {4: 128, 8: 16}  # by the bits of a weight; with more, XLA multiplies (timed on an H100 at 16 and 128)
CHANNELS = 512, 32768  # of a row, that the kernel holds in registers, and the vectors for it in shared memory
# An estimate: with fewer, quantizing is a small part of a product, and XLA may do it where it computes x.
LEAST_ROWS = 256
SMALLEST_GROUP = 16
EXACT = 2**24  # below it float32 holds all integers


def target(*operands: jax.Array) -> str | None:
    """The kind of GPU that a program is traced for, if there is a kernel for it that can have these operands."""
    kind = device_kind(*operands)
    return kind if kind is not None and kind.startswith(HOPPER) else None


def has_kernel(x: Integers, fmt: Format | None, columns: int, groups: int, sums: jax.Array | None) -> bool:
    """Whether `packed_product` multiplies [M, K] with `columns` columns of weights of a format in so many groups: for
    few rows; of 4 or 8 bits with an activation in bfloat16 that is not quantized; of 4 bits with one that is, where
    bfloat16 holds it and float32 the sums, exactly."""
    rows, k = x.values.shape
    if (
        not isinstance(fmt, Int | Float)
        or fmt.bits not in (4, 8)
        or columns % COLUMNS
        or not fits(k, groups, SMALLEST_GROUP)
    ):
        return False
    if rows > MOST_ROWS[fmt.bits] or (isinstance(fmt, Float) and fmt.exponent_bits > WIDEST_EXPONENT):
        return False
    if x.bound is None:
        return x.values.dtype == jnp.bfloat16
    assert x.largest is not None
    largest = largest_integer(fmt) if fmt.symmetric else 2**fmt.bits - 1  # less a zero point that is any code
    exact = x.bound.bit_length() <= 8 and x.largest * largest * (k // groups) < EXACT
    return fmt.bits == 4 and exact and (x.center is None or sums is not None)


def quantizes(quant: InputQuant, x: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether `quantized` reads an activation with channels along `axes`: of many tokens, to integers with one grid or
    one for each token."""
    grid, k = quant.grid, prod(x.shape[i] for i in axes)
    last = axes == tuple(range(x.ndim - len(axes), x.ndim))
    one = isinstance(quant.granularity, PerToken) if grid is None else all(a.size == 1 for a in jax.tree.leaves(grid))
    fits = x.dtype == jnp.bfloat16 and CHANNELS[0] <= k <= CHANNELS[1] and k % 8 == 0 and x.size >= k * LEAST_ROWS
    return isinstance(quant.format, Int) and last and one and fits and target(x) is not None


def quantized(quant: InputQuant, x: jax.Array, axes: tuple[int, ...]) -> Integers:
    """What `jaxq.kernels.plain.activation_integers` makes of the transformed x, with the values in int8, by the kernel.
    The axes are x's last, in order; the others are the kernel's rows."""
    from jaxq.kernels.hopper_quantize import hopper_quantize

    assert isinstance(quant.format, Int)
    k, ones = prod(x.shape[i] for i in axes), [1] * len(axes)
    shift, divisor = (None if v is None else v.reshape(k) for v in (quant.shift, quant.scale))
    grid = jax.tree.map(lambda a: a.reshape(1, 1), quant.grid)
    values, *numbers = hopper_quantize(x.reshape(-1, k), quant.format, grid, shift, divisor)
    lead = x.shape[: x.ndim - len(axes)] if grid is None else [1] * (x.ndim - len(axes))
    scale, center = jax.tree.map(lambda a: a.reshape(*lead, *ones), numbers)
    values = values.reshape(x.shape)
    return Integers(values.astype(jnp.float32), scale, center, largest_integer(quant.format), int8=values)


def packed_product(
    x: Integers, codes: jax.Array, grid: Grid, fmt: Int | Float, sums: jax.Array | None, *, dtype: Any
) -> jax.Array:
    """`jaxq.kernels.plain.product` of `has_kernel`'s operands, by the kernel: y [M, N] of `dtype`.

    An activation's center comes after it, in float32: (x + a) W = xW + a sum(W) in each group.

    Args:
      x: as there.
      codes: of the weights, packed: uint8 [K/2, N], or of 8 bits uint8 or int8 [K, N].
      grid: of the weight, float32 [groups, N], or 1 for either.
      fmt: of the codes.
      sums: of the weight's integers over each group, int32 [groups, N].
    """
    from jaxq.kernels.hopper_matmul import hopper_matmul  # not above: not every jaxlib comes with Mosaic GPU

    groups, n = grid.scale.shape[0], codes.shape[1]
    outer = grid.outer is not None and grid.outer.size == 1
    factors = [a.reshape(1, 1) for a in (x.scale, grid.outer if outer else None) if a is not None and a.size == 1]
    scale = jnp.broadcast_to(grid.scale if outer else grid.factor, (groups, n))
    zero = None if grid.zero is None else jnp.broadcast_to(grid.zero.astype(jnp.float32), (groups, n))
    by = prod(factors[1:], start=factors[0]) if factors else None
    rows = None if x.scale is None or x.scale.size == 1 else x.scale
    values, whole = x.values.astype(jnp.bfloat16), rows is None and x.center is None
    packed = lax.bitcast_convert_type(codes, jnp.uint8)
    y = hopper_matmul(values, packed, scale, fmt, zero=zero, factor=by, dtype=dtype if whole else jnp.float32)
    if x.center is not None:
        assert sums is not None
        total = sums.astype(jnp.float32)
        if zero is not None:
            total = total + values.shape[1] // groups * (2 ** (fmt.bits - 1) - zero)
        correction = (total * scale).sum(0, keepdims=True)
        y = y + x.center * (correction if by is None else correction * by)
    return (y if rows is None else y * rows).astype(dtype)
