"""`generate`: a language model goes on with a text, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.arrays import on_device
from jaxq.cache import LayerCache


@dataclass(frozen=True)
class Generated:
    """What a model went on with, and how fast, the time of compilation left out.

    Attributes:
      tokens: int32 `[B, count]`.
      prefill: tokens per second of reading the text, all rows together.
      decode: tokens per second of those after the first, all rows together; NaN where there is only one.
      compilation: seconds.
    """

    tokens: np.ndarray
    prefill: float
    decode: float
    compilation: float


def generate(
    step: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    tokens: jax.Array | np.ndarray,
    caches: Sequence[LayerCache],
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Goes on with each row of `tokens` by `count` tokens. Two programs are compiled, for the text and for a token.

    Args:
      step: `step(params, tokens [B, T], caches, position) -> (logits [B, V], caches)`: `model.step`, or
        `execute(model.step)` for what `calibrate` or `pack` returned.
      tokens: int32 `[B, T]`, rows of one length without padding.
      caches: what `new_cache` makes, with room for T + count - 1 tokens; it is used up.
      temperature: 0 takes the likeliest token; else it is drawn, from logits divided by this.
      seed: of what is drawn.

    Raises:
      ValueError: no tokens to begin with, a `count` below 1, a negative temperature, or no room in the caches.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    _check(tokens, caches, count, temperature)

    def advance(params: Any, tokens: jax.Array, state: tuple) -> tuple[jax.Array, tuple]:
        caches, position, key = state
        logits, caches = step(params, tokens, caches, position)
        key, used = jax.random.split(key)
        return _choose(logits, temperature, used)[:, None], (caches, position + tokens.shape[1], key)

    params = on_device(params)
    state = tuple(caches), jnp.int32(0), jax.random.key(seed)
    begin = time.perf_counter()
    run = jax.jit(advance, donate_argnums=2)
    prefill, decode = (run.lower(params, some, state).compile() for some in (tokens, tokens[:, :1]))
    compilation = time.perf_counter() - begin

    begin = time.perf_counter()
    last, state = prefill(params, tokens, state)
    found = [jax.block_until_ready(last)]
    middle = time.perf_counter()
    for _ in range(count - 1):
        last, state = decode(params, last, state)
        found.append(last)
    jax.block_until_ready(last)
    end = time.perf_counter()
    speed = len(tokens) * (count - 1) / (end - middle) if count > 1 else float("nan")
    return Generated(np.concatenate(found, axis=1), tokens.size / (middle - begin), speed, compilation)


def _check(tokens: jax.Array, caches: Sequence[LayerCache], count: int, temperature: float) -> None:
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"generate: tokens {list(tokens.shape)}, where rows with one token at least are needed")
    if count < 1:
        raise ValueError(f"generate: {count} tokens were asked for; ask for one at least")
    if temperature < 0:
        raise ValueError(f"generate: the temperature is {temperature}; it is 0 (the likeliest token) or more")
    needed, room = tokens.shape[1] + count - 1, min(cache.length for cache in caches)
    if needed > room:
        raise ValueError(
            f"generate: {tokens.shape[1]} tokens and {count} more take {needed} places in the caches, which have {room}"
        )


def _choose(logits: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
    """A token for each row of `logits [B, V]`, int32 `[B]`."""
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.random.categorical(key, logits.astype(jnp.float32) / temperature).astype(jnp.int32)
