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

    def with_band(y: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        def part(a: jax.Array) -> jax.Array:
            return a if a.shape[1] == 1 else lax.dynamic_slice_in_dim(a, start, size, 1)

        planes, stored, its_sums = jax.tree.map(part, (leaf.planes, leaf.stored, sums))
        band = product(
            x, read(replace(leaf, planes=planes, stored=stored, columns=(size,))), its_sums, products, precision
        )
        return lax.dynamic_update_slice_in_dim(y, band, start, 1), None

    # The last band may overlap the one before: what is outside of the loop XLA would decode at the program's start.
    starts = jnp.minimum(jnp.arange(0, n, size), n - size)
    y, _ = lax.scan(with_band, jnp.zeros((x.values.shape[0], n), jnp.float32), starts)
    return y
