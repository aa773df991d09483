"""Products of many rows with packed weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

    y[m, n] = (sum_k x[m, k] c[k, n] + sum_i left[i, m] right[i, n]) * row[m] * scale[n] * factor

with x in bfloat16 or int8 and c what the weight's codes stand for (an asymmetric 4-bit integer's: the code less 8);
zero points of both sides are `left` and `right`. Of weights in groups of channels, for x in bfloat16, c is that times
the group's scale, rounded to bfloat16: what a program in bfloat16 makes of a quantized weight, too. (Scales in float32
are taken as the sum of two bfloat16: what is rounded is within 2**-17 of the weight.)

The weight is the left operand of the tensor cores, transposed and expanded in registers, as in `hopper_matmul`; see
`hopper_weights`. What differs is who does it. A block has three warpgroups: one copies, two multiply 64 or 128 columns
each with the same rows of x, so that one expands while the other's products run. With 64 columns and up to 256 rows
weights are expanded half as often as with 128 and 128, and as many sums fit the registers. Blocks stay: each takes the
next tile of the result in an order that keeps what neighbours read in the cache.

Columns, rows and parts of K are chosen for the least time, see `hopper_tiles`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Float, Int
from jaxq.formats.scales import Scales, from_bytes
from jaxq.kernels import hopper_registers as registers
from jaxq.kernels.expansion import packed_values
from jaxq.kernels.gpu import COLUMNS, SMALLEST_GROUP
from jaxq.kernels.hopper_columns import RESULT, per_row, result, scaled
from jaxq.kernels.hopper_matmul import NO_INDEX
from jaxq.kernels.hopper_scales import real
from jaxq.kernels.hopper_tiles import MULTIPLYING, PROCESSORS, Groups, Shape, shape_of
from jaxq.kernels.hopper_weights import Weights, weights
from jaxq.kernels.layout import BLOCK, HALF, fits

ABREAST = 12  # tiles of rows that blocks work on at a time


def hopper_many(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    zero: jax.Array | None = None,
    factor: jax.Array | None = None,
    row: jax.Array | None = None,
    left: jax.Array | None = None,
    right: jax.Array | None = None,
    scales: Scales = "real",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The product above as one kernel. `plain_hopper_many` is its meaning, but for the order of summation.

    Args:
        x: [M, K] bfloat16, or int8 where there are no groups.
        w: packed codes, uint8 [K/2, N] of 4 bits, as in `jaxq.kernels.layout`, or [K, N] of 8.
        scale: [G, N], of groups of K/G channels, float32 or uint8 as `scales` says.
        fmt: of the codes, one that `jaxq.kernels.hopper_weights` has for x.
        zero: of an asymmetric integer, for x in bfloat16: [G, N] float32 or uint8, whole numbers up to 256, the codes
            that stand for 0. None is 8 or 128.
        factor: what the result is multiplied by, [1, 1] float32; None is 1.
        row: [M] float32; None is 1.
        left, right: [I, M] and [I, N] float32, or None.
        scales: how they are stored, see `jaxq.formats.scales`.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: the shapes do not fit each other or the kernel, or it does not take the format.
    """
    (m, k), (count, n) = x.shape, scale.shape
    made, numbers = weights(fmt, x.dtype), [scale] if zero is None else [scale, zero]
    fit = w.shape == (k * fmt.bits // 8, n) and n % COLUMNS == 0 and fits(k, count, SMALLEST_GROUP)
    if not fit or numbers[-1].shape != scale.shape or (count > 1 and x.dtype != jnp.bfloat16):
        raise ValueError(
            f"x {x.shape} of {x.dtype}, packed weights {w.shape} of {fmt}, scales {scale.shape}, zero points "
            f"{None if zero is None else zero.shape}: the kernel takes x [M, K], weights [K * bits / 8, N], scales and "
            "zero points [G, N], K in blocks of 256, N in multiples of 128 and, for x in bfloat16, groups of 16, 32, "
            "64 or a multiple of 128 channels"
        )
    groups = Groups(k // count, scales, sum(a.dtype.itemsize for a in numbers) if count > 1 else 0)
    shape = shape_of(m, k, n, fmt.bits, x.dtype, made, groups)

    def of_rows(vectors: jax.Array | None) -> jax.Array | None:
        return None if vectors is None else jnp.pad(vectors, ((0, 0), (0, shape.down * shape.rows - m)))

    summed = x.sum(1, dtype=jnp.int32)[None] if made.bias else None
    of = {} if groups.held else dict(zip(("scale", "zero"), numbers))
    of |= {"factor": factor, "right": right, "row": of_rows(None if row is None else row[None])}
    of |= {"left": of_rows(left), "sums": of_rows(summed)}
    of = {name: vectors for name, vectors in of.items() if vectors is not None}
    y = plgpu.kernel(
        partial(_kernel, names=tuple(of), made=made, shape=shape),
        out_type=jax.ShapeDtypeStruct((shape.splits, m, n), dtype if shape.splits == 1 else jnp.float32),
        grid=(min(shape.down * shape.across * shape.splits, PROCESSORS),),
        grid_names=("block",),
        num_threads=MULTIPLYING + 1,
        thread_name="warpgroup",
        kernel_name="jaxq_hopper_many",
    )(jnp.pad(x, ((0, -m % 8), (0, 0))), w, *(numbers if groups.held else []), *of.values())  # whole tiles of x
    return y[0] if shape.splits == 1 else y.sum(0).astype(dtype)


def _kernel(x: Any, w: Any, *rest: Any, names: tuple[str, ...], made: Weights, shape: Shape) -> None:
    *vectors, out = rest
    numbers, codes = vectors[: len(vectors) - len(names)], shape.codes
    operands = [w, *[x] * codes, *(of for of in numbers for _ in range(codes))]
    of, warpgroup = dict(zip(names, vectors[len(numbers) :])), lax.axis_index("warpgroup")
    rows, down, across, width = shape.rows, shape.down, shape.across, shape.columns

    def blocks(**allocations: Any) -> None:
        @plgpu.nd_loop((shape.splits * down * across,), collective_axes="block")
        def _(at: Any) -> None:
            (number,) = at.index
            split, number = lax.div(number, down * across), lax.rem(number, down * across)
            i, j = plgpu.planar_snake(number, (down, across), 0, ABREAST)
            column = (j * MULTIPLYING + warpgroup) * width

            def multiply(pipeline: Any) -> None:
                def scoped(sums: Any) -> None:
                    zeros = None
                    if "zero" in of:
                        here = of["zero"].at[0, pl.ds(jnp.minimum(column, shape.n - width), width)]
                        zeros = [[_zero(made, here)]] * codes
                    pipeline((sums, zeros))

                    @pl.when(column < shape.n)
                    def _() -> None:
                        found = result(sums[...])
                        y = _finished(found, of, made, shape, split, pl.ds(i * rows, rows), pl.ds(column, width))
                        to = out.at[split, pl.ds(i * rows, rows), pl.ds(column, width)]
                        registers.store_rows(to, y.astype(out.dtype), shape.m - i * rows, RESULT)

                pl.run_scoped(scoped, plgpu.WGMMAAccumulatorRef((width, rows), made.sums))

            _pipeline(made, shape, (split, i, j), operands, multiply)(*operands, allocations=allocations)

    somewhere = _pipeline(made, shape, (0, 0, 0), operands, lambda _: None)
    pl.run_scoped(blocks, **somewhere.get_allocations(*operands), collective_axes="warpgroup")


def _pipeline(made: Weights, shape: Shape, tile: tuple, operands: list, context: Callable[[Any], None]) -> Any:
    """The steps of a tile (split, i, j) of the result: of the weight, of x for each of a byte's codes, and for each of
    these of what groups have."""
    (split, i, j), depth, steps, codes = tile, shape.depth, shape.steps, shape.codes
    groups, each, width, dtype = shape.groups, shape.groups.each(depth), MULTIPLYING * shape.columns, operands[1].dtype
    columns = pl.ds(lax.axis_index("warpgroup") * shape.columns, shape.columns)

    def body(_: Any, part: Any, *rest: Any) -> Any:
        *parts, (sums, zeros) = rest
        x_parts, scales, taken = parts[:codes], parts[codes : 2 * codes], parts[2 * codes :]
        for at in range(0, depth, made.depth):
            here, first = pl.ds(at, made.depth), at * each // depth
            touched = range(first, first + groups.each(made.depth))
            zeros = [[_zero(made, of.at[g, columns]) for g in touched] for of in taken] or zeros
            for code, fragment in enumerate(made.fragments(part.at[here], zeros)):
                if scales:
                    factors = [_factors(groups.scales, scales[code].at[g, columns]) for g in touched]
                    fragment = scaled(fragment, factors)
                plgpu.wgmma(sums, fragment, x_parts[code].at[:, here].transpose((1, 0)))
        # All of them: over the end of a loop's body the compiler does not keep the registers of one that is under way.
        plgpu.wgmma_wait(0)
        return rest[-1]

    def channel(code: int, step: Any) -> Any:
        """The first of a step that have their code in this place of a byte."""
        byte = (split * steps + step) * depth
        return byte if codes == 1 else byte // HALF * BLOCK + code * HALF + byte % HALF

    def of_x(code: int) -> plgpu.BlockSpec:
        return _spec((shape.rows, depth), lambda step: (i, channel(code, step) // depth), dtype)

    def of_groups(code: int) -> plgpu.BlockSpec:
        return plgpu.BlockSpec((each, width), lambda step: (channel(code, step) // groups.size // each, j))

    specs = [_spec((depth, width), lambda step: (split * steps + step, j), jnp.dtype(jnp.uint8))]
    specs += [of_x(code) for code in range(codes)]
    specs += [of_groups(code) for _ in operands[1 + codes :: codes] for code in range(codes)]
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=specs,
        max_concurrent_steps=shape.under_way,
        num_compute_wgs=MULTIPLYING,
        memory_registers=40,
        wg_axis="warpgroup",
        compute_context=context,
    )


def _loaded(scales: Scales, numbers: Any) -> jax.Array:
    """Numbers of this warpgroup's columns, as a row of a result: float32 [64 s]."""
    row = RESULT.reduce(0)
    return real(scales, plgpu.load(numbers, *NO_INDEX, layout=row, optimized=False), row)


def _zero(made: Weights, zeros: Any) -> jax.Array:
    """What is taken off expanded codes."""
    return per_row(_loaded("real", zeros)) * jnp.float32(made.unit)


def _factors(scales: Scales, stored: Any) -> list[jax.Array]:
    """The bfloat16 that scales are the sum of: two are near to float32, those that are stored as bytes are one."""
    scale = _loaded(scales, stored)
    first = scale.astype(jnp.bfloat16)
    return [first, (scale - first.astype(jnp.float32)).astype(jnp.bfloat16)] if scales == "real" else [first]


def _spec(block: tuple[int, int], index: Any, dtype: Any) -> plgpu.BlockSpec:
    """Blocks in shared memory in rows of 128 bytes, swizzled against bank conflicts."""
    transforms = plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128)
    return plgpu.BlockSpec(block, index, transforms=transforms)


def _finished(
    sums: jax.Array, of: dict[str, Any], made: Weights, shape: Shape, split: Any, rows: Any, columns: Any
) -> jax.Array:
    """What the result is for a tile's sums [rows, 128]; what is added to them is added to the first part of K."""

    def vector(name: str, i: int, axis: int) -> jax.Array:
        ref = of[name].at[i, (rows, columns)[axis]]
        layout = RESULT.reduce(1 - axis)
        found = plgpu.load(ref, *NO_INDEX, layout=layout, optimized=False)
        found = real(shape.groups.scales, found, layout) if name == "scale" else found
        return plgpu.layout_cast(lax.broadcast_in_dim(found, sums.shape, (axis,)), RESULT)

    if "sums" in of:  # of x, which the bias was multiplied with
        sums = sums - vector("sums", 0, 0) * jnp.where(split == 0, jnp.int32(made.bias), jnp.int32(0))
    y = sums.astype(jnp.float32) * jnp.float32(1 / made.unit)
    if "left" in of:
        for i in range(of["left"].shape[0]):
            y = y + vector("left", i, 0) * vector("right", i, 1) * (split == 0).astype(jnp.float32)
    if "row" in of:
        y = y * vector("row", 0, 0)
    if "factor" in of:
        y = y * of["factor"][0, 0]
    return y * vector("scale", 0, 1) if "scale" in of else y


def plain_hopper_many(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    zero: jax.Array | None = None,
    factor: jax.Array | None = None,
    row: jax.Array | None = None,
    left: jax.Array | None = None,
    right: jax.Array | None = None,
    scales: Scales = "real",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """What `hopper_many` means, in plain jnp, for any M, K, N and size of groups that divides K."""
    values, scale = packed_values(fmt, w, x.shape[1]).reshape(len(scale), -1, w.shape[1]), from_bytes(scales, scale)
    if zero is not None:
        values = values + (2 ** (fmt.bits - 1) - zero.astype(jnp.float32))[:, None]
    if len(scale) > 1:
        first = _rounded(scale)
        rest = _rounded(values * _rounded(scale - first)[:, None]) if scales == "real" else 0
        values, scale = _rounded(values * first[:, None] + rest), jnp.ones((1, 1))
    y = jnp.dot(x.astype(jnp.float32), values.reshape(x.shape[1], -1), precision="highest")
    if left is not None and right is not None:
        y = y + jnp.dot(left.T, right, precision="highest")
    y = y if row is None else y * row[:, None]
    return ((y if factor is None else y * factor) * scale).astype(dtype)


def _rounded(a: jax.Array) -> jax.Array:
    """To bfloat16, in float32: not a conversion, which XLA may leave out."""
    return lax.reduce_precision(a, 8, 7)
