"""What the models share: tables, activation functions, and attention as the two contractions it is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models.decoder import Keep, keep_nothing

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def activation(config: dict, key: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function that ``config[key]`` names; ValueError if it is not known."""
    if config[key] not in ACTIVATIONS:
        raise ValueError(f"config.json: {key} {config[key]!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config[key]]


def label_count(config: dict) -> int:
    """How many labels a classifier has; two go without saying."""
    return len(config.get("id2label", (0, 1)))


class Embedding(nnx.Module):
    """A table of vectors, used in the type its parameter has (``nnx.Embed`` keeps the type it was built with)."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (count, width)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Integers of any shape -> their rows, ``[..., width]``; an id outside the table yields NaN."""
        return jnp.take(self.embedding[...], ids, axis=0)

    def attend(self, x: jax.Array) -> jax.Array:
        """The table as a tied head: ``[..., width] -> [..., count]``."""
        return x @ self.embedding[...].T


class Attention(nnx.Module):
    """Multi-head self-attention, ``[B, T, D] -> [B, T, D]``, and what ``keep`` keeps; ``bias`` as below."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True, out_bias: bool = True, rngs: nnx.Rngs):
        self.heads = heads
        self.q = nnx.Linear(width, width, use_bias=qkv_bias, rngs=rngs)
        self.k = nnx.Linear(width, width, use_bias=qkv_bias, rngs=rngs)
        self.v = nnx.Linear(width, width, use_bias=qkv_bias, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=out_bias, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, keep: Keep = keep_nothing) -> tuple[jax.Array, Any]:
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q = self.q(x) * (split[-1] ** -0.5)
        k, v, kept = keep(self.k(x).reshape(split), self.v(x).reshape(split))
        mixed = attend(q.reshape(split), k, v, bias)
        return self.out(mixed.reshape(x.shape)), kept


class MLP(nnx.Module):
    """Two linear layers with an activation function between them, ``[..., D] -> [..., D]``."""

    def __init__(
        self,
        width: int,
        inner: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.up = nnx.Linear(width, inner, use_bias=use_bias, rngs=rngs)
        self.down = nnx.Linear(inner, width, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))


def causal_bias(
    places: jax.Array, keys: int, mask: jax.Array | None, dtype: jnp.dtype, window: int | None = None
) -> jax.Array:
    """What is added to the attention scores: 0 where a key may be seen, the most negative number elsewhere.

    ``places``, int ``[T]``, are the queries' among the ``keys``; ``mask`` is None or ``[B, keys]`` (bool or integer, 1
    = a real token). A position sees itself and, with a ``window``, the ``window - 1`` before it. Returns
    ``[1 or B, 1, T, keys]`` of ``dtype``.
    """
    before = (places[:, None] - jnp.arange(keys, dtype=places.dtype)[None])[None, None]
    visible = before >= 0
    if window is not None:
        visible = visible & (before < window)
    if mask is not None:
        visible = visible & mask.astype(bool)[:, None, None, :]
    return _bias(visible, dtype)


def padding_bias(mask: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """As ``causal_bias`` where every real token may be seen from everywhere; returns ``[1 or B, 1, 1, T or 1]``."""
    return _bias(jnp.ones((1, 1, 1, 1), bool) if mask is None else mask.astype(bool)[:, None, None, :], dtype)


def _bias(visible: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.where(visible, jnp.zeros((), dtype), jnp.finfo(dtype).min.astype(dtype))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax attention of already scaled queries: q ``[B, T, H, d]``, k, v ``[B, keys, H, d]``, bias as above -> as q.

    The softmax runs in float32 whatever the computation's type, as transformers does.
    """
    scores = jnp.einsum("bthd,bshd->bhts", q, k) + bias
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype)
    # Heads first and then turned: asked for tokens first, XLA's CPU compiler takes up to twice the time.
    return jnp.einsum("bhts,bshd->bhtd", probabilities, v).transpose(0, 2, 1, 3)
