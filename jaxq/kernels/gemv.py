"""One row times a packed weight, on CPUs: codes are decoded, multiplied and added up in one pass over them.

XLA's products read numbers of a machine's types there, for which a weight is decoded to memory, in whole or in bands.
What is elementwise it fuses, so here the product is written as that. A block of 256 channels is 16 runs of 16:

    y[n] = sum over blocks b and j = 0 .. 15 of (sum over runs r of x[b, r, j] * W[b, r, j, n])

The inner sum has 16 terms, each of a 16th of the channels, and writes a 16th of the numbers that decoding would; a
product with ones adds these up. Half a block at the end is 16 runs, too. Of two rows or more each would decode the
weight again: `bands` are for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.formats import Float, Int
from jaxq.formats.floating import fits_half, half
from jaxq.formats.integer import narrow
from jaxq.formats.scales import expand_blocks
from jaxq.kernels.dots import dot
from jaxq.kernels.layout import BLOCK, HALF, RUNS, rows_of_blocks, signed, unpack_run
from jaxq.kernels.plain import MACHINE_FLOATS, Integers, Products, corrected, fits_int8, middle, weight_integers
from jaxq.qtensor import Packed

SMALL = 2**16  # numbers of a weight that is decoded whole
EXACT = 2**24 // (2**14 * RUNS)  # sums of so many terms of products up to 2**14 are exact in float32
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)  # of activations: products are in float32

# What is multiplied with x of a run's values, [rows, N], and what picks the run's rows of a grid's array.
Read = Callable[[jax.Array, Callable[[jax.Array], jax.Array]], jax.Array]


def takes(x: Integers, leaf: Packed, groups: int) -> bool:
    """Whether x is one row, and the weight one that goes by runs: in groups of whole blocks, or in such that a block
    consists of whole groups and those of whole runs."""
    (k,), fmt = leaf.rows, leaf.split
    size = k // groups
    whole = groups == 1 or size % BLOCK == 0 or (BLOCK % size == 0 and size % RUNS == 0)
    known = isinstance(fmt, Int) or (fmt is not None and fits_half(fmt))
    enough = k % HALF == 0 and k * leaf.columns[0] >= SMALL
    return x.values.shape[0] == 1 and x.values.dtype in TYPES and enough and whole and known


@partial(jax.jit, static_argnames=("groups", "products"))
def row_product(x: Integers, leaf: Packed, sums: jax.Array | None, groups: int, products: Products) -> jax.Array:
    """`plain.product` of a row, values [1, K], and a weight of planes [bytes, N] that `takes` takes: float32 [1, N].

    Jitted, so that a program traces and lowers it once for all its weights of one shape.
    """
    w = weight_integers(leaf)  # of which the values are not used
    if groups > 1:
        seen = jnp.float32 if x.numbers.dtype == jnp.float16 else x.numbers.dtype
        return _multiplied(x.numbers, leaf, lambda one: _dequantized(leaf, one, seen))
    if fits_int8(x, w.bound, products):

        def exact(x: jax.Array) -> jax.Array:
            return _multiplied(x, leaf, lambda one: lambda values, of_run: values, jnp.int32)

        if sums is None and x.center is not None:
            sums = exact(jnp.ones_like(x.values))
        integers = narrow(x.values, jnp.int8).astype(jnp.float32)  # NaN is 0
        y = corrected(exact(integers).astype(jnp.float32), x, w, sums)
    else:
        y = _multiplied(x.centered, leaf, lambda one: lambda values, of_run: replace(w, values=values).centered)
    for scale in (x.scale, w.scale):
        y = y if scale is None else y * scale
    return y


def _dequantized(leaf: Packed, one: jax.Array, dtype: Any) -> Read:
    """A weight in groups as its program has it, and as an activation's product reads it, in `dtype`. Blocks' scales are
    decoded before, and not for each of their channels."""
    fmt, grid = leaf.format, leaf.grid
    scale = grid.factor if grid.scales == "real" else lax.optimization_barrier(grid.factor * one)
    center = middle(fmt) - grid.zero if isinstance(fmt, Int) and grid.zero is not None else None

    def read(values: jax.Array, of_run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        values = values.astype(jnp.float32)
        values = values if center is None else values + of_run(center)
        return (values * of_run(scale)).astype(leaf.dtype).astype(dtype)

    return read


def _multiplied(
    x: jax.Array, leaf: Packed, read: Callable[[jax.Array], Read], accumulate: Any = jnp.float32
) -> jax.Array:
    """x [1, K] times a weight, in `accumulate`: float32, or int32 of whole numbers up to 128.

    Args:
      read: what is made of the values, given a 1 that XLA does not know to be one: what is multiplied by it is computed
        when x is there and not, for all weights of the program, at its start, and is not moved into x, which might
        overflow.
    """
    x = x.astype(jnp.float32)
    one = jnp.sign(jnp.square(x[:, :1]) + 1)
    halves, depth = leaf.rows[0] // HALF, leaf.rows[0] // BLOCK * BLOCK
    y = jnp.zeros((1, leaf.columns[0]), accumulate)
    if depth:
        runs = x[:, :depth].reshape(-1, RUNS, BLOCK // RUNS)
        y = y + _total(_terms(runs, leaf, one, read(one), last=False), accumulate)
    if halves % 2:
        runs = x[:, depth:].reshape(1, RUNS, HALF // RUNS)
        y = y + _total(_terms(runs, leaf, one, read(one), last=True), accumulate)
    return y


def _terms(x: jax.Array, leaf: Packed, one: jax.Array, read: Read, last: bool) -> jax.Array:
    """The sums over runs of x, [blocks, runs, channels of one], times the weight's: [blocks * channels, N]."""
    rows, halves = x.shape[0] * x.shape[2], leaf.rows[0] // HALF
    total = jnp.float32(0)
    for run in range(RUNS):

        def of_run(a: jax.Array, run: int = run) -> jax.Array:
            each = a.shape[0] // halves  # groups of half a block
            if each:
                a = rows_of_blocks(a, halves, run * each * (1 if last else 2) // RUNS, 1, last)
            return expand_blocks(a, (rows, a.shape[1]))

        values = _values(leaf, unpack_run(leaf.planes, leaf.format.bits, run, last), one)
        total = total + x[:, run].reshape(-1, 1) * read(values, of_run).astype(jnp.float32)
    return total


def _values(leaf: Packed, codes: jax.Array, one: jax.Array) -> jax.Array:
    """The values of `weight_integers`, of one with groups the elements: int8, or float32."""
    fmt = leaf.split
    if codes.dtype == jnp.int8:
        return codes
    if isinstance(fmt, Int):
        return signed(codes if fmt.symmetric else codes ^ jnp.uint8(middle(fmt)), fmt.bits)
    assert isinstance(fmt, Float)
    elements = fmt in MACHINE_FLOATS or max(a.shape[0] for a in jax.tree.leaves(leaf.stored)) > 1
    power = 15 - fmt.bias + (0 if elements else fmt.bias - 1 + fmt.mantissa_bits)
    return half(fmt, codes) * (jnp.float32(2.0**power) * one)


def _total(terms: jax.Array, accumulate: Any) -> jax.Array:
    """The sum over the first axis, [1, N], by a product: CPUs take several times longer for sums."""
    rows = terms.shape[0]
    if accumulate == jnp.float32:
        return dot(jnp.ones((1, rows), jnp.float32), terms, precision=lax.Precision.HIGHEST)
    part = jnp.arange(rows) // EXACT
    members = (part[None] == jnp.arange(-(-rows // EXACT))[:, None]).astype(jnp.float32)
    parts = dot(members, terms, precision=lax.Precision.HIGHEST)
    return parts.astype(jnp.int32).sum(0, keepdims=True, dtype=jnp.int32)
