"""Products of bfloat16 activations with packed weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

    y[m, n] = sum_g scale[g, n] * sum_{k in g} x[m, k] c[k, n]

with c what the weight's codes stand for (an asymmetric 4-bit integer's: the code less 8), and groups g of 128 channels,
or more, or all.

The weight is the left operand of the tensor cores, transposed: codes come from device memory through shared memory to
registers, where they are expanded and multiplied; nothing of the size of the weight is written anywhere, and few tokens
pad to 8, not to 64. A block is one warpgroup, which multiplies 128 columns and copies some steps ahead; several share a
multiprocessor, so that one expands while another waits. Where tokens are few, K is split over several blocks, whose
float32 sums are added afterwards. The tensor cores add bfloat16 products exactly: sums of integers below 2**24 are
exact, which was seen on an H100 (`experiments/RESULTS.md` has the times). Without a GPU the kernel is compiled
(`experiments/gpu_compiled.py`) and its PTX run in numpy, instruction by instruction (`tests/kernels/ptx.py`).

Four multiplying warpgroups in one block, with a fifth that copies, hang: their registers do not fit those that the
block starts with, which `setmaxnreg` waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Float, Int
from jaxq.kernels import hopper_registers as registers
from jaxq.kernels.expansion import expansions, packed_values
from jaxq.kernels.gpu import COLUMNS
from jaxq.kernels.hopper_registers import DEPTH
from jaxq.kernels.layout import fits

SHARED = 208 << 10  # bytes of shared memory of a multiprocessor, for what its blocks hold
MULTIPROCESSORS = 132
RESIDENT = 4  # blocks of a multiprocessor at most
CLUSTER = 8  # blocks that share a column's sum at most, which is what every Hopper schedules together
STEP = 128  # rows of packed bytes
NO_INDEX = (None,) if jax.__version_info__ < (0, 11) else ()  # of `plgpu.load`, which JAX 0.10 must be told


def hopper_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    zero: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The product above as one kernel. `plain_hopper_matmul` is its meaning, but for the order of summation.

    Args:
        x: [M, K] bfloat16.
        w: packed codes, uint8 [K/2, N] of 4 bits, as in `jaxq.kernels.layout`, or [K, N] of 8.
        scale: [G, N] float32.
        fmt: of the codes, one that `jaxq.kernels.expansion` has.
        zero: of an asymmetric integer, [G, N] float32, whole numbers up to 256: the codes that stand for 0. None is 8
            or 128.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: the shapes do not fit each other or the kernel: see `layout.fits`; or it does not take the format.
    """
    (m, k), n, groups = x.shape, w.shape[1], scale.shape[0]
    expansions(fmt)
    if 8 * w.shape[0] != k * fmt.bits or scale.shape[1] != n or not fits(k, groups) or n % COLUMNS:
        raise ValueError(
            f"x {x.shape}, packed weights {w.shape} of {fmt}, scales {scale.shape}: the kernel takes x [M, K], weights "
            "[K * bits / 8, N] and scales [G, N], K in blocks of 256, groups in multiples of 128 and N in multiples of "
            "128"
        )
    rows, splits = tiles(m, w.shape[0], n, groups)
    if m > 8:  # fewer come as they are: what is missing from one tile of 8 rows is not read
        x = jnp.pad(x, ((0, -m % rows), (0, 0)))
    blocks = -(-m // rows) * (n // COLUMNS) * splits
    parts = plgpu.SMEM((splits - 1, COLUMNS, rows), jnp.float32, transforms=_rows_of(4 * min(rows & -rows, 32)))
    return plgpu.kernel(
        partial(
            _kernel, fmt=fmt, rows=rows, splits=splits, shared=SHARED // min(RESIDENT, -(-blocks // MULTIPROCESSORS))
        ),
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(-(-m // rows), n // COLUMNS),
        grid_names=("m", "n"),
        cluster=(splits,),
        cluster_names=("split",),
        kernel_name="jaxq_hopper_matmul",
        scratch_types=[
            *([parts, plgpu.Barrier(num_arrivals=splits - 1)] if splits > 1 else []),
        ],
    )(x, w, scale, *([] if zero is None else [zero]))


def tiles(m: int, depth: int, n: int, groups: int) -> tuple[int, int]:
    """How many rows of x a block multiplies, and into how many parts K is cut, for weights of `depth` bytes a column:
    as many as make two blocks for nearly each multiprocessor. With scales of groups there are three sums to hold in
    registers."""
    rows = min(-(-m // 8) * 8, 64 if groups == 1 else 16)
    blocks, steps = -(-m // rows) * (n // COLUMNS), depth // STEP
    splits = 1
    while splits < CLUSTER and blocks * splits < 2 * MULTIPROCESSORS - 14 and 4 * splits <= steps and rows <= 32:
        splits *= 2
    return rows, splits


def _kernel(x: Any, w: Any, scale: Any, *rest: Any, fmt: Int | Float, rows: int, splits: int, shared: int) -> None:
    made, groups = expansions(fmt), scale.shape[0]
    codes = len(made)  # in a byte
    size, deep = x.shape[1] // groups, codes * STEP  # channels of a group, of a step
    zero, out, *shares = rest if len(rest) % 2 == 0 else (None, *rest)
    i, j, split = (lax.axis_index(name) for name in ("m", "n", "split"))
    columns = pl.ds(j * COLUMNS, COLUMNS)
    steps = -(-w.shape[0] // STEP // splits)

    def each_column(here: Any) -> jax.Array:
        """Numbers of this warpgroup's columns."""
        return registers.columns(plgpu.load(here, *NO_INDEX, layout=registers.BYTES.reduce(0), optimized=False))

    def scaled(sums: jax.Array, factor: jax.Array) -> jax.Array:
        return sums * plgpu.layout_cast(lax.broadcast_in_dim(factor, sums.shape, (0,)), registers.FRAGMENTS)

    def multiply(w_part: Any, x_part: Any, sums: list[jax.Array], zeros: Sequence[Any]) -> list[jax.Array]:
        """The sums of each code of the bytes, with a step's products added."""
        sums = [*sums]
        for run in range(STEP // DEPTH):
            words = registers.pairs(plgpu.layout_cast(w_part[run * DEPTH : (run + 1) * DEPTH, :], registers.BYTES))
            words = made[0].flipped(words)
            for code, e in enumerate(made):
                bits = registers.fragments(e.bits(words, 0), e.bits(words, 1))
                if e.less:
                    taken = jnp.full((COLUMNS,), e.less) if zeros[code] is None else zeros[code] * jnp.float32(e.unit)
                    numbers = registers.less(bits, e.factor, plgpu.layout_cast(taken, registers.ROWS))
                else:
                    numbers = bits * jnp.bfloat16(e.factor)
                at = code * STEP + run * DEPTH
                right = plgpu.load(x_part.at[:, at : at + DEPTH], *NO_INDEX, layout=registers.X, optimized=False)
                sums[code] = registers.multiplied(sums[code], numbers, right)
        return sums

    def group_spec(code: int) -> plgpu.BlockSpec:
        return plgpu.BlockSpec((1, COLUMNS), lambda t: (((split * steps + t) * deep + code * STEP) // size, j))

    def pipeline(body: Any, numbers: Sequence[Any], carry: Any) -> Any:
        specs = [
            plgpu.BlockSpec((STEP, COLUMNS), lambda t: (split * steps + t, j), transforms=_rows_of(128, w.dtype)),
            plgpu.BlockSpec((rows, deep), lambda t: (i, split * steps + t), transforms=_rows_of(128, x.dtype)),
            *[group_spec(code) for _ in numbers for code in range(codes)],
        ]
        step_bytes = STEP * COLUMNS + rows * deep * x.dtype.itemsize + codes * len(numbers) * COLUMNS * 4
        others = rows * COLUMNS * 4 * (splits - 1)
        stages = max(min((shared - others) // step_bytes, steps), 1)
        operands = [w, x, *[a for a in numbers for _ in range(codes)]]
        return plgpu.emit_pipeline(body, grid=(steps,), in_specs=specs, max_concurrent_steps=stages, init_carry=carry)(
            *operands
        )

    def channelwise() -> tuple[jax.Array, jax.Array]:
        factor, zeros = (None if a is None else each_column(a.at[0, columns]) for a in (scale, zero))

        def body(_: Any, w_part: Any, x_part: Any, sums: list[jax.Array]) -> list[jax.Array]:
            return multiply(w_part, x_part, sums, [zeros] * codes)

        return sum(pipeline(body, [], [nothing] * codes)), factor

    def by_groups() -> jax.Array:
        def body(_: Any, w_part: Any, x_part: Any, *rest: Any) -> jax.Array:
            *numbers, total = rest
            numbers = [each_column(part.at[0]) for part in numbers]
            scales, zeros = numbers[:codes], numbers[codes:] or [None] * codes
            for sums, factor in zip(multiply(w_part, x_part, [nothing] * codes, zeros), scales):
                total = total + scaled(sums, factor)
            return total

        return pipeline(body, [scale] if zero is None else [scale, zero], nothing)

    def finish(total: jax.Array, factor: jax.Array | None) -> None:
        """The sum of all parts of K, which the first block of a cluster adds, always in the same order."""
        if splits > 1:
            parts, arrived = shares

            @pl.when(split > 0)
            def _() -> None:
                plgpu.async_store_smem(
                    total, parts.at[split - 1], arrived, cluster_idx=jnp.int32(0), cluster_dim="split", optimized=False
                )

            @pl.when(split == 0)
            def _() -> None:
                plgpu.barrier_wait(arrived)
                whole = total
                for part in range(splits - 1):
                    whole = whole + plgpu.load(parts.at[part], *NO_INDEX, layout=registers.FRAGMENTS, optimized=False)
                store(whole, factor)
        else:
            store(total, factor)

    def store(total: jax.Array, factor: jax.Array | None) -> None:
        total = total * jnp.float32(1 / made[0].unit)
        total = total if factor is None else scaled(total, factor)
        here = out.at[pl.ds(i * rows, rows), columns]
        registers.store_rows(here, registers.result(total).astype(out.dtype), out.shape[0] - i * rows)

    nothing = plgpu.layout_cast(jnp.zeros((COLUMNS, rows), jnp.float32), registers.FRAGMENTS)
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
    dtype: Any = jnp.float32,
) -> jax.Array:
    """What `hopper_matmul` means, in plain jnp, for any K and N and any size of groups that divides K."""
    values = packed_values(fmt, w, x.shape[1]).reshape(scale.shape[0], -1, w.shape[1])
    if zero is not None:
        values = values + (2 ** (fmt.bits - 1) - zero[:, None, :])
    a = x.astype(jnp.float32).reshape(x.shape[0], scale.shape[0], -1)
    return jnp.einsum("mgk,gkn,gn->mn", a, values, scale, precision="highest").astype(dtype)
