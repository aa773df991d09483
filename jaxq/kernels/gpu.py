"""What a Hopper GPU does in place of `jaxq.kernels.plain`: see `hopper_matmul`, `hopper_many` and `hopper_quantize`.

Which products have a kernel, and which one:

| rows            | scales      | weights            | activations               | kernel                    |
|-----------------|-------------|--------------------|---------------------------|---------------------------|
| up to `FEW`     | any         | 4 and 8 bits       | bfloat16                  | `hopper_matmul`           |
|                 |             | 4 bits             | integers, in bfloat16     |                           |
| up to `GROUPED` | of groups   | as above           | as above                  |                           |
| more            | per channel | 4 and 8 bits       | bfloat16                  | `hopper_many`             |
|                 |             | `in_int8`          | integers of 8 bits        | `hopper_many`, in int8    |
|                 |             | other 4-bit floats | integers, in bfloat16     | `hopper_many`             |

Integers come in bfloat16 only where it holds them and float32 the sums, exactly.
"""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.devices import device_kind
from jaxq.formats import Float, Format, Int
from jaxq.formats.integer import narrow
from jaxq.kernels.expansion import WIDEST_EXPONENT
from jaxq.kernels.layout import fits
from jaxq.kernels.plain import Integers, largest_integer
from jaxq.qtensor import InputQuant, PerToken

COLUMNS = 128  # of the weight, that a warpgroup multiplies at once
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")  # how `jax.Device.device_kind` begins
FEW = {4: 32, 8: 16}  # rows, by the bits of a weight (timed on an H200)
GROUPED = {4: 64, 8: 16}  # with more, XLA multiplies
CHANNELS = 512, 32768  # of a row, that the kernel holds in registers, and the vectors for it in shared memory
# An estimate: with fewer, quantizing is a small part of a product, and XLA may do it where it computes x.
LEAST_ROWS = 256
EXACT = 2**24  # below it float32 holds all integers


def target(*operands: jax.Array) -> str | None:
    """The kind of GPU that a program is traced for, if there is a kernel for it that can have these operands."""
    kind = device_kind(*operands)
    return kind if kind is not None and kind.startswith(HOPPER) else None


def has_kernel(x: Integers, fmt: Format | None, columns: int, groups: int, sums: jax.Array | None) -> bool:
    """Whether `packed_product` multiplies [M, K] with `columns` columns of weights of a format in so many groups."""
    return _read_as(x, fmt, columns, groups, sums) is not None


def in_int8(fmt: Int | Float) -> bool:
    """Whether there is a product in int8 with the codes of a format, of 4 or 8 bits."""
    return isinstance(fmt, Int) or fmt in (Float(2, 1), Float(1, 2))


def _few(rows: int, fmt: Int | Float, groups: int) -> bool:
    return rows <= (FEW if groups == 1 else GROUPED)[fmt.bits]


def _read_as(x: Integers, fmt: Format | None, columns: int, groups: int, sums: jax.Array | None) -> Any:
    """The dtype in which a kernel reads the activation, None where there is no kernel."""
    rows, k = x.values.shape
    if not isinstance(fmt, Int | Float) or fmt.bits not in (4, 8) or columns % COLUMNS or not fits(k, groups):
        return None
    few = _few(rows, fmt, groups)
    if (groups > 1 and not few) or (isinstance(fmt, Float) and fmt.exponent_bits > WIDEST_EXPONENT):
        return None
    if x.bound is None:
        return jnp.bfloat16 if x.values.dtype == jnp.bfloat16 else None
    if x.center is not None and sums is None:
        return None
    assert x.largest is not None
    if not few and in_int8(fmt) and x.largest <= 128 and k * 2**14 < 2**31:
        return jnp.int8
    largest = largest_integer(fmt) if fmt.symmetric else 2**fmt.bits - 1  # less a zero point that is any code
    exact = x.bound.bit_length() <= 8 and x.largest * largest * (k // groups) < EXACT
    return jnp.bfloat16 if fmt.bits == 4 and exact else None


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
    x: Integers,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    fmt: Int | Float,
    sums: jax.Array | None,
    *,
    dtype: Any,
) -> jax.Array:
    """`jaxq.kernels.plain.product` of `has_kernel`'s operands, by a kernel: y [M, N] of `dtype`.

    Centers come after the integers' product, in float32: (x + a)(W + b) = xW + a (sum(W) + K b) + b sum(x), in each
    group.

    Args:
      x: as there.
      codes: of the weights, packed: uint8 [K/2, N], or of 8 bits uint8 or int8 [K, N].
      scale, zero: of the weight's grid, float32; [groups, N], or 1 for either.
      fmt: of the codes.
      sums: of the weight's integers over each group, int32 [groups, N].
    """
    (rows, k), groups, n = x.values.shape, scale.shape[0], codes.shape[1]
    read_as = _read_as(x, fmt, n, groups, sums)
    if read_as == jnp.int8:
        values = narrow(x.values, jnp.int8) if x.int8 is None else x.int8
    else:
        values = x.values.astype(jnp.bfloat16)
    codes = lax.bitcast_convert_type(codes, jnp.uint8)
    scale = jnp.broadcast_to(scale, (groups, n))
    zero = None if zero is None else jnp.broadcast_to(zero.astype(jnp.float32), (groups, n))
    center = None if zero is None else 2 ** (fmt.bits - 1) - zero
    total = None
    if x.center is not None:
        assert sums is not None
        total = sums.astype(jnp.float32) + (0 if center is None else k // groups * center)
    product = _of_few if _few(rows, fmt, groups) else _of_many
    return product(x, values, codes, scale, zero, fmt, total, dtype)


def _of_few(
    x: Integers, values: jax.Array, codes: jax.Array, scale: jax.Array, zero: Any, fmt: Any, total: Any, dtype: Any
) -> jax.Array:
    """By `hopper_matmul`; `total` are the sums of the weight, less its zero points, [groups, N]."""
    from jaxq.kernels.hopper_matmul import hopper_matmul  # not above: not every jaxlib comes with Mosaic GPU

    whole = x.scale is None and x.center is None
    y = hopper_matmul(values, codes, scale, fmt, zero=zero, dtype=dtype if whole else jnp.float32)
    if x.center is not None:
        y = y + x.center * (total * scale).sum(0, keepdims=True)
    return (y if x.scale is None else y * x.scale).astype(dtype)


def _of_many(
    x: Integers, values: jax.Array, codes: jax.Array, scale: jax.Array, zero: Any, fmt: Any, total: Any, dtype: Any
) -> jax.Array:
    """By `hopper_many`, which writes the result as it is."""
    from jaxq.kernels.hopper_many import hopper_many

    rows, row, scale = values.shape[0], x.scale, scale[0]
    if row is not None and row.shape[0] == 1:
        row, scale = None, scale * row[0]
    left, right = [], []
    if x.center is not None:
        left, right = [jnp.broadcast_to(x.center, (rows, 1))[:, 0]], [total[0]]
    if zero is not None and values.dtype == jnp.int8:
        left.append(values.sum(1, dtype=jnp.int32).astype(jnp.float32))
        right.append(2 ** (fmt.bits - 1) - zero[0])
        zero = None
    return hopper_many(
        values,
        codes,
        scale,
        fmt,
        zero=None if zero is None else zero[0],
        row=None if row is None else row[:, 0],
        left=jnp.stack(left) if left else None,
        right=jnp.stack(right) if right else None,
        dtype=dtype,
    )
