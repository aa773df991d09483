"""BLOOM (Scao et al. 2022, arXiv:2211.05100) as Flax NNX modules: transformers' ``BloomForCausalLM``; BLOOMZ too."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.models.decoder import Decoder, Keep
from jaxq.models.family import Family, with_prefix
from jaxq.models.layers import ACTIVATIONS, MLP, Embedding, attend, causal_bias

DEFAULTS = {
    "apply_residual_connection_post_layernorm": False,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
# What configurations of older checkpoints call these.
SYNONYMS = {"hidden_size": "n_embed", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}

# Parameter path -> module name in a Hugging Face checkpoint; {} stands for the layer's number.
CHECKPOINT_NAMES = {
    "embed": "transformer.word_embeddings",
    "embed_norm": "transformer.word_embeddings_layernorm",
    "layers/{}/attn_norm": "transformer.h.{}.input_layernorm",
    "layers/{}/attn/qkv": "transformer.h.{}.self_attention.query_key_value",
    "layers/{}/attn/out": "transformer.h.{}.self_attention.dense",
    "layers/{}/mlp_norm": "transformer.h.{}.post_attention_layernorm",
    "layers/{}/mlp/up": "transformer.h.{}.mlp.dense_h_to_4h",
    "layers/{}/mlp/down": "transformer.h.{}.mlp.dense_4h_to_h",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head, float64 ``[heads]`` (Press et al. 2021, arXiv:2108.12409).

    2^(-8 i / n) for the greatest power of two n in ``heads``; the remaining heads take every other slope of 2 n.
    """
    n = 2 ** int(math.log2(heads))
    extra = 2.0 ** (-4 / n * np.arange(1, 2 * (heads - n) + 1, 2))
    return np.concatenate([2.0 ** (-8 / n * np.arange(1, n + 1)), extra])


def alibi(heads: int, length: int, mask: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """What ALiBi adds to the scores of a key, ``[1 or B, heads, 1, T]``: its slope times its number among real ones."""
    real = jnp.ones((1, length), jnp.int32) if mask is None else mask.astype(jnp.int32)
    places = ((jnp.cumsum(real, axis=1) - 1) * real).astype(jnp.float32)
    return (jnp.asarray(slopes(heads), jnp.float32)[None, :, None, None] * places[:, None, None, :]).astype(dtype)


class Attention(nnx.Module):
    """Causal self-attention, ``[B, T, D] -> [B, T, D]``, and what is kept; one projection makes q, k and v by heads."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, keep: Keep) -> tuple[jax.Array, Any]:
        batch, length, width = x.shape
        fused = self.qkv(x).reshape(batch, length, self.heads, 3, width // self.heads)
        q, k, v = (part[:, :, :, 0] for part in jnp.split(fused, 3, axis=3))
        k, v, kept = keep(k, v)
        mixed = attend(q * (q.shape[-1] ** -0.5), k, v, bias)
        return self.out(mixed.reshape(x.shape)), kept


class Layer(nnx.Module):
    """A block: attention and MLP, each with a norm before it and a residual, of its input or of what the norm makes."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        width = config["hidden_size"]
        self.residual_of_norm = config["apply_residual_connection_post_layernorm"]
        self.attn_norm = _norm(config, rngs)
        self.attn = Attention(width, config["n_head"], rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(width, 4 * width, ACTIVATIONS["gelu_pytorch_tanh"], rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, keep: Keep) -> tuple[jax.Array, Any]:
        h = self.attn_norm(x)
        mixed, kept = self.attn(h, bias, keep)
        x = (h if self.residual_of_norm else x) + mixed
        h = self.mlp_norm(x)
        return (h if self.residual_of_norm else x) + self.mlp(h), kept


class CausalLM(Decoder):
    """The decoder with its language-model head; ``config`` is the checkpoint's ``config.json`` as a dict.

    Texts of any length will do: positions are no table.
    """

    def __init__(self, config: dict, *, rngs: nnx.Rngs):
        old = {ours: config[theirs] for ours, theirs in SYNONYMS.items() if theirs in config}
        config = DEFAULTS | old | config
        width, self.heads = config["hidden_size"], config["n_head"]
        self.kept = ((self.heads, width // self.heads),) * config["n_layer"]
        self.embed = Embedding(config["vocab_size"], width, rngs=rngs)
        self.embed_norm = _norm(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["n_layer"])])
        self.final_norm = _norm(config, rngs)
        tied = config["tie_word_embeddings"]
        self.lm_head = None if tied else nnx.Linear(width, config["vocab_size"], use_bias=False, rngs=rngs)

    def hidden(
        self, tokens: jax.Array, places: jax.Array, keys: int, mask: jax.Array | None, keeps: Sequence[Keep]
    ) -> tuple[jax.Array, tuple]:
        x, kept = self.embed_norm(self.embed(tokens)), []
        bias = alibi(self.heads, keys, mask, x.dtype) + causal_bias(places, keys, mask, x.dtype)
        for layer, keep in zip(self.layers, keeps, strict=True):
            x, of_layer = layer(x, bias, keep)
            kept.append(of_layer)
        return x, tuple(kept)

    def head(self, x: jax.Array) -> jax.Array:
        x = self.final_norm(x)
        return self.embed.attend(x) if self.lm_head is None else self.lm_head(x)


def _norm(config: dict, rngs: nnx.Rngs) -> nnx.LayerNorm:
    epsilon = config["layer_norm_epsilon"]
    return nnx.LayerNorm(config["hidden_size"], epsilon=epsilon, use_fast_variance=False, rngs=rngs)


# A tied model's checkpoint may hold its head all the same.
FAMILY = Family(
    CausalLM, CHECKPOINT_NAMES, partial(with_prefix, "transformer."), ignored=("lm_head.weight",), causal=True
)
