"""What a Hopper GPU does in place of `jaxq.kernels.plain`: see `hopper_matmul`, `hopper_many` and `hopper_quantize`.

Which products have a kernel, and which one:

| rows            | scales      | weights                   | activations               | kernel                 |
|-----------------|-------------|---------------------------|---------------------------|------------------------|
| up to `FEW`     | per channel | 4 and 8 bits, not `SMALL` | bfloat16                  | `hopper_matmul`        |
|                 |             | 4 bits, not `SMALL`       | integers, in bfloat16     |                        |
| others          | per channel | 4 and 8 bits              | bfloat16                  | `hopper_many`          |
|                 |             | `in_int8`                 | integers of 8 bits        | `hopper_many`, in int8 |
|                 |             | other 4-bit floats        | integers, in bfloat16     | `hopper_many`          |
| any             | per channel | integers, 8 bits          | integers of 8 bits        | `hopper_many`, in int8 |
| up to `GROUPED` | of groups   | 4 and 8 bits              | bfloat16                  | `hopper_matmul`        |
|                 |             | 4 bits                    | integers, in bfloat16     |                        |
| others          | of groups   | 4 and 8 bits              | bfloat16 or integers      | `hopper_many`, rounded |

Integers come in bfloat16 only where it holds them and, but for the last row, float32 the sums, exactly. Rounded are
scaled weights, to bfloat16, where the program has them in it: there integers of groups are few up to `FEW`, if not
`SMALL`, and in programs in float32 all weights in groups up to `UNROUNDED`.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.devices import device_kind
from jaxq.formats import Float, Format, Int
from jaxq.formats.integer import narrow
from jaxq.formats.scales import Scales
from jaxq.kernels.expansion import WIDEST_EXPONENT
from jaxq.kernels.layout import fits
from jaxq.kernels.plain import Integers, largest_integer
from jaxq.qtensor import Grid, InputQuant, PerToken

COLUMNS = 128  # of the weight, that a warpgroup multiplies at once
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")  # how `jax.Device.device_kind` begins
FEW = 16  # rows
SMALL = 2**24  # numbers of a weight, up to which the kernel for many rows is the faster one for any (H200)
GROUPED = 8  # rows, with weights in groups
UNROUNDED = {4: 64, 8: 16}  # likewise, of programs in float32, by the bits of a weight; with more, XLA decodes them
CHANNELS = 512, 32768  # of a row, that the kernel holds in registers, and the vectors for it in shared memory
# From so many rows on it is faster than XLA (H200), which may quantize where it computes x.
LEAST_ROWS = 256
SMALLEST_GROUP = 16
EXACT = 2**24  # below it float32 holds all integers


def target(*operands: jax.Array) -> str | None:
    """The kind of GPU that a program is traced for, if there is a kernel for it that can have these operands."""
    kind = device_kind(*operands)
    return kind if kind is not None and kind.startswith(HOPPER) else None


def has_kernel(
    x: Integers, fmt: Format | None, columns: int, groups: int, sums: jax.Array | None, seen: Any = jnp.float32
) -> bool:
    """Whether `packed_product` multiplies [M, K] with `columns` columns of weights of a format in so many groups, which
    the program has in the dtype `seen`: in bfloat16 scaled weights may be rounded to it."""
    return _read_as(x, fmt, columns, groups, sums, seen) is not None


def in_int8(fmt: Int | Float) -> bool:
    """Whether there is a product in int8 with the codes of a format, of 4 or 8 bits."""
    return isinstance(fmt, Int) or fmt in (Float(2, 1), Float(1, 2))


def _few(rows: int, fmt: Int | Float, groups: int, size: int, seen: Any) -> bool:
    """Whether these are few rows, for a weight of `size` numbers."""
    if groups > 1 and jnp.dtype(seen) != jnp.bfloat16:
        return rows <= UNROUNDED[fmt.bits]
    few = rows <= FEW and size > SMALL
    return few if groups == 1 else rows <= GROUPED or (few and isinstance(fmt, Int))


def _read_as(x: Integers, fmt: Format | None, columns: int, groups: int, sums: jax.Array | None, seen: Any) -> Any:
    """The dtype in which a kernel reads the activation, None where there is no kernel."""
    rows, k = x.values.shape
    if not isinstance(fmt, Int | Float) or fmt.bits not in (4, 8):
        return None
    if not rows or columns % COLUMNS or not fits(k, groups, SMALLEST_GROUP):
        return None
    few = _few(rows, fmt, groups, k * columns, seen)
    rounded, wide = groups > 1 and not few, isinstance(fmt, Float) and fmt.exponent_bits > WIDEST_EXPONENT
    if wide or (rounded and jnp.dtype(seen) != jnp.bfloat16):
        return None
    if x.bound is None:
        return jnp.bfloat16 if x.values.dtype == jnp.bfloat16 else None
    if rounded:
        return jnp.bfloat16 if x.significant is not None and x.significant <= 8 else None
    if x.center is not None and sums is None:
        return None
    assert x.largest is not None
    if groups == 1 and (not few or fmt.bits == 8) and in_int8(fmt) and x.largest <= 128 and k * 2**14 < 2**31:
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
    grid: Grid,
    fmt: Int | Float,
    sums: jax.Array | None,
    *,
    seen: Any = jnp.float32,
    dtype: Any,
) -> jax.Array:
    """`jaxq.kernels.plain.product` of `has_kernel`'s operands, by a kernel: y [M, N] of `dtype`.

    Centers come after the integers' product, in float32: (x + a)(W + b) = xW + a (sum(W) + K b) + b sum(x), in each
    group.

    Args:
      x: as there.
      codes: of the weights, packed: uint8 [K/2, N], or of 8 bits uint8 or int8 [K, N].
      grid: of the weight as a `Packed` has it stored, [groups, N], or 1 for either.
      fmt: of the codes.
      sums: of the weight's integers over each group, int32 [groups, N].
      seen: the dtype in which the program has the weight: in bfloat16 scaled weights of groups may be rounded to it.
    """
    (rows, k), groups, n = x.values.shape, grid.scale.shape[0], codes.shape[1]
    read_as, few = _read_as(x, fmt, n, groups, sums, seen), _few(rows, fmt, groups, k * n, seen)
    codes, rounded = lax.bitcast_convert_type(codes, jnp.uint8), groups > 1 and not few
    if read_as == jnp.int8:
        values = narrow(x.values, jnp.int8) if x.int8 is None else x.int8
    else:
        values = (x.centered if rounded else x.values).astype(jnp.bfloat16)
    total = None
    if x.center is not None and not rounded:
        assert sums is not None
        total = sums.astype(jnp.float32)
        if grid.zero is not None:
            total = total + k // groups * (2 ** (fmt.bits - 1) - grid.zero.astype(jnp.float32))
    product = _of_few if few and read_as == jnp.bfloat16 else _of_many
    return product(replace(x, values=values), codes, grid, fmt, total, dtype)


def _numbers(x: Integers, grid: Grid, columns: int) -> tuple[dict[str, Any], jax.Array]:
    """What both kernels are given beside the codes; and the scales that they find, in float32."""
    outer = grid.outer is not None and grid.outer.size == 1
    factors = [a.reshape(1, 1) for a in (x.scale, grid.outer if outer else None) if a is not None and a.size == 1]
    read, each = grid.from_bytes(), (grid.scale.shape[0], columns)
    scales: Scales = grid.scales if outer else "real"
    return {
        "scale": jnp.broadcast_to(grid.scale if outer else read.factor, each),
        "zero": None if grid.zero is None else jnp.broadcast_to(grid.zero, each),
        "factor": prod(factors[1:], start=factors[0]) if factors else None,
        "scales": scales,
    }, read.scale if outer else read.factor


def _of_few(x: Integers, codes: jax.Array, grid: Grid, fmt: Any, total: jax.Array | None, dtype: Any) -> jax.Array:
    """By `hopper_matmul`; `total` are the sums of the weight, less its zero points, [groups, N]."""
    from jaxq.kernels.hopper_matmul import hopper_matmul  # not above: not every jaxlib comes with Mosaic GPU

    numbers, read = _numbers(x, grid, codes.shape[1])
    rows, by = None if x.scale is None or x.scale.size == 1 else x.scale, numbers["factor"]
    kept = dtype if rows is None and total is None else jnp.float32
    y = hopper_matmul(x.values, codes, fmt=fmt, **numbers, dtype=kept)
    if x.center is not None and total is not None:
        correction = (total * read).sum(0, keepdims=True)
        y = y + x.center * (correction if by is None else correction * by)
    return (y if rows is None else y * rows).astype(dtype)


def _of_many(x: Integers, codes: jax.Array, grid: Grid, fmt: Any, total: jax.Array | None, dtype: Any) -> jax.Array:
    """By `hopper_many`, which writes the result as it is."""
    from jaxq.kernels.hopper_many import hopper_many

    numbers, _ = _numbers(x, grid, codes.shape[1])
    left, right = [], []
    if x.center is not None and total is not None:
        left, right = [jnp.broadcast_to(x.center, (x.values.shape[0], 1))], [total]
    if grid.zero is not None and x.values.dtype == jnp.int8:
        left.append(x.values.sum(1, dtype=jnp.int32, keepdims=True).astype(jnp.float32))
        right.append(2 ** (fmt.bits - 1) - numbers.pop("zero").astype(jnp.float32))
    return hopper_many(
        x.values,
        codes,
        fmt=fmt,
        row=None if x.scale is None or x.scale.size == 1 else x.scale[:, 0],
        left=jnp.concatenate(left, 1).T if left else None,
        right=jnp.concatenate(right) if right else None,
        dtype=dtype,
        **numbers,
    )
