"""LLaMA (Touvron et al. 2023, arXiv:2302.13971) as Flax NNX modules: transformers' ``LlamaForCausalLM``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models.decoder import Decoder, Keep
from jaxq.models.family import Family, with_prefix
from jaxq.models.layers import Embedding, activation, attend, causal_bias
from jaxq.models.rope import angles, magnitude, read_rope, rotate

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


@dataclass(frozen=True)
class Variant:
    """Where LLaMA's descendants differ: which projections have biases, whether q and k are normed head by head, and how
    many tokens back each layer sees (None: all)."""

    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions, ``[B, T, D] -> [B, T, D]``, and what is kept."""

    def __init__(self, config: dict, variant: Variant, rngs: nnx.Rngs):
        width, bias = config["hidden_size"], variant.qkv_bias
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.dim = config.get("head_dim") or width // self.heads
        self.q = nnx.Linear(width, self.heads * self.dim, use_bias=bias, rngs=rngs)
        self.k = nnx.Linear(width, self.kv_heads * self.dim, use_bias=bias, rngs=rngs)
        self.v = nnx.Linear(width, self.kv_heads * self.dim, use_bias=bias, rngs=rngs)
        self.q_norm = _norm(self.dim, config, rngs) if variant.head_norms else None
        self.k_norm = _norm(self.dim, config, rngs) if variant.head_norms else None
        self.out = nnx.Linear(self.heads * self.dim, width, use_bias=variant.out_bias, rngs=rngs)

    def __call__(
        self, x: jax.Array, turn: Callable[[jax.Array], jax.Array], bias: jax.Array, keep: Keep
    ) -> tuple[jax.Array, Any]:
        batch, length, _ = x.shape
        q = self.q(x).reshape(batch, length, self.heads, self.dim)
        k = self.k(x).reshape(batch, length, self.kv_heads, self.dim)
        v = self.v(x).reshape(batch, length, self.kv_heads, self.dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        k, v, kept = keep(turn(k), v)
        q = turn(q) * (self.dim**-0.5)
        k, v = (jnp.repeat(t, self.heads // self.kv_heads, axis=2) for t in (k, v))
        return self.out(attend(q, k, v, bias).reshape(batch, length, -1)), kept


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: dict, bias: bool, rngs: nnx.Rngs):
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.activation = activation(config, "hidden_act")
        self.gate = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down = nnx.Linear(inner, width, use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """A block: attention and MLP, each with a residual and a root-mean-square norm before it."""

    def __init__(self, config: dict, variant: Variant, rngs: nnx.Rngs):
        width = config["hidden_size"]
        self.attn_norm = _norm(width, config, rngs)
        self.attn = Attention(config, variant, rngs)
        self.mlp_norm = _norm(width, config, rngs)
        self.mlp = MLP(config, variant.mlp_bias, rngs)

    def __call__(
        self, x: jax.Array, turn: Callable[[jax.Array], jax.Array], bias: jax.Array, keep: Keep
    ) -> tuple[jax.Array, Any]:
        mixed, kept = self.attn(self.attn_norm(x), turn, bias, keep)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), kept


class CausalLM(Decoder):
    """The decoder with its language-model head; ``config`` is the checkpoint's ``config.json`` as a dict.

    Texts of any length will do: positions are no table, and dynamic rope is made for texts beyond the nominal length
    (of a step the length is that of its caches). Raises ValueError if the configuration asks for an activation function
    or a rotary type that is not known here.
    """

    def __init__(self, config: dict, variant: Variant, *, rngs: nnx.Rngs):
        width = config["hidden_size"]
        self.rope, self.windows = nnx.static(read_rope(config)), variant.windows
        self.embed = Embedding(config["vocab_size"], width, rngs=rngs)
        self.layers = nnx.List([Layer(config, variant, rngs) for _ in variant.windows])
        self.final_norm = _norm(width, config, rngs)
        self.kept = tuple((layer.attn.kv_heads, layer.attn.dim) for layer in self.layers)
        tied = config["tie_word_embeddings"]
        self.lm_head = None if tied else nnx.Linear(width, config["vocab_size"], use_bias=False, rngs=rngs)

    def hidden(
        self, tokens: jax.Array, places: jax.Array, keys: int, mask: jax.Array | None, keeps: Sequence[Keep]
    ) -> tuple[jax.Array, tuple]:
        turned = angles(self.rope, self.layers[0].attn.dim, places, keys)
        turn = partial(rotate, angles=turned, magnitude=magnitude(self.rope))
        x, kept = self.embed(tokens), []
        biases = {window: causal_bias(places, keys, mask, x.dtype, window) for window in self.windows}
        for layer, window, keep in zip(self.layers, self.windows, keeps, strict=True):
            x, of_layer = layer(x, turn, biases[window], keep)
            kept.append(of_layer)
        return x, tuple(kept)

    def head(self, x: jax.Array) -> jax.Array:
        x = self.final_norm(x)
        return self.embed.attend(x) if self.lm_head is None else self.lm_head(x)


def _norm(width: int, config: dict, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=config["rms_norm_eps"], rngs=rngs)


def llama(config: dict, *, rngs: nnx.Rngs) -> CausalLM:
    """LLaMA 1, 2 and 3: one switch for the biases of attention, one for those of the MLP."""
    config = DEFAULTS | config
    bias, everywhere = config["attention_bias"], (None,) * config["num_hidden_layers"]
    return CausalLM(config, Variant(everywhere, bias, bias, config["mlp_bias"]), rngs=rngs)


# A tied model's checkpoint may hold its head all the same.
FAMILY = Family(llama, CHECKPOINT_NAMES, partial(with_prefix, "model."), ignored=("lm_head.weight",), causal=True)
