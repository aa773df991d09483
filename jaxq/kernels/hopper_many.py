"""Products of many rows with packed weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

What is multiplied is as in `jaxq.kernels.hopper_matmul`, and so is the way from packed bytes to the tensor cores:
the weight is their left operand, expanded in registers. What differs is who does it. A block has three warpgroups: one
copies, two multiply 128 columns each with the same rows of x, so that one expands while the other's products run, and
each leaves its last product running while it expands the next. Blocks stay: each takes the next tile of the result
while its first steps are already under way, in an order that keeps what neighbours read in the cache.

Rows are cut so that the multiprocessors share the work evenly, `tiles`; K is cut where there are few tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Float, Int
from jaxq.kernels import hopper_registers as registers
from jaxq.kernels.expansion import whole_expansions
from jaxq.kernels.gpu import COLUMNS
from jaxq.kernels.hopper_matmul import NO_INDEX, _spec
from jaxq.kernels.hopper_registers import DEPTH
from jaxq.kernels.layout import BLOCK, HALF, fits

MULTIPLYING = 2  # warpgroups of a block
WIDTH = MULTIPLYING * COLUMNS  # of a block
SHARED = 220 << 10  # bytes of shared memory of a block, for its steps under way
PROCESSORS = 132
ABREAST = 12  # tiles of rows that blocks work on at a time


def hopper_many(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """`jaxq.kernels.hopper_matmul.hopper_matmul`, whose meaning it has, for many rows.

    Args:
        x: [M, K] bfloat16.
        w: packed codes, uint8 [K/2, N] of 4 bits, as in `jaxq.kernels.layout`, or [K, N] of 8.
        scale: [G, N] float32.
        fmt: of the codes, one that `jaxq.kernels.expansion` has.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: the shapes do not fit each other or the kernel, or it does not take the format.
    """
    (m, k), n, groups = x.shape, w.shape[1], scale.shape[0]
    made = whole_expansions(fmt)
    if 8 * w.shape[0] != k * fmt.bits or scale.shape[1] != n or not fits(k, groups) or n % COLUMNS:
        raise ValueError(f"x {x.shape}, packed weights {w.shape} of {fmt}, scales {scale.shape}: see hopper_matmul")
    rows, splits = tiles(m, w.shape[0], n, groups)
    x = jnp.pad(x, ((0, -m % 8), (0, 0)))  # whole tiles of shared memory
    count = -(-m // rows) * -(-n // WIDTH) * splits
    y = plgpu.kernel(
        partial(_kernel, fmt=fmt, rows=rows, steps=-(-w.shape[0] // DEPTH // splits)),
        out_type=jax.ShapeDtypeStruct((splits, m, n), dtype if splits == 1 else jnp.float32),
        grid=(min(count, PROCESSORS),),
        grid_names=("block",),
        num_threads=MULTIPLYING + 1,
        thread_name="warpgroup",
        kernel_name="jaxq_hopper_many",
    )(x, w, scale / jnp.float32(made[0].unit))
    return y[0] if splits == 1 else y.sum(0).astype(dtype)


def tiles(m: int, depth: int, n: int, groups: int) -> tuple[int, int]:
    """How many rows of x a block multiplies at a time, and into how many parts K is cut, for weights of `depth` bytes
    a column: what should take the fewest cycles, estimated."""
    steps, most = depth // DEPTH, 128 if groups == 1 else 48

    def cycles(choice: tuple[int, int]) -> float:
        rows, splits = choice
        rounds = -(-(-(-m // rows) * -(-n // WIDTH) * splits) // PROCESSORS)
        work = rounds * (-(-steps // splits) * max(16 * rows, 700) + 4000)
        return work + (m * n * splits / 400 + 3000 if splits > 1 else 0)

    rows, splits = min(product(range(8, most + 1, 8), range(1, min(8, steps // 2) + 1)), key=cycles)
    return rows, -(-steps // -(-steps // splits))


def _kernel(x: Any, w: Any, scale: Any, out: Any, *, fmt: Int | Float, rows: int, steps: int) -> None:
    (splits, m, n), made, codes = out.shape, whole_expansions(fmt), 8 // fmt.bits  # in a byte
    down, across = -(-m // rows), -(-n // WIDTH)
    own = lax.axis_index("warpgroup") * COLUMNS  # the first column of the warpgroup's in a block

    def multiply(w_part: Any, x_parts: Sequence[Any], sums: Any) -> None:
        """While one expansion is multiplied, the next is made."""
        part = plgpu.layout_cast(w_part[:, pl.ds(own, COLUMNS)], registers.BYTES)
        words = registers.pairs(part)
        for expansion, x_part in zip(made, x_parts):
            plgpu.wgmma(sums, expansion.expanded(words, registers.fragments), x_part.transpose((1, 0)))

    def body(_: Any, w_part: Any, *rest: Any) -> Any:
        *x_parts, sums = rest
        multiply(w_part, x_parts, sums)
        plgpu.wgmma_wait(1)  # the step before is done with; its buffers are released now
        return sums

    def tile_pipeline(tile: tuple, context: Any) -> Any:
        split, i, j = tile

        def index(code: int, unit: int, step: Any) -> Any:
            """In units of so many channels, where those of a step are that have their code in this place of a byte."""
            byte = (split * steps + step) * DEPTH
            return (byte if codes == 1 else byte // HALF * BLOCK + code * HALF + byte % HALF) // unit

        def x_spec(code: int) -> plgpu.BlockSpec:
            return _spec((rows, DEPTH), lambda t: (i, index(code, DEPTH, t)), x.dtype)

        specs = [_spec((DEPTH, WIDTH), lambda t: (split * steps + t, j), w.dtype), *map(x_spec, range(codes))]
        step_bytes = DEPTH * (WIDTH + codes * rows * x.dtype.itemsize)
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps,),
            in_specs=[_delayed(spec) for spec in specs],
            max_concurrent_steps=min(SHARED // step_bytes, steps),
            num_compute_wgs=MULTIPLYING,
            memory_registers=40,
            wg_axis="warpgroup",
            compute_context=context,
        )

    operands = [w, *[x] * codes]

    def blocks(allocations: Any, multiplied_all: Any) -> None:
        @plgpu.nd_loop((splits * down * across,), collective_axes="block")
        def _(at: Any) -> None:
            (number,) = at.index
            split, number = lax.div(number, down * across), lax.rem(number, down * across)
            i, j = plgpu.planar_snake(number, (down, across), 0, ABREAST)
            first, column = i * rows, j * WIDTH + own

            def context(pipeline: Any) -> None:
                def multiplied(sums: Any) -> None:
                    pipeline(sums)
                    y = registers.result(sums[...])
                    plgpu.barrier_arrive(multiplied_all)

                    @pl.when(column < n)
                    def _() -> None:
                        factors = plgpu.load(
                            scale.at[0, pl.ds(column, COLUMNS)],
                            *NO_INDEX,
                            layout=registers.BYTES.reduce(0),
                            optimized=False,
                        )
                        factors = plgpu.layout_cast(
                            lax.broadcast_in_dim(factors, (rows, COLUMNS), (1,)), registers.BYTES
                        )
                        registers.store_rows(
                            out.at[split, pl.ds(first, rows), pl.ds(column, COLUMNS)],
                            (y * factors).astype(out.dtype),
                            m - first,
                        )

                pl.run_scoped(multiplied, plgpu.WGMMAAccumulatorRef((COLUMNS, rows), jnp.float32))

            tile_pipeline((split, i, j), context)(*operands, allocations=allocations)

            @pl.when(own == MULTIPLYING * COLUMNS)
            def _() -> None:
                """The last step's buffers are not released otherwise."""
                plgpu.barrier_wait(multiplied_all)

    nowhere = tile_pipeline((0, 0, 0), lambda _: None).get_allocations(*operands)
    done = plgpu.Barrier(num_arrivals=MULTIPLYING)
    pl.run_scoped(blocks, nowhere, done, collective_axes="warpgroup")


def _delayed(spec: plgpu.BlockSpec) -> plgpu.BlockSpec:
    """Its buffers are released a step later."""
    return plgpu.BlockSpec(spec.block_shape, spec.index_map, transforms=spec.transforms, delay_release=1)
