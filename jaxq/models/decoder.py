"""What decoders share: a text is read at once, or piece by piece with what the layers keep of the pieces before."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

# What an attention layer does with the keys and values of its tokens, ``[B, T, H, d]``: gives all those to attend to,
# and what to keep of them.
Keep = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]


class Cache(Protocol):
    """Keys and values of one layer for ``length`` tokens."""

    @property
    def length(self) -> int: ...

    def extend(self, k: jax.Array, v: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array, "Cache"]:
        """With those of the tokens from ``position`` on: all keys and values ``[B, length, H, d]``, and the cache."""
        ...


def keep_nothing(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Attend to the tokens at hand."""
    return k, v, None


class Decoder(nnx.Module):
    """A language model that reads from left to right; ``kept`` are heads and channels of each layer's keys and values.

    ``hidden(tokens [B, T], places [T], keys, mask, keeps)`` gives what the last layer makes of the tokens that stand at
    ``places`` among ``keys``, ``[B, T, D]``, and what each layer keeps; ``head`` makes logits of it.
    """

    kept: tuple[tuple[int, int], ...]
    hidden: Callable[..., tuple[jax.Array, tuple]]
    head: Callable[[jax.Array], jax.Array]

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """``tokens`` int ``[B, T]``, ``mask`` bool or int ``[B, T]`` (1 = real token) -> logits ``[B, T, V]``."""
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return self.head(self.hidden(tokens, places, len(places), mask, [keep_nothing] * len(self.kept))[0])

    def step(self, tokens: jax.Array, caches: Sequence[Cache], position: jax.Array) -> tuple[jax.Array, tuple]:
        """``tokens`` int ``[B, T]`` at ``position`` (int, a scalar) and on, after what each layer's cache holds.

        Returns the last token's logits ``[B, V]``, and the caches with these tokens.
        """
        places = position + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        keeps = [partial(cache.extend, position=position) for cache in caches]
        x, caches = self.hidden(tokens, places, caches[0].length, None, keeps)
        return self.head(x[:, -1:])[:, 0], caches
