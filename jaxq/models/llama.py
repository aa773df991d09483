"""LLaMA (Touvron et al. 2023, arXiv:2302.13971) as Flax NNX modules: transformers' ``LlamaForCausalLM``."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxq.models.family import Family
from jaxq.models.layers import Embedding, activation, attend, causal_bias

DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

# Parameter path -> module name in a Hugging Face checkpoint; {} stands for the layer's number.
CHECKPOINT_NAMES = {
    "embed": "model.embed_tokens",
    "layers/{}/attn_norm": "model.layers.{}.input_layernorm",
    "layers/{}/attn/q": "model.layers.{}.self_attn.q_proj",
    "layers/{}/attn/k": "model.layers.{}.self_attn.k_proj",
    "layers/{}/attn/v": "model.layers.{}.self_attn.v_proj",
    "layers/{}/attn/out": "model.layers.{}.self_attn.o_proj",
    "layers/{}/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/{}/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/{}/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/{}/mlp/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


def full_name(tensor: str) -> str:
    """With the prefix that the checkpoint of a bare decoder lacks."""
    return tensor if tensor.startswith("lm_head.") else "model." + tensor.removeprefix("model.")


def rope(config: dict) -> dict:
    """Rotary settings from either spelling (``rope_parameters``, or ``rope_theta`` and ``rope_scaling``).

    Raises ValueError for a type other than ROPE_TYPES or a partial rotation.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = found.get("rope_theta", config.get("rope_theta", 10000.0))
    return found | {"rope_type": kind, "rope_theta": theta}


def frequencies(rope: dict, dim: int, length: int, max_length: int) -> np.ndarray:
    """Angle per position of each pair of channels, float64 ``[dim / 2]``, as transformers' modeling_rope_utils."""
    theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
    if rope["rope_type"] == "dynamic":  # the base grows with the text's length
        stretch = factor * max(length, max_length) / max_length - (factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    angles = theta ** (-np.arange(0, dim, 2) / dim)
    if rope["rope_type"] == "linear":
        return angles / factor
    if rope["rope_type"] != "llama3":
        return angles
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * angles / (2 * math.pi)  # within the original context
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: slow, divided by the factor; 1: fast, kept
    return (1 - share) * angles / factor + share * angles


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn channel pairs (i, i + d/2) of ``x [B, T, H, d]`` by ``angles [T, d/2]``."""
    cos, sin = (f(angles)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        width, bias = config["hidden_size"], config["attention_bias"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.dim = config.get("head_dim") or width // self.heads
        self.q = nnx.Linear(width, self.heads * self.dim, use_bias=bias, rngs=rngs)
        self.k = nnx.Linear(width, self.kv_heads * self.dim, use_bias=bias, rngs=rngs)
        self.v = nnx.Linear(width, self.kv_heads * self.dim, use_bias=bias, rngs=rngs)
        self.out = nnx.Linear(self.heads * self.dim, width, use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, bias: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        q = self.q(x).reshape(batch, length, self.heads, self.dim)
        k = self.k(x).reshape(batch, length, self.kv_heads, self.dim)
        v = self.v(x).reshape(batch, length, self.kv_heads, self.dim)
        q, k = rotate(q, angles) * (self.dim**-0.5), rotate(k, angles)
        k, v = (jnp.repeat(t, self.heads // self.kv_heads, axis=2) for t in (k, v))
        return self.out(attend(q, k, v, bias).reshape(batch, length, -1))


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        width, inner, bias = config["hidden_size"], config["intermediate_size"], config["mlp_bias"]
        self.activation = activation(config, "hidden_act")
        self.gate = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down = nnx.Linear(inner, width, use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """A block: attention and MLP, each with a residual and a root-mean-square norm before it."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        width, epsilon = config["hidden_size"], config["rms_norm_eps"]
        self.attn_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.attn = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, bias: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x), angles, bias)
        return x + self.mlp(self.mlp_norm(x))


class CausalLM(nnx.Module):
    """The decoder with its language-model head; ``config`` is the checkpoint's ``config.json`` as a dict.

    Raises ValueError if the configuration asks for an activation function or a rotary type that is not known here.
    """

    def __init__(self, config: dict, *, rngs: nnx.Rngs):
        config = DEFAULTS | config
        width = config["hidden_size"]
        self.rope, self.max_length = nnx.static(rope(config)), config["max_position_embeddings"]
        self.embed = Embedding(config["vocab_size"], width, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])
        self.final_norm = nnx.RMSNorm(width, epsilon=config["rms_norm_eps"], rngs=rngs)
        tied = config["tie_word_embeddings"]
        self.lm_head = None if tied else nnx.Linear(width, config["vocab_size"], use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """``tokens`` int ``[B, T]``, ``mask`` bool or int ``[B, T]`` (1 = real token) -> logits ``[B, T, V]``."""
        length = tokens.shape[1]
        steps = frequencies(self.rope, self.layers[0].attn.dim, length, self.max_length)
        angles = jnp.arange(length, dtype=jnp.float32)[:, None] * jnp.asarray(steps, jnp.float32)[None]
        x = self.embed(tokens)
        bias = causal_bias(length, mask, x.dtype)
        for layer in self.layers:
            x = layer(x, angles, bias)
        x = self.final_norm(x)
        return self.embed.attend(x) if self.lm_head is None else self.lm_head(x)


# A tied model's checkpoint may hold its head all the same.
FAMILY = Family(CausalLM, CHECKPOINT_NAMES, full_name, ignored=("lm_head.weight",), causal=True)
