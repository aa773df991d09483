"""Products of many rows with packed weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

    y[m, n] = (sum_k x[m, k] c[k, n] + sum_i left[i, m] right[i, n]) * row[m] * scale[n]

with x in bfloat16 or int8 and c what the weight's codes stand for (an asymmetric 4-bit integer's: the code less 8);
zero points of both sides are `left` and `right`.

The weight is the left operand of the tensor cores, transposed and expanded in registers, as in `hopper_matmul`; see
`hopper_weights`. What differs is who does it. A block has three warpgroups: one copies, two multiply 64 or 128 columns
each with the same rows of x, so that one expands while the other's products run. With 64 columns and up to 256 rows
weights are expanded half as often as with 128 and 128, and as many sums fit the registers. Blocks stay: each takes the
next tile of the result in an order that keeps what neighbours read in the cache.

Columns, rows and parts of K are chosen for the least time, `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Float, Int
from jaxq.kernels import hopper_registers as registers
from jaxq.kernels.expansion import packed_values
from jaxq.kernels.gpu import COLUMNS
from jaxq.kernels.hopper_columns import RESULT, SLICE, per_row, result
from jaxq.kernels.hopper_matmul import NO_INDEX
from jaxq.kernels.hopper_weights import Weights, weights
from jaxq.kernels.layout import BLOCK, HALF, fits

MULTIPLYING = 2  # warpgroups of a block
SHARED = 226 << 10  # bytes of shared memory of a block, for its steps under way
UNDER_WAY = 3  # steps at least, if deeper ones are to be taken
PROCESSORS = 132
ABREAST = 12  # tiles of rows that blocks work on at a time
MOST_SUMS = 256  # of a warpgroup's 64 columns, or half of 128 columns', whose sums then take half of the registers


@dataclass(frozen=True)
class Shape:
    """Of one product: [m, k] by [k, n] in tiles of `rows` and, for a warpgroup, `slices` times 64 columns; K in
    `splits` parts of `steps` steps of `depth` rows of packed bytes."""

    m: int
    n: int
    slices: int
    rows: int
    splits: int
    depth: int
    steps: int

    @property
    def columns(self) -> int:
        """Of a warpgroup."""
        return SLICE * self.slices

    @property
    def down(self) -> int:
        return -(-self.m // self.rows)

    @property
    def across(self) -> int:
        return -(-self.n // (MULTIPLYING * self.columns))


def hopper_many(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    zero: jax.Array | None = None,
    row: jax.Array | None = None,
    left: jax.Array | None = None,
    right: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The product above as one kernel. `plain_hopper_many` is its meaning, but for the order of summation.

    Args:
        x: [M, K] bfloat16 or int8.
        w: packed codes, uint8 [K/2, N] of 4 bits, as in `jaxq.kernels.layout`, or [K, N] of 8.
        scale: [N] float32.
        fmt: of the codes, one that `jaxq.kernels.hopper_weights` has for x.
        zero: of an asymmetric integer, for x in bfloat16: [N] float32, whole numbers up to 256, the codes that stand
            for 0. None is 8 or 128.
        row: [M] float32; None is 1.
        left, right: [I, M] and [I, N] float32, or None.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: the shapes do not fit each other or the kernel, or it does not take the format.
    """
    (m, k), n = x.shape, w.shape[1]
    made = weights(fmt, x.dtype)
    if 8 * w.shape[0] != k * fmt.bits or scale.shape != (n,) or not fits(k, 1) or n % COLUMNS:
        raise ValueError(
            f"x {x.shape}, packed weights {w.shape} of {fmt}, scales {scale.shape}: the kernel takes x [M, K], weights "
            "[K * bits / 8, N] and scales [N], K in blocks of 256 and N in multiples of 128"
        )
    slices, rows, splits = tiles(m, w.shape[0], n, made)
    codes = 8 // fmt.bits
    depth = step_depth(made, codes, slices, rows, x.dtype.itemsize)
    shape = Shape(m, n, slices, rows, splits, depth, -(-w.shape[0] // depth // splits))

    def of_rows(vectors: jax.Array | None) -> jax.Array | None:
        return None if vectors is None else jnp.pad(vectors, ((0, 0), (0, shape.down * rows - m)))

    summed = x.sum(1, dtype=jnp.int32)[None] if made.bias else None
    of = {"scale": scale[None], "zero": None if zero is None else zero[None], "right": right}
    of |= {"row": of_rows(None if row is None else row[None]), "left": of_rows(left), "sums": of_rows(summed)}
    of = {name: vectors for name, vectors in of.items() if vectors is not None}
    y = plgpu.kernel(
        partial(_kernel, names=tuple(of), made=made, codes=codes, shape=shape),
        out_type=jax.ShapeDtypeStruct((splits, m, n), dtype if splits == 1 else jnp.float32),
        grid=(min(shape.down * shape.across * splits, PROCESSORS),),
        grid_names=("block",),
        num_threads=MULTIPLYING + 1,
        thread_name="warpgroup",
        kernel_name="jaxq_hopper_many",
    )(jnp.pad(x, ((0, -m % 8), (0, 0))), w, *of.values())  # whole tiles of shared memory
    return y[0] if splits == 1 else y.sum(0).astype(dtype)


def tiles(m: int, depth: int, n: int, made: Weights) -> tuple[int, int, int]:
    """How many slices of 64 columns a warpgroup multiplies at a time, how many rows of x a block, and into how many
    parts K is cut, for weights of `depth` bytes a column: what should take the least time. That of a tile's end, of
    reading the weights and of adding up parts are as measured, too."""
    runs, (run, row) = depth // made.depth, made.ns

    def ns(choice: tuple[int, int, int]) -> float:
        slices, rows, splits = choice
        rounds = -(-(-(-m // rows) * -(-n // (MULTIPLYING * SLICE * slices)) * splits) // PROCESSORS)
        work = rounds * (-(-runs // splits) * slices * (run + row * rows) + 4000)
        return max(work, depth * n / 4300) + (m * n * splits / 700 + 700 if splits > 1 else 0)

    each = 16 if made.sums == jnp.int32 else 8  # what the tensor cores take
    shapes = [(slices, rows) for slices in (1, 2) for rows in range(each, MOST_SUMS // slices + 1, each)]
    choices = ((*shape, splits) for shape in shapes for splits in range(1, max(1, min(8, runs // 2)) + 1))
    return min(choices, key=ns)


def step_bytes(depth: int, codes: int, slices: int, rows: int, itemsize: int) -> int:
    """Of shared memory."""
    return depth * (MULTIPLYING * SLICE * slices + codes * rows * itemsize)


def step_depth(made: Weights, codes: int, slices: int, rows: int, itemsize: int) -> int:
    """How many rows of packed bytes a step has: what is expanded at once, or twice that, so that one half is expanded
    while the other is multiplied; channels of successive bytes are to be successive, too."""
    twice = 2 * made.depth
    fits = step_bytes(twice, codes, slices, rows, itemsize) * UNDER_WAY <= SHARED
    return twice if fits and (codes == 1 or twice <= HALF) else made.depth


def _kernel(x: Any, w: Any, *rest: Any, names: tuple[str, ...], made: Weights, codes: int, shape: Shape) -> None:
    *vectors, out = rest
    of, operands, warpgroup = dict(zip(names, vectors)), [w, *[x] * codes], lax.axis_index("warpgroup")
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
                        zeros = plgpu.load(here, *NO_INDEX, layout=RESULT.reduce(0), optimized=False)
                        zeros = per_row(zeros) * jnp.float32(made.unit)
                    pipeline((sums, zeros))

                    @pl.when(column < shape.n)
                    def _() -> None:
                        found = result(sums[...])
                        y = _finished(found, of, made, split, pl.ds(i * rows, rows), pl.ds(column, width))
                        to = out.at[split, pl.ds(i * rows, rows), pl.ds(column, width)]
                        registers.store_rows(to, y.astype(out.dtype), shape.m - i * rows, RESULT)

                pl.run_scoped(scoped, plgpu.WGMMAAccumulatorRef((width, rows), made.sums))

            _pipeline(made, codes, shape, (split, i, j), x.dtype, multiply)(*operands, allocations=allocations)

    somewhere = _pipeline(made, codes, shape, (0, 0, 0), x.dtype, lambda _: None)
    pl.run_scoped(blocks, **somewhere.get_allocations(*operands), collective_axes="warpgroup")


def _pipeline(made: Weights, codes: int, shape: Shape, tile: tuple, dtype: Any, context: Callable[[Any], None]) -> Any:
    """The steps of a tile (split, i, j) of the result."""
    (split, i, j), depth, steps, width = tile, shape.depth, shape.steps, MULTIPLYING * shape.columns

    def body(_: Any, part: Any, *rest: Any) -> Any:
        *x_parts, (sums, zeros) = rest
        for at in range(0, depth, made.depth):
            here = pl.ds(at, made.depth)
            for fragment, x_part in zip(made.fragments(part.at[here], zeros), x_parts):
                plgpu.wgmma(sums, fragment, x_part.at[:, here].transpose((1, 0)))
        # All of them: over the end of a loop's body the compiler does not keep the registers of one that is under way.
        plgpu.wgmma_wait(0)
        return sums, zeros

    def of_x(code: int, step: Any) -> tuple[Any, Any]:
        """Where the channels of a step are that have their code in this place of a byte."""
        byte = (split * steps + step) * depth
        return i, (byte if codes == 1 else byte // HALF * BLOCK + code * HALF + byte % HALF) // depth

    x_specs = [_spec((shape.rows, depth), partial(of_x, code), dtype) for code in range(codes)]
    each = step_bytes(depth, codes, shape.slices, shape.rows, dtype.itemsize)
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=[_spec((depth, width), lambda step: (split * steps + step, j), jnp.dtype(jnp.uint8)), *x_specs],
        max_concurrent_steps=min(SHARED // each, steps),
        num_compute_wgs=MULTIPLYING,
        memory_registers=40,
        wg_axis="warpgroup",
        compute_context=context,
    )


def _spec(block: tuple[int, int], index: Any, dtype: Any) -> plgpu.BlockSpec:
    """Blocks in shared memory in rows of 128 bytes, swizzled against bank conflicts."""
    transforms = plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128)
    return plgpu.BlockSpec(block, index, transforms=transforms)


def _finished(sums: jax.Array, of: dict[str, Any], made: Weights, split: Any, rows: Any, columns: Any) -> jax.Array:
    """What the result is for a tile's sums [rows, 128]; what is added to them is added to the first part of K."""

    def vector(name: str, i: int, axis: int) -> jax.Array:
        ref = of[name].at[i, (rows, columns)[axis]]
        found = plgpu.load(ref, *NO_INDEX, layout=RESULT.reduce(1 - axis), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(found, sums.shape, (axis,)), RESULT)

    if "sums" in of:  # of x, which the bias was multiplied with
        sums = sums - vector("sums", 0, 0) * jnp.where(split == 0, jnp.int32(made.bias), jnp.int32(0))
    y = sums.astype(jnp.float32) * jnp.float32(1 / made.unit)
    if "left" in of:
        for i in range(of["left"].shape[0]):
            y = y + vector("left", i, 0) * vector("right", i, 1) * (split == 0).astype(jnp.float32)
    if "row" in of:
        y = y * vector("row", 0, 0)
    return y * vector("scale", 0, 1)


def plain_hopper_many(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    zero: jax.Array | None = None,
    row: jax.Array | None = None,
    left: jax.Array | None = None,
    right: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """What `hopper_many` means, in plain jnp, for any M, K and N."""
    values = packed_values(fmt, w, x.shape[1])
    if zero is not None:
        values = values + (2 ** (fmt.bits - 1) - zero)[None]
    y = jnp.dot(x.astype(jnp.float32), values, precision="highest")
    if left is not None and right is not None:
        y = y + jnp.dot(left.T, right, precision="highest")
    y = y if row is None else y * row[:, None]
    return (y * scale[None]).astype(dtype)
