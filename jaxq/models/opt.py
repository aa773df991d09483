"""OPT (Zhang et al. 2022, arXiv:2205.01068) as Flax NNX modules: the decoder of transformers' ``OPTForCausalLM``."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models.decoder import Decoder, Keep
from jaxq.models.family import Family, with_prefix
from jaxq.models.layers import MLP, Attention, Embedding, activation, causal_bias

DEFAULTS = {
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
    "_remove_final_layer_norm": False,
}

# Parameter path -> module name in a Hugging Face checkpoint; {} stands for the layer's number.
CHECKPOINT_NAMES = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "layers/{}/attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "layers/{}/attn/q": "model.decoder.layers.{}.self_attn.q_proj",
    "layers/{}/attn/k": "model.decoder.layers.{}.self_attn.k_proj",
    "layers/{}/attn/v": "model.decoder.layers.{}.self_attn.v_proj",
    "layers/{}/attn/out": "model.decoder.layers.{}.self_attn.out_proj",
    "layers/{}/mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "layers/{}/mlp/up": "model.decoder.layers.{}.fc1",
    "layers/{}/mlp/down": "model.decoder.layers.{}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
}

POSITION_OFFSET = 2  # the first two rows of the position table belong to padding


def _norm(config: dict, rngs: nnx.Rngs) -> nnx.LayerNorm:
    affine = config["layer_norm_elementwise_affine"]
    return nnx.LayerNorm(
        config["hidden_size"], epsilon=1e-5, use_bias=affine, use_scale=affine, use_fast_variance=False, rngs=rngs
    )


class Layer(nnx.Module):
    """A block: attention and MLP, each with a residual and a norm before (or, as in OPT-350m, after) it."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        width, bias = config["hidden_size"], config["enable_bias"]
        self.norm_first = config["do_layer_norm_before"]
        self.attn_norm = _norm(config, rngs)
        self.attn = Attention(width, config["num_attention_heads"], qkv_bias=bias, out_bias=bias, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        act = activation(config, "activation_function")
        self.mlp = MLP(width, config["ffn_dim"], act, use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, keep: Keep) -> tuple[jax.Array, Any]:
        mixed, kept = self.attn(self.attn_norm(x) if self.norm_first else x, bias, keep)
        if self.norm_first:
            x = x + mixed
            return x + self.mlp(self.mlp_norm(x)), kept
        x = self.attn_norm(x + mixed)
        return self.mlp_norm(x + self.mlp(x)), kept


class CausalLM(Decoder):
    """The decoder with its language-model head; ``config`` is the checkpoint's ``config.json`` as a dict.

    Raises ValueError if the configuration asks for an activation function that is not known here, and, where it is
    called, for more tokens than the position table has room for.
    """

    def __init__(self, config: dict, *, rngs: nnx.Rngs):
        config = DEFAULTS | config
        width = config["hidden_size"]
        outer = config.get("word_embed_proj_dim") or width
        self.max_length = config["max_position_embeddings"]
        heads = config["num_attention_heads"]
        self.kept = ((heads, width // heads),) * config["num_hidden_layers"]
        self.embed = Embedding(config["vocab_size"], outer, rngs=rngs)
        self.positions = Embedding(self.max_length + POSITION_OFFSET, width, rngs=rngs)
        self.project_in = nnx.Linear(outer, width, use_bias=False, rngs=rngs) if outer != width else None
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])
        has_final_norm = config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]
        self.final_norm = _norm(config, rngs) if has_final_norm else None
        self.project_out = nnx.Linear(width, outer, use_bias=False, rngs=rngs) if outer != width else None
        tied = config["tie_word_embeddings"]
        self.lm_head = None if tied else nnx.Linear(outer, config["vocab_size"], use_bias=False, rngs=rngs)

    def hidden(
        self, tokens: jax.Array, places: jax.Array, keys: int, mask: jax.Array | None, keeps: Sequence[Keep]
    ) -> tuple[jax.Array, tuple]:
        if keys > self.max_length:
            raise ValueError(f"OPT: {keys} tokens in a row, the position table has room for {self.max_length}")
        x = self.embed(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.positions(_rows(places, mask))
        bias, kept = causal_bias(places, keys, mask, x.dtype), []
        for layer, keep in zip(self.layers, keeps, strict=True):
            x, of_layer = layer(x, bias, keep)
            kept.append(of_layer)
        return x, tuple(kept)

    def head(self, x: jax.Array) -> jax.Array:
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.embed.attend(x) if self.lm_head is None else self.lm_head(x)


def _rows(places: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Rows of the position table: real tokens are counted from 0, padding takes row 1 (as transformers does)."""
    if mask is None:
        return places[None] + POSITION_OFFSET
    mask = mask.astype(jnp.int32)
    return jnp.cumsum(mask, axis=1) * mask - 1 + POSITION_OFFSET


# A tied model's checkpoint may hold its head all the same.
FAMILY = Family(
    CausalLM, CHECKPOINT_NAMES, partial(with_prefix, "model.decoder."), ignored=("lm_head.weight",), causal=True
)
