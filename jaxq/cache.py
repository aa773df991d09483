"""What a language model remembers of a text: keys and values, as floats or as codes of 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.formats import Float, Format, Int, decode, encode, grid_from_range

FLOATS = {"float32": jnp.float32, "bf16": jnp.bfloat16}
CODES: dict[str, Format] = {"int8": Int(8), "fp8": Float(4, 3, reserved=1)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Vectors:
    """A vector for each token and head, `[B, S, H, d]`.

    Attributes:
      data: their numbers, or with a `format` their codes.
      scale: with a `format`, what the codes of each vector are multiplied by, float32 `[B, S, H, 1]`; else None.
    """

    data: jax.Array
    scale: jax.Array | None = None
    format: Format | None = field(default=None, metadata={"static": True})

    def write(self, x: jax.Array, position: jax.Array) -> Vectors:
        """With `x [B, T, H, d]` at `position` and after; the caller sees to it that there is room."""
        if self.format is None:
            return Vectors(_put(self.data, x.astype(self.data.dtype), position))
        largest = jnp.abs(x).max(-1, keepdims=True)
        scale, _ = grid_from_range(self.format, -largest, largest)
        codes = encode(self.format, x, scale)
        return Vectors(_put(self.data, codes, position), _put(self.scale, scale, position), self.format)

    def read(self, dtype: Any) -> jax.Array:
        """All of them, `[B, S, H, d]`; zeros where nothing was written."""
        if self.format is None or self.scale is None:
            return self.data.astype(dtype)
        return decode(self.format, self.data, self.scale).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one attention layer, for as many tokens as there is room for from the start."""

    keys: Vectors
    values: Vectors

    @property
    def length(self) -> int:
        return self.keys.data.shape[1]

    def extend(self, k: jax.Array, v: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array, LayerCache]:
        """With those of the tokens from `position` on, `[B, T, H, d]`: all keys and values as the cache holds them, in
        the type of `k` and `v`, and the cache."""
        keys, values = self.keys.write(k, position), self.values.write(v, position)
        return keys.read(k.dtype), values.read(v.dtype), LayerCache(keys, values)


def new_cache(kept: Sequence[tuple[int, int]], batch: int, length: int, kind: str = "bf16") -> tuple[LayerCache, ...]:
    """An empty cache for each layer.

    Args:
      kept: heads and channels of each layer's keys and values (`Model.kept`).
      length: tokens that there is room for.
      kind: "float32" or "bf16"; or "int8" or "fp8" (E4M3, to 448), with a float32 scale for each token and head.

    Raises:
      ValueError: `kind` is none of these, or there are no layers, as in an encoder.
    """
    if kind not in (*FLOATS, *CODES):
        raise ValueError(f"cache {kind!r} is not known; possible are {', '.join((*FLOATS, *CODES))}")
    if not kept:
        raise ValueError("a cache for no layers: the model is an encoder, which does not go on with a text")

    def empty(heads: int, channels: int) -> Vectors:
        shape = batch, length, heads, channels
        if kind in FLOATS:
            return Vectors(jnp.zeros(shape, FLOATS[kind]))
        fmt = CODES[kind]
        return Vectors(jnp.zeros(shape, fmt.code_dtype), jnp.ones((*shape[:-1], 1), jnp.float32), fmt)

    return tuple(LayerCache(empty(*shape), empty(*shape)) for shape in kept)


def _put(all_: Any, x: jax.Array, position: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(all_, x, position, axis=1)
