"""Activations to integers on Hopper GPUs (H100, H200), as a Mosaic GPU kernel that reads and writes memory once."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Int
from jaxq.formats.integer import SMALLEST_SCALE, WHOLE
from jaxq.kernels import hopper_elements as elements

PROCESSORS = 132  # of an H100 or H200


def hopper_quantize(
    x: jax.Array,
    fmt: Int,
    shift: jax.Array | None,
    divisor: jax.Array | None,
    grid: tuple[jax.Array, jax.Array | None] | None,
) -> tuple[jax.Array, ...]:
    m, k = x.shape
    chunk = 1024 if k >= 1024 else 512
    groups = 6
    rows = max(1, 8192 // k)
    vectors = [v for v in (shift, divisor) if v is not None]
    kept = [None if shift is None else 0, None if divisor is None else int(shift is not None)]
    given = [] if grid is None else [g for g in grid if g is not None]
    line = jax.ShapeDtypeStruct((m,), jnp.float32)
    outs = [jax.ShapeDtypeStruct((m, k), jnp.int8)]
    if grid is None:
        outs += [line] if fmt.symmetric else [line, line]
    scratch: list = [plgpu.SMEM((2, groups, rows * 4), jnp.int32)]
    if vectors:
        scratch += [plgpu.SMEM(((shift is not None) + 2 * (divisor is not None), k), jnp.bfloat16)]
        scratch += [plgpu.Barrier(num_arrivals=groups)]
    run = plgpu.kernel(
        partial(_kernel, fmt=fmt, chunk=chunk, rows=rows, kept=kept, groups=groups, given=len(given)),
        out_type=outs,
        scratch_types=scratch,
        grid=(min(PROCESSORS, -(-m // (rows * groups))),),
        grid_names=("block",),
        num_threads=groups,
        thread_name="warpgroup",
        kernel_name="jaxq_hopper_quantize",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    return run(x, *vectors, *given)


def _kernel(x: Any, *refs: Any, fmt: Int, chunk: int, rows: int, kept: list, groups: int, given: int) -> None:
    refs = list(refs)
    vectors = [refs.pop(0) for _ in range(sum(v is not None for v in kept))]
    grid = [refs.pop(0) for _ in range(given)]
    out = refs.pop(0)
    lines = [refs.pop(0) for _ in range(0 if given else 2 - fmt.symmetric)]
    scratch = refs.pop(0)
    m, k = x.shape
    starts = [min(i * chunk, k - chunk) for i in range(-(-k // chunk))]
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // 128)
    splat = plgpu.Layout.WG_SPLAT(())
    wg = lax.axis_index("warpgroup")
    first = lax.axis_index("block") * groups + wg
    stride = lax.axis_size("block") * groups

    def load(ref: Any) -> jax.Array:
        return plgpu.load(ref, *NO_INDEX, layout=layout, optimized=False)

    if vectors:
        table, barrier = refs

        @pl.loop(0, k // chunk + (k % chunk > 0))
        def _(i):
            at = pl.ds(jnp.minimum(i * chunk, k - chunk), chunk)

            @pl.when(lax.rem(i, groups) == wg)
            def _():
                row = 0
                if kept[0] is not None:
                    table[0, at] = load(vectors[kept[0]].at[at]).astype(jnp.bfloat16)
                    row = 1
                if kept[1] is not None:
                    b = load(vectors[kept[1]].at[at]).astype(jnp.bfloat16)
                    table[row, at] = -b
                    table[row + 1, at] = elements.reciprocal(b.astype(jnp.float32), layout).astype(jnp.bfloat16)

        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def moved(row: Any, start: int) -> jax.Array:
        at = pl.ds(start, chunk)
        found, then = load(x.at[row, at]), 0
        return found, at

    def transformed(found: jax.Array, start: int) -> jax.Array:
        at, then = pl.ds(start, chunk), 0
        if kept[0] is not None:
            found, then = found - load(table.at[0, at]), 1
        if kept[1] is not None:
            found = elements.quotient(found, load(table.at[then, at]), load(table.at[then + 1, at]), layout)
        return found

    def grids(ends: list) -> list:
        made = []
        for low, high in ends:
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
            width = jnp.maximum(-low, high) if fmt.symmetric else high - low
            scale = jnp.maximum(elements.divide(width, fmt.qmax - (0 if fmt.symmetric else fmt.qmin)), SMALLEST_SCALE)
            scale = jnp.where(width == 0, jnp.float32(1), scale)
            zero = None
            if not fmt.symmetric:
                zero = fmt.qmin - ((elements.divide(low, scale) + WHOLE) - WHOLE)
                zero = jnp.clip(zero, fmt.qmin, fmt.qmax)
            made.append((scale, zero))
        return made

    if given:
        fixed = [g[0, 0] for g in grid]
        fixed = [(fixed[0], None if fmt.symmetric else fixed[1])] * rows

    def body(i: Any, _: None) -> None:
        row = jnp.minimum((first + i * stride) * rows, m - rows)
        parts = [[load(x.at[row + r, pl.ds(s, chunk)]) for s in starts] for r in range(rows)]
        parts = [[transformed(p, s) for p, s in zip(ps, starts)] for ps in parts]
        if given:
            made = fixed
        else:
            ends = elements.ends(parts, scratch.at[lax.rem(i, 2), wg], layout, splat)
            made = grids(ends)
        for r, (scale, zero) in enumerate(made):
            codes = elements.codes(parts[r], fmt, scale, zero, not given, layout, splat)
            for s, c in zip(starts, codes):
                out[row + r, pl.ds(s, chunk)] = c
            for line, value in zip(lines, (scale, None if zero is None else 128 - zero)):
                elements.store(line.at[row + r], value, splat)

    lax.fori_loop(0, pl.cdiv(pl.cdiv(m, rows) - first, stride), body, None)


NO_INDEX = (None,) if jax.__version_info__ < (0, 11) else ()
