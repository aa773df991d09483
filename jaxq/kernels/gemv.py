"""One row times a packed weight, on CPUs: codes are decoded, multiplied and added up in one pass over them.

XLA's products read numbers of a machine's types there, for which a weight is decoded to memory, in whole or in bands.
What is elementwise it fuses, so here the product is written as that. A block of 256 channels is 16 runs of 16:

    y[n] = sum over blocks b and j = 0 .. 15 of (sum over runs r of x[b, r, j] * W[b, r, j, n])

The inner sum has 16 terms, each of a 16th of the channels, and writes a 16th of the numbers that decoding would; a
product with ones adds these up. Of two rows or more each would decode the weight again: `bands` are for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.formats import Int
from jaxq.formats.floating import fits_half, half
from jaxq.formats.scales import expand_blocks
from jaxq.kernels.layout import BLOCK, RUN, RUNS, plane_rows, signed, unpack_run, widths
from jaxq.kernels.plain import MACHINE_FLOATS, Integers, Products, corrected, fits_int8, weight_integers
from jaxq.qtensor import Packed

SMALL = 2**16  # numbers of a weight that is decoded whole
EXACT = 2**24 // (2**14 * RUNS)  # sums of so many terms of products up to 2**14 are exact in float32
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)  # of activations: products are in float32


def takes(x: Integers, leaf: Packed, groups: int) -> bool:
    """Whether x is one row, and the weight one that goes by runs: in groups of whole blocks, or in such that a block
    consists of whole groups and those of whole runs."""
    (k,), fmt = leaf.rows, leaf.split
    size = k // groups
    whole = groups == 1 or size % BLOCK == 0 or (BLOCK % size == 0 and size % RUN == 0)
    known = isinstance(fmt, Int) or (fmt is not None and fits_half(fmt))
    enough = k >= BLOCK and k * leaf.columns[0] >= SMALL
    return x.values.shape[0] == 1 and x.values.dtype in TYPES and whole and known and enough


@partial(jax.jit, static_argnames=("groups", "products"))
def row_product(x: Integers, leaf: Packed, sums: jax.Array | None, groups: int, products: Products) -> jax.Array:
    """`plain.product` of a row, values [1, K], and a weight of planes [bytes, N] that `takes` takes: float32 [1, N].

    Jitted, so that a program traces and lowers it once for all its weights of one shape.
    """
    if groups > 1:
        a = x.centered if x.scale is None else x.centered * x.scale
        seen = jnp.float32 if a.dtype == jnp.float16 else a.dtype
        return _multiplied(a, leaf, partial(_dequantized, dtype=leaf.dtype, product_dtype=seen))
    w = weight_integers(_channels(leaf, 0, BLOCK))  # for all but its values
    if fits_int8(x, w.bound, products):
        exact = partial(_multiplied, leaf=leaf, read=_values, accumulate=jnp.int32)
        if sums is None and x.center is not None:
            sums = exact(jnp.ones_like(x.values))
        y = corrected(exact(x.values).astype(jnp.float32), x, w, sums)
    else:
        y = _multiplied(x.centered, leaf, _centered)
    for scale in (x.scale, w.scale):
        y = y if scale is None else y * scale
    return y


def _values(w: Integers) -> jax.Array:
    return w.values


def _centered(w: Integers) -> jax.Array:
    return w.centered


def _dequantized(w: Integers, dtype: Any, product_dtype: Any) -> jax.Array:
    """A weight in groups as its program has it, of `dtype`, and as an activation's product reads it."""
    assert w.scale is not None
    scale = expand_blocks(w.scale, w.values.shape)
    center = None if w.center is None else expand_blocks(w.center, w.values.shape)
    numbers = replace(w, values=w.values.astype(jnp.float32), center=center).centered * scale
    return numbers.astype(dtype).astype(product_dtype)


def _multiplied(
    x: jax.Array, leaf: Packed, read: Callable[[Integers], jax.Array], accumulate: Any = jnp.float32
) -> jax.Array:
    """x [1, K] times what `read` makes of the weight's integers and of their grids, [1 or groups, N].

    Args:
      accumulate: int32, of whole numbers up to 128, or float32.
    """
    k = leaf.rows[0]
    depth = k // BLOCK * BLOCK
    parts = x[:, :depth].astype(jnp.float32).reshape(-1, RUNS, RUN)
    body = _channels(leaf, 0, depth)
    w = weight_integers(body)
    if leaf.stored.scales != "real":  # blocks' scales are decoded before, and not for each of their channels
        w = replace(w, scale=lax.optimization_barrier(w.scale))
    runs = [read(_run(body, w, run)).astype(jnp.float32) for run in range(RUNS)]
    terms = [parts[:, run].reshape(-1, 1) * numbers for run, numbers in enumerate(runs)]
    y = _total(sum(terms[1:], terms[0]), accumulate)
    if depth < k:
        rest = read(weight_integers(_channels(leaf, depth, k - depth)))
        y = y + _dot(x[:, depth:], rest).astype(accumulate)
    return y


def _channels(leaf: Packed, start: int, size: int) -> Packed:
    """The channels from `start` on, a multiple of blocks and, if those are of more, of groups; `size` likewise, or all
    that follow."""
    depth = leaf.rows[0]

    def of_groups(a: jax.Array) -> jax.Array:
        each = depth // a.shape[0]
        return a if each == depth else a[start // each : (start + size) // each]

    cuts = [(start * width // 8, plane_rows(size, width)) for width in widths(leaf.format.bits)]
    planes = tuple(plane[first : first + rows] for plane, (first, rows) in zip(leaf.planes, cuts, strict=True))
    return replace(leaf, planes=planes, stored=jax.tree.map(of_groups, leaf.stored), rows=(size,))


def _run(body: Packed, w: Integers, run: int) -> Integers:
    """A run of each block of the weight, values [16 blocks, N]."""
    fmt, blocks = body.split, body.rows[0] // BLOCK

    def grids(a: jax.Array | None) -> jax.Array | None:
        each = 1 if a is None else a.shape[0] // blocks  # groups of a block
        return a if a is None or each <= 1 else a.reshape(blocks, each, -1)[:, run * each // RUNS]

    codes = unpack_run(body.planes, body.format.bits, run)
    return replace(w, values=_decoded(fmt, codes), scale=grids(w.scale), center=grids(w.center))


def _decoded(fmt: Any, codes: jax.Array) -> jax.Array:
    """The values of `weight_integers`: int8 or float32."""
    if codes.dtype == jnp.int8:
        return codes
    if isinstance(fmt, Int):
        return signed(codes, fmt.bits) if fmt.symmetric else signed(codes ^ jnp.uint8(2 ** (fmt.bits - 1)), fmt.bits)
    smallest = 0 if fmt in MACHINE_FLOATS else 1 - fmt.bias - fmt.mantissa_bits
    return half(fmt, codes, -smallest)


def _total(terms: jax.Array, accumulate: Any) -> jax.Array:
    """The sum over the first axis, [1, N], by a product: CPUs take several times longer for sums."""
    rows = terms.shape[0]
    if accumulate == jnp.float32:
        return _dot(jnp.ones((1, rows), jnp.float32), terms)
    part = jnp.arange(rows) // EXACT
    parts = _dot((part[None] == jnp.arange(-(-rows // EXACT))[:, None]).astype(jnp.float32), terms)
    return parts.astype(jnp.int32).sum(0, keepdims=True, dtype=jnp.int32)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32), preferred_element_type=jnp.float32)
