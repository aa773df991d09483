"""A model of the zoo: a forward function with parameters and inputs, and what must be found in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Specimen:
    """`sites` are the expected site paths (attention's included), `skipped` the paths of the expected rows, each with a
    piece of its reason. `batches`: what to calibrate on, where the inputs alone do not do."""

    forward: Callable
    params: Any
    inputs: tuple[Any, ...]
    sites: frozenset[str] = frozenset()
    skipped: dict[str, str] = field(default_factory=dict)
    batches: tuple[Any, ...] = ()
    bound: float = 0.04  # of the relative error at 8 bits
    differentiable: bool = True


@cache
def draws(seed: int, count: int) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), (count,)))


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """The first of a run of draws whose length is one of few: a draw of each shape of its own would compile anew."""
    size = math.prod(shape)
    values = draws(seed, max(4096, 1 << (size - 1).bit_length()))[:size].reshape(shape)
    return jnp.asarray((values * np.float32(scale)).astype(dtype))


def weight(seed: int, *shape: int, fan_in: int | None = None) -> jax.Array:
    return normal(seed, *shape, scale=(fan_in or shape[-2]) ** -0.5)


def tokens(seed: int, *shape: int, vocabulary: int = 40) -> jax.Array:
    drawn = np.asarray(jax.random.randint(jax.random.key(seed), (4096,), 0, vocabulary))
    return jnp.asarray(drawn[: math.prod(shape)].reshape(shape))


def row(v: jax.Array, ndim: int) -> jax.Array:
    """A vector that broadcasts along the last axis, under strict rank promotion."""
    return v.reshape((1,) * (ndim - 1) + v.shape)


def norm(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """LayerNorm, or RMSNorm where there is no bias."""
    if "bias" in p:
        x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * row(p["scale"], x.ndim)
    return x + row(p["bias"], x.ndim) if "bias" in p else x


def linear(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    y = x @ p["kernel"]
    return y + row(p["bias"], y.ndim) if "bias" in p else y


def norm_params(seed: int, *shape: int, bias: bool = True) -> dict[str, jax.Array]:
    scale = {"scale": 1 + normal(seed, *shape, scale=0.3)}
    return {**scale, "bias": normal(seed + 1000, *shape, scale=0.5)} if bias else scale


def linear_params(seed: int, *shape: int, bias: bool = True) -> dict[str, jax.Array]:
    kernel = {"kernel": weight(seed, *shape)}
    return {**kernel, "bias": normal(seed + 2000, *shape[:-2], shape[-1], scale=0.2)} if bias else kernel


def attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Causal attention of [batch, tokens, channels]."""
    split = [a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v)]
    scores = jnp.einsum("bthd,bshd->bhts", split[0] / np.float32(split[0].shape[-1] ** 0.5), split[1])
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    p = jax.nn.softmax(jnp.where(causal, scores, jnp.float32(-1e9)), -1)
    return jnp.einsum("bhts,bshd->bthd", p, split[2]).reshape(q.shape)


def block(p: Any, x: jax.Array, heads: int = 2) -> jax.Array:
    """A pre-norm transformer block with ReLU."""
    h = norm(x, p["ln1"])
    x = x + linear(attend(*(linear(h, p["attn"][n]) for n in "qkv"), heads), p["attn"]["o"])
    return x + linear(jax.nn.relu(linear(norm(x, p["ln2"]), p["fc1"])), p["fc2"])


def block_params(seed: int, width: int, *layers: int) -> dict[str, Any]:
    """One block, or a stack of them with leading layer axes."""
    square = (*layers, width, width)
    return {
        "attn": {n: linear_params(seed + i, *square) for i, n in enumerate("qkvo")},
        "ln1": norm_params(seed + 10, *layers, width),
        "ln2": norm_params(seed + 11, *layers, width),
        "fc1": linear_params(seed + 12, *layers, width, 2 * width),
        "fc2": linear_params(seed + 13, *layers, 2 * width, width),
    }


def block_sites(prefix: str) -> set[str]:
    names = [f"attn/{n}/kernel" for n in "qkvo"] + ["attn/dot0", "attn/dot1", "fc1/kernel", "fc2/kernel"]
    return {f"{prefix}/{n}" for n in names}
