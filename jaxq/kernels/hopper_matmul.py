"""Products of bfloat16 activations with packed weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

    y[m, n] = sum_g scale[g, n] * sum_{k in g} x[m, k] c[k, n]

with c what the weight's codes stand for, less the zero point, and groups g of 16, 32, 64 or a multiple of 128 channels,
or all. For few rows of x: what counts is how fast the weight is read.

The weight is the left operand of the tensor cores, transposed: codes come from device memory through shared memory to
registers, where they are expanded and multiplied; nothing of the size of the weight is written anywhere, and few rows
pad to 8. A warpgroup multiplies 128 columns with a part of K and copies some steps ahead. The warpgroups of a block and
the blocks of a cluster have the other parts of K; their float32 sums are added in shared memory, so that a product is
one kernel. The tensor cores add bfloat16 products exactly: sums of integers below 2**24 are exact, which was seen on an
H100 and an H200 (`experiments/RESULTS.md` has the times). Without a GPU the kernel is compiled
(`experiments/gpu_compiled.py`) and its PTX run in numpy, instruction by instruction (`tests/kernels/ptx.py`).
"""

from __future__ import annotations

import itertools
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
SMALLEST_GROUP = 16
NO_INDEX = (None,) if jax.__version_info__ < (0, 11) else ()  # of `plgpu.load`, which JAX 0.10 must be told


def hopper_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    zero: jax.Array | None = None,
    factor: jax.Array | None = None,
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
        factor: what the result is multiplied by, [1, 1] float32.
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
    rows, splits, warpgroups = tiles(m, w.shape[0], n)
    if m > 8:  # fewer come as they are: what is missing from one tile of 8 rows is not read
        x = jnp.pad(x, ((0, -m % rows), (0, 0)))
    codes, parts = 8 // fmt.bits, splits * warpgroups
    steps = -(-w.shape[0] // STEP // parts)
    numbers = codes * (1 + (zero is not None)) if groups > 1 else 0  # copies of scales and zero points in a step
    each = max(1, STEP * groups // k)
    step_bytes = STEP * COLUMNS + 2 * rows * codes * STEP + 4 * numbers * each * COLUMNS
    resident = min(RESIDENT, -(-(-(-m // rows) * (n // COLUMNS) * splits) // MULTIPROCESSORS))
    shared = SHARED // resident - 4 * (splits + warpgroups - 2) * rows * COLUMNS
    slots = max(1, min(shared // step_bytes // warpgroups, steps))
    every = warpgroups * slots
    scratch: dict[str, Any] = {
        "w_slots": plgpu.SMEM((every, STEP, COLUMNS), w.dtype, transforms=_rows_of(128, w.dtype)),
        "x_slots": plgpu.SMEM((every, rows, codes * STEP), x.dtype, transforms=_rows_of(128, x.dtype)),
        "filled": plgpu.Barrier(num_arrivals=2 + numbers, num_barriers=every),
    }
    if numbers:
        scratch["number_slots"] = plgpu.SMEM((every, numbers, each, COLUMNS), jnp.float32)
    for name, others in (("warpgroups", warpgroups - 1), ("blocks", splits - 1)):
        if others:  # whose sums the first one adds
            sums = plgpu.SMEM((others, COLUMNS, rows), jnp.float32, transforms=_rows_of(4 * rows))
            scratch[f"of_{name}"] = sums, plgpu.Barrier(num_arrivals=others)
    return plgpu.kernel(
        partial(_kernel, fmt=fmt, rows=rows, warpgroups=warpgroups, steps=steps, slots=slots),
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(-(-m // rows), n // COLUMNS),
        grid_names=("m", "n"),
        cluster=(splits,),
        cluster_names=("split",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="jaxq_hopper_matmul",
        scratch_types=scratch,
    )(x, w, scale, zero, factor)


def tiles(m: int, depth: int, n: int) -> tuple[int, int, int]:
    """How many rows of x a block multiplies, and by how many blocks of a cluster and how many warpgroups of each K is
    divided, for weights of `depth` bytes a column: about a block for each multiprocessor, and up to four warpgroups, as
    many as have room in its memory."""
    rows, steps = 8 if m <= 8 else 16, depth // STEP
    blocks, splits, warpgroups = -(-m // rows) * (n // COLUMNS), 1, 1
    while splits < CLUSTER and 8 * blocks * splits < 7 * MULTIPROCESSORS and 2 * splits <= steps:
        splits *= 2
    while (
        warpgroups < 32 // rows
        and blocks * splits * warpgroups < 2 * MULTIPROCESSORS
        and 2 * splits * warpgroups <= steps
    ):
        warpgroups *= 2
    return rows, splits, warpgroups


def _kernel(
    x: Any,
    w: Any,
    scale: Any,
    zero: Any,
    factor: Any,
    out: Any,
    *,
    fmt: Int | Float,
    rows: int,
    warpgroups: int,
    steps: int,
    slots: int,
    w_slots: Any,
    x_slots: Any,
    filled: Any,
    number_slots: Any = None,
    of_warpgroups: Any = None,
    of_blocks: Any = None,
) -> None:
    made, groups = expansions(fmt), scale.shape[0]
    codes = len(made)  # in a byte
    size, deep = x.shape[1] // groups, codes * STEP  # channels of a group, of a step
    zeros, by = [] if zero is None else [zero], 1 if factor is None else factor[0, 0]
    i, j, split, warpgroup = (lax.axis_index(name) for name in ("m", "n", "split", "warpgroup"))
    part, first_slot = split * warpgroups + warpgroup, warpgroup * slots
    columns = pl.ds(j * COLUMNS, COLUMNS)
    each = max(1, STEP // size)  # groups among the channels of a step that have their code in the same place of a byte

    def each_column(here: Any) -> jax.Array:
        """Numbers of this warpgroup's columns."""
        return registers.columns(plgpu.load(here, *NO_INDEX, layout=registers.BYTES.reduce(0), optimized=False))

    def fill(step: Any, slot: Any) -> None:
        """Starts the copies of a step. What is behind the end of K is 0."""
        at, full = part * steps + step, filled.at[slot]
        plgpu.copy_gmem_to_smem(w.at[pl.ds(at * STEP, STEP), columns], w_slots.at[slot], full)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(i * rows, rows), pl.ds(at * deep, deep)], x_slots.at[slot], full)
        for number, (a, code) in enumerate(itertools.product((scale, *zeros), range(codes)) if groups > 1 else ()):
            first = (at * deep + code * STEP) // size
            plgpu.copy_gmem_to_smem(a.at[pl.ds(first, each), columns], number_slots.at[slot, number], full)

    def over_steps(body: Any, count: int) -> list[jax.Array]:
        """So many sums. A slot is filled again as soon as its numbers are in registers, before they are worked on."""
        for step in range(slots):
            fill(step, first_slot + step)

        def one(step: Any, carry: Any) -> Any:
            slot = first_slot + lax.rem(step, slots)
            plgpu.barrier_wait(filled.at[slot])
            packed, right = [], []
            for run in range(0, STEP, DEPTH):
                bytes_ = plgpu.load(w_slots.at[slot, run : run + DEPTH], *NO_INDEX, layout=registers.BYTES)
                packed.append(registers.pairs(bytes_))
            for at in range(0, deep, DEPTH):
                channels = x_slots.at[slot, :, at : at + DEPTH]
                right.append(plgpu.load(channels, *NO_INDEX, layout=registers.X, optimized=False))
            shape = number_slots.shape[1:3] if groups > 1 else (0, 0)
            numbers = [[each_column(number_slots.at[slot, n, g]) for g in range(shape[1])] for n in range(shape[0])]

            @pl.when(step + slots < steps)
            def _() -> None:
                fill(step + slots, slot)

            return body(packed, right, numbers, carry)

        nothing = plgpu.layout_cast(jnp.zeros((COLUMNS, rows), jnp.float32), registers.FRAGMENTS)
        return lax.fori_loop(0, steps, one, [nothing] * count)

    def multiply(packed: list[jax.Array], right: list[jax.Array], numbers: list, sums: list[jax.Array]) -> list:
        """The sums of each code of the bytes, with a step's products added.

        Args:
            numbers: for each code the scales of its groups, if they are to be multiplied by; then the zero points.
        """
        found = [*sums]
        for run, words in enumerate(packed):
            words = made[0].flipped(words)
            here = [of[run * len(of) // 2 : (run + 1) * len(of) // 2] if len(of) > 1 else of for of in numbers]
            for code, e in enumerate(made):
                bits = registers.fragments(e.bits(words, 0), e.bits(words, 1))
                if e.less:
                    zeros = here[codes + code] if here[codes:] else [jnp.full((COLUMNS,), jnp.float32(e.middle))]
                    taken = [plgpu.layout_cast(zero * jnp.float32(e.unit), registers.ROWS) for zero in zeros]
                    left = registers.less(bits, e.factor, taken)
                else:
                    left = bits * jnp.bfloat16(e.factor)
                found[code] = registers.multiplied(found[code], left, right[code * len(packed) + run], here[code])
        return found

    def channelwise() -> tuple[jax.Array, jax.Array]:
        scales, *taken = (each_column(a.at[0, columns]) for a in (scale, *zeros))
        numbers = [*[[]] * codes, *[[zero] for zero in taken] * codes]
        first, *others = over_steps(lambda packed, right, _, sums: multiply(packed, right, numbers, sums), codes)
        return (first + others[0] if others else first), scales

    def by_groups() -> jax.Array:
        first, *others = over_steps(multiply, codes)
        return first + others[0] if others else first

    def with_others(total: jax.Array, others: Any) -> jax.Array:
        """The sum of all, always in the same order."""
        sums, arrived = others
        plgpu.barrier_wait(arrived)
        for other in range(sums.shape[0]):
            total = total + plgpu.load(sums.at[other], *NO_INDEX, layout=registers.FRAGMENTS, optimized=False)
        return total

    def finish(total: jax.Array, scales: jax.Array | None) -> None:
        """The first warpgroup of a block adds the sums of its others; that of a cluster's first block, the blocks'."""
        if of_warpgroups is not None:

            @pl.when(warpgroup > 0)
            def _() -> None:
                sums, arrived = of_warpgroups
                sums[warpgroup - 1] = total
                plgpu.barrier_arrive(arrived)

        @pl.when(warpgroup == 0)
        def _() -> None:
            whole = total if of_warpgroups is None else with_others(total, of_warpgroups)
            if of_blocks is None:
                return store(whole, scales)

            @pl.when(split > 0)
            def _() -> None:
                sums, arrived = of_blocks
                plgpu.async_store_smem(
                    whole, sums.at[split - 1], arrived, cluster_idx=jnp.int32(0), cluster_dim="split", optimized=False
                )

            @pl.when(split == 0)
            def _() -> None:
                store(with_others(whole, of_blocks), scales)

    def store(total: jax.Array, scales: jax.Array | None) -> None:
        total = total * (jnp.float32(1 / made[0].unit) * by)
        if scales is not None:
            total = total * plgpu.layout_cast(lax.broadcast_in_dim(scales, total.shape, (0,)), registers.FRAGMENTS)
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
    dtype: Any = jnp.float32,
) -> jax.Array:
    """What `hopper_matmul` means, in plain jnp, for any K and N and any size of groups that divides K."""
    values = packed_values(fmt, w, x.shape[1]).reshape(scale.shape[0], -1, w.shape[1])
    if zero is not None:
        values = values + (2 ** (fmt.bits - 1) - zero[:, None, :])
    a = x.astype(jnp.float32).reshape(x.shape[0], scale.shape[0], -1)
    y = jnp.einsum("mgk,gkn,gn->mn", a, values, scale, precision="highest")
    return (y if factor is None else y * factor).astype(dtype)
