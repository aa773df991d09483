"""Activations as codes, each row on its own grid, in one pass over memory: what the packed products read."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.formats import Float, Int, divide, encode, fake_quant, grid_from_range

X_BYTES = 2 << 20  # a block of x as float32
VMEM = 48 << 20


class Rows(NamedTuple):
    """An activation [M, K] as `(codes - zero) * scale`, row by row.

    codes: [M, K]; int8 for integers (of 8 bits and asymmetric: less 128, as is `zero`), else the format's elements.
    scale: [M, 1] float32.
    zero: [M, 1] int32, 0 for symmetric formats.
    sums: [M, 1], `codes - zero` summed over the row: int32 for integers, else float32.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    sums: jax.Array


def plain_quantize_rows(
    x: jax.Array, shift: jax.Array | None, scale: jax.Array | None, *, fmt: Int | Float, dtype: Any = jnp.bfloat16
) -> Rows:
    """What `quantize_rows` means, in plain jnp: the codes that `execute` simulates, bit for bit."""
    y = x.astype(jnp.float32)
    if shift is not None:
        y = (y - shift.astype(x.dtype).astype(jnp.float32)).astype(x.dtype).astype(jnp.float32)
    if scale is not None:
        y = divide(y, scale.astype(x.dtype).astype(jnp.float32)).astype(x.dtype).astype(jnp.float32)
    step, zero = grid_from_range(fmt, y.min(1, keepdims=True), y.max(1, keepdims=True))
    if isinstance(fmt, Float):
        elements = fake_quant(fmt, divide(y, step), jnp.ones_like(step))
        return Rows(elements.astype(dtype), step, jnp.zeros_like(step, jnp.int32), elements.sum(1, keepdims=True))
    codes = encode(fmt, y, step, zero).astype(jnp.int32)
    zero = jnp.zeros_like(step, jnp.int32) if zero is None else zero.astype(jnp.int32)
    sums = (codes - zero).astype(jnp.float32).sum(1, keepdims=True).astype(jnp.int32)  # exact below 2**24
    middle = 0 if fmt.symmetric else 2 ** (fmt.bits - 1)
    return Rows((codes - middle).astype(jnp.int8), step, zero - middle, sums)


def quantize_rows(
    x: jax.Array,
    shift: jax.Array | None,
    scale: jax.Array | None,
    *,
    fmt: Int | Float,
    dtype: Any = jnp.bfloat16,
    interpret: Any = False,
) -> Rows:
    """Shifts and scales channels, finds each row's range, quantizes and sums it while the row is in fast memory.

    XLA makes three or four passes of it. For a grid that is known beforehand it makes one, fused into what computes
    `x`: that needs no kernel. `plain_quantize_rows` is the meaning, bit for bit.

    Args:
        x: [M, K] float32 or bfloat16.
        shift, scale: [1, K], an equivalent transform's `(x - shift) / scale`, rounded to the dtype of `x` as it is in
            `execute`; None is none.
        fmt: integers of up to 8 bits, or floats.
        dtype: of a float's elements: bfloat16, or an 8-bit float that holds them.

    Returns:
        Rows.
    """
    (m, k), kind = x.shape, jnp.int8 if isinstance(fmt, Int) else dtype
    bm = row_block(m, k)
    given = {name: a for name, a in (("x", x), ("shift", shift), ("scale", scale)) if a is not None}
    whole, narrow = pl.BlockSpec((bm, k), lambda i: (i, 0)), pl.BlockSpec((bm, 1), lambda i: (i, 0))
    sums = jnp.int32 if isinstance(fmt, Int) else jnp.float32
    call = pl.pallas_call(
        partial(_kernel, fmt=fmt, dtype=dtype),
        grid=(-(-m // bm),),
        in_specs=[{name: whole if name == "x" else pl.BlockSpec((1, k), lambda i: (0, 0)) for name in given}],
        out_specs=(whole, narrow, narrow, narrow),
        out_shape=tuple(
            jax.ShapeDtypeStruct(shape, t)
            for shape, t in (((m, k), kind), ((m, 1), jnp.float32), ((m, 1), jnp.int32), ((m, 1), sums))
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM),
        name="jaxq_quantize_rows",
        interpret=interpret,
    )
    return Rows(*call(given))


def row_block(m: int, k: int) -> int:
    """How many rows one step takes."""
    return min(m, max(X_BYTES // (4 * k) // 32 * 32, 32))


def _kernel(refs: dict, *out: Any, fmt: Int | Float, dtype: Any) -> None:
    shift, scale = (refs[name][...] if name in refs else None for name in ("shift", "scale"))
    for ref, values in zip(out, plain_quantize_rows(refs["x"][...], shift, scale, fmt=fmt, dtype=dtype)):
        ref[...] = values
