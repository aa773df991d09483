"""Products of bfloat16 activations with packed weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

    y[m, n] = sum_g scale[g, n] * sum_{k in g} x[m, k] c[k, n]

with c what the weight's codes stand for, less the zero point, and groups g of 128 channels, or more, or all. For few
rows of x: what counts is how fast the weight is read.

The weight is the left operand of the tensor cores, transposed: codes come from device memory through shared memory to
registers, where they are expanded and multiplied; nothing of the size of the weight is written anywhere, and few rows
pad to 8. A warpgroup multiplies 128 columns with a part of K and copies some steps ahead. The warpgroups of a block and
the blocks of a cluster have the other parts of K; their float32 sums are added in shared memory, so that a product is
one kernel. The tensor cores add bfloat16 products exactly: sums of integers below 2**24 are exact, which was seen on an
H100 and an H200 (`experiments/RESULTS.md` has the times). Without a GPU the kernel is compiled
(`experiments/gpu_compiled.py`) and its PTX run in numpy, instruction by instruction (`tests/kernels/ptx.py`).
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
    rows, splits, warpgroups = tiles(m, w.shape[0], n)
    if m > 8:  # fewer come as they are: what is missing from one tile of 8 rows is not read
        x = jnp.pad(x, ((0, -m % rows), (0, 0)))
    codes, parts = 8 // fmt.bits, splits * warpgroups
    steps = -(-w.shape[0] // STEP // parts)
    numbers = codes * (1 + (zero is not None)) if groups > 1 else 0  # rows of scales and zero points in a step
    step_bytes = STEP * COLUMNS + 2 * rows * codes * STEP + 4 * numbers * COLUMNS
    resident = min(RESIDENT, -(-(-(-m // rows) * (n // COLUMNS) * splits) // MULTIPROCESSORS))
    shared = SHARED // resident - 4 * (parts - 1) * rows * COLUMNS
    slots = max(1, min(shared // step_bytes // warpgroups, steps))
    every = warpgroups * slots
    scratch: dict[str, Any] = {
        "w_slots": plgpu.SMEM((every, STEP, COLUMNS), w.dtype, transforms=_rows_of(128, w.dtype)),
        "x_slots": plgpu.SMEM((every, rows, codes * STEP), x.dtype, transforms=_rows_of(128, x.dtype)),
        "filled": plgpu.Barrier(num_arrivals=2 + numbers, num_barriers=every),
    }
    if numbers:
        scratch["number_slots"] = plgpu.SMEM((every, numbers, COLUMNS), jnp.float32)
    if parts > 1:
        scratch["sums"] = plgpu.SMEM((parts - 1, COLUMNS, rows), jnp.float32, transforms=_rows_of(4 * rows))
        scratch["arrived"] = plgpu.Barrier(num_arrivals=parts - 1)
    return plgpu.kernel(
        partial(_kernel, fmt=fmt, rows=rows, parts=parts, warpgroups=warpgroups, steps=steps, slots=slots),
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(-(-m // rows), n // COLUMNS),
        grid_names=("m", "n"),
        cluster=(splits,),
        cluster_names=("split",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="jaxq_hopper_matmul",
        scratch_types=scratch,
    )(x, w, scale, *([] if zero is None else [zero]))


def tiles(m: int, depth: int, n: int) -> tuple[int, int, int]:
    """How many rows of x a block multiplies, and by how many blocks of a cluster and how many warpgroups of each K is
    divided, for weights of `depth` bytes a column: about a block for each multiprocessor, and two or four warpgroups.
    """
    rows, steps = 8 if m <= 8 else 16, depth // STEP
    blocks, splits, warpgroups = -(-m // rows) * (n // COLUMNS), 1, 1
    while splits < CLUSTER and 8 * blocks * splits < 7 * MULTIPROCESSORS and 2 * splits <= steps:
        splits *= 2
    while warpgroups < 4 and blocks * splits * warpgroups < 2 * MULTIPROCESSORS and 2 * splits * warpgroups <= steps:
        warpgroups *= 2
    return rows, splits, warpgroups


def _kernel(
    x: Any,
    w: Any,
    scale: Any,
    *rest: Any,
    fmt: Int | Float,
    rows: int,
    parts: int,
    warpgroups: int,
    steps: int,
    slots: int,
    w_slots: Any,
    x_slots: Any,
    filled: Any,
    number_slots: Any = None,
    sums: Any = None,
    arrived: Any = None,
) -> None:
    made, groups = expansions(fmt), scale.shape[0]
    codes = len(made)  # in a byte
    size, deep = x.shape[1] // groups, codes * STEP  # channels of a group, of a step
    *zeros, out = rest
    i, j, split, warpgroup = (lax.axis_index(name) for name in ("m", "n", "split", "warpgroup"))
    part, first_slot = split * warpgroups + warpgroup, warpgroup * slots
    columns = pl.ds(j * COLUMNS, COLUMNS)
    given = [(a, code) for a in (scale, *zeros) for code in range(codes)]  # whose numbers come with a step

    def each_column(here: Any) -> jax.Array:
        """Numbers of this warpgroup's columns."""
        return registers.columns(plgpu.load(here, *NO_INDEX, layout=registers.BYTES.reduce(0), optimized=False))

    def scaled(sums: jax.Array, factor: jax.Array) -> jax.Array:
        return sums * plgpu.layout_cast(lax.broadcast_in_dim(factor, sums.shape, (0,)), registers.FRAGMENTS)

    def fill(step: Any, slot: Any) -> None:
        """Starts the copies of a step. What is behind the end of K is 0."""
        at, full = part * steps + step, filled.at[slot]
        plgpu.copy_gmem_to_smem(w.at[pl.ds(at * STEP, STEP), columns], w_slots.at[slot], full)
        plgpu.copy_gmem_to_smem(x.at[pl.ds(i * rows, rows), pl.ds(at * deep, deep)], x_slots.at[slot], full)
        for number, (a, code) in enumerate(given if groups > 1 else []):
            group = (at * deep + code * STEP) // size
            plgpu.copy_gmem_to_smem(a.at[group, columns], number_slots.at[slot, number], full)

    def over_steps(body: Any, carry: Any) -> Any:
        """A slot is filled again as soon as its numbers are in registers, before they are worked on."""
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
            numbers = [each_column(number_slots.at[slot, n]) for n in range(len(given) if groups > 1 else 0)]

            @pl.when(step + slots < steps)
            def _() -> None:
                fill(step + slots, slot)

            return body(packed, right, numbers, carry)

        return lax.fori_loop(0, steps, one, carry)

    def multiply(
        packed: list[jax.Array], right: list[jax.Array], zeros: Sequence[Any], sums: list[jax.Array]
    ) -> list[jax.Array]:
        """The sums of each code of the bytes, with a step's products added."""
        found = [*sums]
        for run, words in enumerate(packed):
            words = made[0].flipped(words)
            for code, e in enumerate(made):
                bits = registers.fragments(e.bits(words, 0), e.bits(words, 1))
                if e.less:
                    taken = jnp.full((COLUMNS,), e.less) if not zeros else zeros[code] * jnp.float32(e.unit)
                    numbers = registers.less(bits, e.factor, plgpu.layout_cast(taken, registers.ROWS))
                else:
                    numbers = bits * jnp.bfloat16(e.factor)
                found[code] = registers.multiplied(found[code], numbers, right[code * len(packed) + run])
        return found

    def channelwise() -> tuple[jax.Array, jax.Array]:
        factor, *taken = (each_column(a.at[0, columns]) for a in (scale, *zeros))

        def body(packed: Any, right: Any, _: Any, sums: list[jax.Array]) -> list[jax.Array]:
            return multiply(packed, right, taken * codes, sums)

        first, *others = over_steps(body, [nothing] * codes)
        return (first + others[0] if others else first), factor

    def by_groups() -> jax.Array:
        def body(packed: Any, right: Any, numbers: list[jax.Array], total: jax.Array) -> jax.Array:
            for found, factor in zip(multiply(packed, right, numbers[codes:], [nothing] * codes), numbers):
                total = total + scaled(found, factor)
            return total

        return over_steps(body, nothing)

    def finish(total: jax.Array, factor: jax.Array | None) -> None:
        """The sum of all parts of K, which the first warpgroup of a cluster adds, always in the same order."""
        if parts == 1:
            return store(total, factor)

        @pl.when(part > 0)
        def _() -> None:
            plgpu.async_store_smem(
                total, sums.at[part - 1], arrived, cluster_idx=jnp.int32(0), cluster_dim="split", optimized=False
            )

        @pl.when(part == 0)
        def _() -> None:
            plgpu.barrier_wait(arrived)
            whole = total
            for other in range(parts - 1):
                whole = whole + plgpu.load(sums.at[other], *NO_INDEX, layout=registers.FRAGMENTS, optimized=False)
            store(whole, factor)

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
