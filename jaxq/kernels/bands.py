"""Weights that are decoded a band of columns at a time, as they are multiplied: what CPUs do with several rows.

XLA decodes a whole weight to memory before it multiplies it, and on CPU it starts with all weights of a program, so
that a packed model would take the memory of one in float32 at every call, and a few tokens the time to fill it. A
loop's band stays in the caches, and the loop begins when its activation is there (`experiments/bench_packed.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.kernels.plain import Integers, Products, product
from jaxq.qtensor import Packed

BAND = 2**20  # numbers, about, of a band: in less, a loop's steps are too short, more do not stay in the caches
SMALL = 2**18  # numbers of a weight that is decoded whole
STEP = 64  # columns, of which a band has a multiple


def band_size(k: int, n: int) -> int | None:
    """How many columns a band of a weight [k, n] has, None where that is too small for two."""
    most = min(max(BAND // k, STEP), n // 2) // STEP
    if most < 1 or k * n < SMALL:
        return None
    return STEP * next((m for m in range(most, most // 2, -1) if n % (m * STEP) == 0), most)


@partial(jax.jit, static_argnames=("size", "read", "products", "precision"))
def product_in_bands(
    x: Integers,
    leaf: Packed,
    sums: jax.Array | None,
    *,
    size: int,
    read: Callable[[Packed], Integers],
    products: Products,
    precision: Any,
) -> jax.Array:
    """`product` of x, values [M, K], and what `read` makes of a weight of planes [bytes, N], `size` columns at a time.

    Jitted, so that a program traces and lowers it once for all its weights of one shape.

    Args:
      leaf: its grid's arrays are [1 or groups, N or 1].
      sums: as for `product`.
    """
    n = leaf.columns[0]

    def part(start: Any, size: int, a: jax.Array) -> jax.Array:
        return a if a.shape[1] == 1 else lax.dynamic_slice_in_dim(a, start, size, 1)

    def with_band(y: jax.Array, start: Any, size: int) -> jax.Array:
        planes, stored, its_sums = jax.tree.map(partial(part, start, size), (leaf.planes, leaf.stored, sums))
        band = replace(leaf, planes=planes, stored=stored, columns=(size,))
        return lax.dynamic_update_slice_in_dim(y, product(x, read(band), its_sums, products, precision), start, 1)

    rest = n % size
    y = jnp.zeros((x.values.shape[0], n), jnp.float32)
    y, _ = lax.scan(lambda y, start: (with_band(y, start, size), None), y, jnp.arange(0, n - rest, size))
    return with_band(y, n - rest, rest) if rest else y
