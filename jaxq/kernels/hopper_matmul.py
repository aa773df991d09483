"""Products of bfloat16 activations with packed weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

    y[m, n] = sum_g scale[g, n] * sum_{k in g} x[m, k] c[k, n]

with c what the weight's codes stand for, less the zero point, and groups g of 16, 32, 64 or a multiple of 128 channels,
or all. For few rows of x: what counts is how fast the weight is read.

The weight is the left operand of the tensor cores, transposed: codes come from device memory through shared memory to
registers, where they are expanded and multiplied; nothing of the size of the weight is written anywhere, and few rows
pad to 8. A block is one warpgroup, which multiplies 128 columns and copies some steps ahead; several share a
multiprocessor, so that one expands while another waits. K is split over the blocks of a cluster, whose float32 sums the
first one adds, so that a product is one kernel. The tensor cores add bfloat16 products exactly: sums of integers below
2**24 are exact, which was seen on an H100 and an H200 (`experiments/RESULTS.md` has the times). Without a GPU the
kernel is compiled (`experiments/gpu_compiled.py`) and its PTX run in numpy, instruction by instruction
(`tests/kernels/ptx.py`).

Splitting K over two or four warpgroups of a block in place of blocks of a cluster was slower (H200), though steps were
then copied as soon as the registers had the last ones.
"""

from __future__ import annotations

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
from jaxq.kernels.expansion import expansions, packed_values
from jaxq.kernels.gpu import COLUMNS, SMALLEST_GROUP
from jaxq.kernels.hopper_registers import DEPTH
from jaxq.kernels.hopper_scales import real
from jaxq.kernels.layout import fits

SHARED = 208 << 10  # bytes of shared memory of a multiprocessor, for what its blocks hold
MULTIPROCESSORS = 132
RESIDENT = 4  # blocks of a multiprocessor at most
CLUSTER = 8  # blocks that share a column's sum at most, which is what every Hopper schedules together
STEP = 128  # rows of packed bytes
MOST = 24  # steps of a block with 8 rows, if more blocks can share them
NO_INDEX = (None,) if jax.__version_info__ < (0, 11) else ()  # of `plgpu.load`, which JAX 0.10 must be told


def hopper_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    zero: jax.Array | None = None,
    factor: jax.Array | None = None,
    scales: Scales = "real",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The product above as one kernel. `plain_hopper_matmul` is its meaning, but for the order of summation.

    Args:
        x: [M, K] bfloat16.
        w: packed codes, uint8 [K/2, N] of 4 bits, as in `jaxq.kernels.layout`, or [K, N] of 8.
        scale: [G, N] float32, or uint8 as `scales` says.
        fmt: of the codes, one that `jaxq.kernels.expansion` has.
        zero: of an asymmetric integer, [G, N] float32 or uint8, whole numbers up to 256: the codes that stand for 0.
            None is 8 or 128.
        factor: what the result is multiplied by, [1, 1] float32.
        scales: how they are stored, see `jaxq.formats.scales`.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: the shapes do not fit each other or the kernel: see `layout.fits`; or it does not take the format.
    """
    (m, k), n, groups = x.shape, w.shape[1], scale.shape[0]
    expansions(fmt)
    if 8 * w.shape[0] != k * fmt.bits or scale.shape[1] != n or not fits(k, groups, SMALLEST_GROUP) or n % COLUMNS:
        raise ValueError(
            f"x {x.shape}, packed weights {w.shape} of {fmt}, scales {scale.shape}: the kernel takes x [M, K], weights "
            "[K * bits / 8, N] and scales [G, N], K in blocks of 256, groups of 16, 32, 64 or a multiple of 128, and N "
            "in multiples of 128"
        )
    rows, splits = tiles(m, w.shape[0], n)
    if m > 8:  # fewer come as they are: what is missing from one tile of 8 rows is not read
        x = jnp.pad(x, ((0, -m % rows), (0, 0)))
    blocks = -(-m // rows) * (n // COLUMNS) * splits
    shared = SHARED // min(RESIDENT, -(-blocks // MULTIPROCESSORS))
    parts = plgpu.SMEM((splits - 1, COLUMNS, rows), jnp.float32, transforms=_rows_of(4 * rows))
    return plgpu.kernel(
        partial(_kernel, fmt=fmt, scales=scales, rows=rows, splits=splits, shared=shared),
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(-(-m // rows), n // COLUMNS),
        grid_names=("m", "n"),
        cluster=(splits,),
        cluster_names=("split",),
        kernel_name="jaxq_hopper_matmul",
        scratch_types=[parts, plgpu.Barrier(num_arrivals=splits - 1)] if splits > 1 else [],
    )(x, w, scale, zero, factor)


def tiles(m: int, depth: int, n: int) -> tuple[int, int]:
    """How many rows of x a block multiplies, and into how many parts K is cut, for weights of `depth` bytes a column:
    those that were fastest (H200)."""
    rows, wanted = (8, 2 * MULTIPROCESSORS - 14) if m <= 8 else (16, MULTIPROCESSORS + 28)
    blocks, splits = -(-m // rows) * (n // COLUMNS), 1
    steps = depth // STEP
    while splits < CLUSTER and 4 * splits <= steps and (blocks * splits < wanted or (m <= 8 and steps > MOST * splits)):
        splits *= 2
    return rows, splits


def _kernel(
    x: Any,
    w: Any,
    scale: Any,
    zero: Any,
    factor: Any,
    out: Any,
    parts: Any = None,
    arrived: Any = None,
    *,
    fmt: Int | Float,
    scales: Scales,
    rows: int,
    splits: int,
    shared: int,
) -> None:
    made, groups = expansions(fmt), scale.shape[0]
    codes = len(made)  # in a byte
    size, deep = x.shape[1] // groups, codes * STEP  # channels of a group, of a step
    each = max(1, STEP // size)  # groups among the channels of a step that have their code in the same place of a byte
    zeros, by = [] if zero is None else [zero], 1 if factor is None else factor[0, 0]
    kinds: list[Scales] = [scales, "real"]
    i, j, split = (lax.axis_index(name) for name in ("m", "n", "split"))
    columns, steps = pl.ds(j * COLUMNS, COLUMNS), -(-w.shape[0] // STEP // splits)

    def each_column(here: Any, kind: Scales) -> jax.Array:
        """Numbers of this warpgroup's columns."""
        row = registers.BYTES.reduce(0)
        return registers.columns(real(kind, plgpu.load(here, *NO_INDEX, layout=row, optimized=False), row))

    def multiply(w_part: Any, x_part: Any, numbers: list, sums: list[jax.Array]) -> list[jax.Array]:
        """The sums of each code of the bytes, with a step's products added.

        Args:
            numbers: for each code the scales of its groups, if they are to be multiplied by; then the zero points.
        """
        found = [*sums]
        runs = STEP // DEPTH
        for run in range(runs):
            words = registers.pairs(plgpu.layout_cast(w_part[run * DEPTH : (run + 1) * DEPTH, :], registers.BYTES))
            words = made[0].flipped(words)
            here = [of[run * len(of) // runs : (run + 1) * len(of) // runs] if len(of) > 1 else of for of in numbers]
            for code, e in enumerate(made):
                bits = registers.fragments(e.bits(words, 0), e.bits(words, 1))
                if e.less:
                    middles = here[codes + code] if here[codes:] else [jnp.full((COLUMNS,), jnp.float32(e.middle))]
                    taken = [plgpu.layout_cast(middle * jnp.float32(e.unit), registers.ROWS) for middle in middles]
                    left = registers.less(bits, e.factor, taken)
                else:
                    left = bits * jnp.bfloat16(e.factor)
                at = code * STEP + run * DEPTH
                right = plgpu.load(x_part.at[:, at : at + DEPTH], *NO_INDEX, layout=registers.X, optimized=False)
                found[code] = registers.multiplied(found[code], left, right, here[code])
        return found

    def spec(code: int) -> plgpu.BlockSpec:
        """Of a step's scales or zero points of a code."""
        return plgpu.BlockSpec(
            (each, COLUMNS), lambda t: (((split * steps + t) * deep + code * STEP) // size // each, j)
        )

    def over_steps(body: Any, numbers: list[Any]) -> jax.Array:
        specs = [
            plgpu.BlockSpec((STEP, COLUMNS), lambda t: (split * steps + t, j), transforms=_rows_of(128, w.dtype)),
            plgpu.BlockSpec((rows, deep), lambda t: (i, split * steps + t), transforms=_rows_of(128, x.dtype)),
            *[spec(code) for _ in numbers for code in range(codes)],
        ]
        step_bytes = STEP * COLUMNS + rows * deep * x.dtype.itemsize
        step_bytes += codes * each * COLUMNS * sum(a.dtype.itemsize for a in numbers)
        stages = max(min((shared - 4 * rows * COLUMNS * (splits - 1)) // step_bytes, steps), 1)
        nothing = plgpu.layout_cast(jnp.zeros((COLUMNS, rows), jnp.float32), registers.FRAGMENTS)
        first, *others = plgpu.emit_pipeline(
            body, grid=(steps,), in_specs=specs, max_concurrent_steps=stages, init_carry=[nothing] * codes
        )(w, x, *[a for a in numbers for _ in range(codes)])
        return first + others[0] if others else first

    def channelwise() -> tuple[jax.Array, jax.Array]:
        factors, *taken = (each_column(a.at[0, columns], kind) for a, kind in zip((scale, *zeros), kinds))
        numbers = [*[[]] * codes, *[[middle] for middle in taken] * codes]

        def body(_: Any, w_part: Any, x_part: Any, sums: list[jax.Array]) -> list[jax.Array]:
            return multiply(w_part, x_part, numbers, sums)

        return over_steps(body, []), factors

    def by_groups() -> jax.Array:
        def body(_: Any, w_part: Any, x_part: Any, *rest: Any) -> list[jax.Array]:
            *held, sums = rest
            numbers = [[each_column(of.at[g], kinds[i // codes]) for g in range(each)] for i, of in enumerate(held)]
            return multiply(w_part, x_part, numbers, sums)

        return over_steps(body, [scale, *zeros])

    def finish(total: jax.Array, factors: jax.Array | None) -> None:
        """The sum of all parts of K, which the first block of a cluster adds, always in the same order."""
        if splits == 1:
            return store(total, factors)

        @pl.when(split > 0)
        def _() -> None:
            plgpu.async_store_smem(
                total, parts.at[split - 1], arrived, cluster_idx=jnp.int32(0), cluster_dim="split", optimized=False
            )

        @pl.when(split == 0)
        def _() -> None:
            plgpu.barrier_wait(arrived)
            added = total
            for part in range(splits - 1):
                added = added + plgpu.load(parts.at[part], *NO_INDEX, layout=registers.FRAGMENTS, optimized=False)
            store(added, factors)

    def store(total: jax.Array, factors: jax.Array | None) -> None:
        total = total * (jnp.float32(1 / made[0].unit) * by)
        if factors is not None:
            total = total * plgpu.layout_cast(lax.broadcast_in_dim(factors, total.shape, (0,)), registers.FRAGMENTS)
        here = out.at[pl.ds(i * rows, rows), columns]
        registers.store_rows(here, registers.result(total).astype(out.dtype), out.shape[0] - i * rows)

    finish(*channelwise()) if groups == 1 else finish(by_groups(), None)


def _rows_of(width: int, dtype: Any = jnp.float32) -> tuple:
    """How a tile lies in shared memory: in rows of so many bytes, swizzled against bank conflicts."""
    return plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(width)


def plain_hopper_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    zero: jax.Array | None = None,
    factor: jax.Array | None = None,
    scales: Scales = "real",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """What `hopper_matmul` means, in plain jnp, for any K and N and any size of groups that divides K."""
    values, scale = packed_values(fmt, w, x.shape[1]).reshape(scale.shape[0], -1, w.shape[1]), from_bytes(scales, scale)
    if zero is not None:
        values = values + (2 ** (fmt.bits - 1) - zero.astype(jnp.float32)[:, None, :])
    a = x.astype(jnp.float32).reshape(x.shape[0], scale.shape[0], -1)
    y = jnp.einsum("mgk,gkn,gn->mn", a, values, scale, precision="highest")
    return (y if factor is None else y * factor).astype(dtype)
