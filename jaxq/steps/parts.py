"""Some rows of large arrays after the other, so that what is made of them on the way is never there as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Rows at a time, at most: more take memory, and make products no faster.
MOST = 1024


@dataclass(frozen=True)
class Part:
    """Some of the rows of arrays that have as many.

    Attributes:
      begin: the first of them, counted in rows that are taken.
      new: float32 [rows], 0 for those that the part before had, too.
      every: each how many-th row is taken.
    """

    begin: jax.Array
    new: jax.Array
    every: int

    def of(self, a: jax.Array, axis: int = 0) -> jax.Array:
        """These rows of an array; the only one if it has only one for all."""
        if a.shape[axis] == 1:
            return a
        if self.every == 1:
            return jax.lax.dynamic_slice_in_dim(a, self.begin, len(self.new), axis)
        rows = (self.begin + jnp.arange(len(self.new), dtype=jnp.int32)) * self.every
        return jnp.take(a, rows, axis, mode="clip")

    def put(self, whole: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
        """`whole`, that has but the rows that are taken, with these replaced."""
        return jax.lax.dynamic_update_slice_in_dim(whole, rows, self.begin, axis)


class Reader(NamedTuple):
    """A weight [out, in] that reads an activation, in parts, so that it need not be there quantized as a whole.

    Attributes:
      outputs: how many rows it has.
      rows: some of them, in full precision and quantized, both [rows, in], in the order of the activation's channels.
    """

    outputs: int
    rows: Callable[[Part], tuple[jax.Array, jax.Array]]

    def quantized(self, part: Part) -> jax.Array:
        return self.rows(part)[1]


def in_parts(count: int, size: int, step: Callable[[Any, Part], Any], start: Any, every: int = 1) -> Any:
    """`step(state, part)` for `size` rows of `count`, or fewer, after the other, the first one's state being `start`.
    All parts are as large, so that the last one may overlap the one before it."""
    taken = -(-count // every)
    size = -(-taken // -(-taken // size))

    def one(state: Any, first: jax.Array) -> tuple[Any, None]:
        begin = jnp.minimum(first, taken - size)
        new = begin + jnp.arange(size, dtype=jnp.int32) >= first
        return step(state, Part(begin, new.astype(jnp.float32), every)), None

    return jax.lax.scan(one, start, jnp.arange(0, taken, size, dtype=jnp.int32))[0]


def rows_within(budget: int, each: int) -> int:
    """How many rows of `each` float32 numbers the budget's bytes hold; one at least."""
    return max(1, budget // (4 * each))


def add_products(total: jax.Array, a: jax.Array, b: jax.Array, size: int) -> jax.Array:
    """total [blocks, m, n] + a' b, `size` of its rows at a time; a: [rows, blocks, m], b: [rows, blocks, n]."""

    def step(total: jax.Array, part: Part) -> jax.Array:
        some = jnp.einsum("tbi,tbj->bij", part.of(a, 2) * part.new[None, None], b)
        return part.put(total, part.of(total, 1) + some, 1)

    return in_parts(a.shape[2], size, step, total)
