"""Weights that are decoded a slab at a time, a run of the channels that a product sums over: what CPUs multiply.

XLA decodes a whole weight to memory before it multiplies it, and on CPU it starts with all weights of a program, so
that a packed model would take the memory of one in float32 at every call, and a token the time to fill it. A loop's
slab stays in the caches, and the loop begins when its activation is there: one token with weights of 4 bits takes 0.3
of the time (`experiments/bench_packed.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.kernels.layout import BLOCK, plane_rows, widths
from jaxq.qtensor import Packed

SLAB = 2**20  # numbers, about, of a weight: in less, a loop's steps are too short, more do not stay in the caches
SMALL = 2**18  # numbers of a weight that is decoded whole
WIDE, BAND = 2**14, 2**11  # columns, of a weight of which slabs are cut in bands, too, and of these


@partial(jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=["size", "read"])
@dataclass(frozen=True)
class Slabs:
    """A weight [K, N] that is read `size` channels at a time; the last slab may have fewer.

    Args:
      leaf: its codes, planes [bytes, N], its grid's arrays [1 or groups, N or 1].
      size: a multiple of the layout's blocks and of the groups, less than K.
      read: makes `Integers` of such a leaf, whose values, [channels, N], are the slab's.
    """

    leaf: Packed
    size: int
    read: Callable[[Packed], Any]

    @property
    def depth(self) -> int:
        return self.leaf.rows[0]

    def multiplied(self, x: jax.Array, dot: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        """The sum over slabs of `dot(x's channels [M, size], slab [size, N])`."""

        def part(start: Any, size: int) -> jax.Array:
            return dot(lax.dynamic_slice_in_dim(x, start, size, 1), self.read(channels(self.leaf, start, size)).values)

        rest = self.depth % self.size
        nothing = dot(x[:, :0], self.read(channels(self.leaf, 0, self.size)).values[:0])  # zeros of the sum's type
        starts = jnp.arange(0, self.depth - rest, self.size)
        total, _ = lax.scan(lambda total, start: (total + part(start, self.size), None), nothing, starts)
        return total + part(self.depth - rest, rest) if rest else total


def channels(leaf: Packed, start: Any, size: int) -> Packed:
    """The channels from `start` on, a multiple of `size`'s blocks and groups and perhaps a tracer, of a weight of
    `Slabs.leaf`'s form."""
    depth = leaf.rows[0]

    def of_groups(a: jax.Array) -> jax.Array:
        each = depth // a.shape[0]
        return a if each == depth else lax.dynamic_slice_in_dim(a, start // each, size // each, 0)

    planes = tuple(
        lax.dynamic_slice_in_dim(plane, start * width // 8, plane_rows(size, width), 0)
        for plane, width in zip(leaf.planes, widths(leaf.format.bits), strict=True)
    )
    return replace(leaf, planes=planes, stored=jax.tree.map(of_groups, leaf.stored), rows=(size,))


def slab_size(k: int, columns: int, groups: int = 1) -> int | None:
    """How many channels of `k` a slab has, None where a weight is too small for two."""
    step = lcm(BLOCK, k // groups) if groups > 1 else BLOCK
    whole = k // step
    if whole < 2 or k * columns < SMALL:
        return None
    most = max(1, min(SLAB // (step * columns), whole // 2))
    return step * max(n for n in range(1, most + 1) if whole % n == 0)


def in_bands(multiply: Callable[[Packed, Any], jax.Array], leaf: Packed, sums: jax.Array | None) -> jax.Array:
    """`multiply(leaf, sums)`, [M, N], of a weight of `Slabs.leaf`'s form, a band of columns at a time.

    Args:
      sums: what goes with the weight, [groups, N].
    """
    columns = leaf.columns[0]

    def band(start: Any, size: int) -> jax.Array:
        def part(a: jax.Array) -> jax.Array:
            return a if a.shape[1] == 1 else lax.dynamic_slice_in_dim(a, start, size, 1)

        planes, stored = jax.tree.map(part, (leaf.planes, leaf.stored))
        return multiply(replace(leaf, planes=planes, stored=stored, columns=(size,)), jax.tree.map(part, sums))

    whole = columns // BAND * BAND
    bands = lax.map(lambda start: band(start, BAND), jnp.arange(0, whole, BAND))
    y = jnp.moveaxis(bands, 0, 1).reshape(-1, whole)
    return y if whole == columns else jnp.concatenate([y, band(whole, columns - whole)], 1)
