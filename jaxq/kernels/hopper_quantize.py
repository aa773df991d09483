"""Activations to integers on Hopper GPUs (H100, H200), as a Mosaic GPU kernel that goes over memory once.

    x' = (x - shift) / divisor,   values = clip(rint(x' / scale), qmin - zero, qmax - zero) - center

with the scale and zero point of each row from its own smallest and largest x', or given.

A warpgroup takes a row at a time and holds it in its registers, in chunks of which every lane has 16 bytes; several
rows where they are short, so that enough of x is on its way from memory. Several warpgroups share a block, and a block
has a multiprocessor: it stays for all its rows, so that the channels' vectors are read and inverted once, and lie in
shared memory. The last chunk may cover a part of the one before, and the last rows some before them: the same numbers
are then written twice.

Without a GPU the kernel is compiled and its PTX run in numpy (`tests/kernels/test_hopper_quantize.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.contraction import transform
from jaxq.formats import Int
from jaxq.formats.integer import SMALLEST_SCALE, WHOLE
from jaxq.kernels import hopper_elements as elements
from jaxq.kernels.gpu import CHANNELS
from jaxq.kernels.hopper_matmul import NO_INDEX
from jaxq.kernels.plain import activation_integers
from jaxq.qtensor import Grid, PerTensor, PerToken

PROCESSORS = 132
THREADS = 128  # of a warpgroup
CHUNKS = (1024, 512)  # channels, the first that x has
NUMBERS = 8192  # of short rows, that a warpgroup reads at once
REGISTERS = 512  # for each thread, of all warpgroups of a multiprocessor together
WORKING = 84  # registers for what is computed, beside the row: with fewer, and more warpgroups, it was slower (H200)


def hopper_quantize(
    x: jax.Array, fmt: Int, grid: Grid | None, shift: jax.Array | None = None, divisor: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The values above as one kernel. `plain_hopper_quantize` is its meaning, bit for bit.

    Args:
      x: [M, K] bfloat16, finite; an infinite number may come out as NaN does, as some code.
      fmt: of the codes.
      grid: scale and zero point for all of x, [1, 1]; None: each row has its own.
      shift, divisor: [K] float32, which are rounded to bfloat16.

    Returns:
      values [M, K] int8; scale and center, float32 [M, 1] or the grid's [1, 1]; center is None for symmetric formats.

    Raises:
      ValueError: x does not fit the kernel.
    """
    m, k = x.shape
    if x.dtype != jnp.bfloat16 or not CHANNELS[0] <= k <= CHANNELS[1] or k % 8:
        raise ValueError(
            f"x {x.shape} of {x.dtype}: the kernel takes bfloat16 [M, K] with K from {CHANNELS[0]} to {CHANNELS[1]}, a "
            "multiple of 8"
        )
    chunk, rows, warpgroups = tiles(m, k)
    vectors = [v for v in (shift, divisor) if v is not None]
    given = [] if grid is None else [g for g in (grid.scale, grid.zero) if g is not None]
    numbers = jax.ShapeDtypeStruct((m, 1), jnp.float32)
    values, *own = plgpu.kernel(
        partial(_kernel, fmt=fmt, chunk=chunk, rows=rows, shifted=shift is not None, divided=divisor is not None),
        out_type=[jax.ShapeDtypeStruct(x.shape, jnp.int8), *([] if given else [numbers] * (2 - fmt.symmetric))],
        scratch_types=[
            plgpu.SMEM((2, warpgroups, elements.WARPS * rows), jnp.int32),
            plgpu.SMEM((3, k if vectors else 8), jnp.bfloat16),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # the few that there have to be are here
        grid=(min(PROCESSORS, pl.cdiv(m, rows * warpgroups)),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="jaxq_hopper_quantize",
    )(x, *vectors, *given)
    scale, *zero = own or given
    return values, scale, 2.0 ** (fmt.bits - 1) - zero[0] if zero else None


def tiles(m: int, k: int) -> tuple[int, int, int]:
    """The channels of a chunk, the rows that a warpgroup holds, and the warpgroups of a block: as many as have the
    registers for it."""
    chunk = next(size for size in CHUNKS if size <= k)
    rows = min(m, max(1, NUMBERS // k))
    row = pl.cdiv(k, chunk) * chunk // THREADS // 2
    return chunk, rows, min(8, REGISTERS // (WORKING + rows * row))


def _kernel(x: Any, *everything: Any, fmt: Int, chunk: int, rows: int, shifted: bool, divided: bool) -> None:
    *refs, scratch, table, ready = everything
    vectors, refs = refs[: shifted + divided], refs[shifted + divided :]
    at = next(i for i, ref in enumerate(refs) if ref.shape == x.shape)  # where the results begin
    given, out, own = refs[:at], refs[at], refs[at + 1 :]
    (m, k), warpgroups = x.shape, scratch.shape[1]
    starts = [min(start, k - chunk) for start in range(0, k, chunk)]
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // THREADS)
    warpgroup = lax.axis_index("warpgroup")
    first, stride = lax.axis_index("block") * warpgroups + warpgroup, lax.axis_size("block") * warpgroups

    def load(ref: Any, start: Any) -> jax.Array:
        return plgpu.load(ref.at[pl.ds(start, chunk)], *NO_INDEX, layout=layout, optimized=False)

    def prepare(i: Any, _: None) -> None:
        """What a chunk's transform needs: the shift, the divisor, and its negative reciprocal."""
        start = 8 * jnp.minimum((warpgroup + i * warpgroups) * (chunk // 8), (k - chunk) // 8)  # 8: stores are whole
        here = pl.ds(start, chunk)
        if shifted:
            table[0, here] = load(vectors[0], start).astype(jnp.bfloat16)
        if divided:
            divisor = load(vectors[-1], start).astype(jnp.bfloat16)
            table[1, here] = -divisor
            table[2, here] = elements.reciprocal(divisor.astype(jnp.float32), layout).astype(jnp.bfloat16)

    def transformed(a: jax.Array, start: int) -> jax.Array:
        a = a - load(table.at[0], start) if shifted else a
        return elements.quotient(a, load(table.at[1], start), load(table.at[2], start), layout) if divided else a

    def quantize(i: Any, _: None) -> None:
        row = jnp.minimum((first + i * stride) * rows, m - rows)
        read = [[load(x.at[row + r], start) for start in starts] for r in range(rows)]
        held = [[transformed(a, start) for a, start in zip(chunks, starts)] for chunks in read]
        if given:
            grids = [(given[0][0, 0], None if fmt.symmetric else given[1][0, 0])] * rows
        else:
            # Two halves in turn: a warp may still be reading the last rows' ends while another writes.
            found = elements.ends(held, scratch.at[lax.rem(i, 2), warpgroup], layout)
            grids = [_grid(fmt, *ends) for ends in found]
        for r, (chunks, grid) in enumerate(zip(held, grids)):
            for start, values in zip(starts, elements.codes(chunks, fmt, *grid, not given, layout)):
                out[row + r, pl.ds(start, chunk)] = values
            for ref, number in zip(own, grid):
                ref[row + r, 0] = number

    if vectors:
        lax.fori_loop(0, pl.cdiv(len(starts), warpgroups), prepare, None)
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
    lax.fori_loop(0, pl.cdiv(pl.cdiv(m, rows) - first, stride), quantize, None)


def _grid(fmt: Int, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """`jaxq.formats.grid_from_range` of float32 scalars."""
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    width = jnp.maximum(-low, high) if fmt.symmetric else high - low
    steps = jnp.float32(fmt.qmax if fmt.symmetric else fmt.qmax - fmt.qmin)
    scale = jnp.maximum(elements.divide(width, steps), SMALLEST_SCALE)
    scale = jnp.where(width == 0, jnp.float32(1), scale)
    if fmt.symmetric:
        return scale, None
    steps = (elements.divide(low, scale) + WHOLE) - WHOLE  # rounded
    return scale, jnp.clip(fmt.qmin - steps, fmt.qmin, fmt.qmax)


def plain_hopper_quantize(
    x: jax.Array, fmt: Int, grid: Grid | None, shift: jax.Array | None = None, divisor: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What `hopper_quantize` means, in plain jnp, for any K; the values in float32."""
    x = transform(x, shift, divisor, (1,))
    found = activation_integers(x, fmt, PerToken() if grid is None else PerTensor(), grid, (1,))
    assert found.scale is not None
    return found.values, found.scale, found.center
