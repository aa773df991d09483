"""BERT (Devlin et al. 2019, arXiv:1810.04805) as Flax NNX modules: transformers' ``BertModel`` and two of its heads."""

import re

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models.family import Family
from jaxq.models.layers import MLP, Attention, Embedding, activation, label_count, padding_bias

DEFAULTS = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "is_decoder": False,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "type_vocab_size": 2,
}

# Parameter path -> module name in a Hugging Face checkpoint; {} stands for the layer's number.
CHECKPOINT_NAMES = {
    "embed": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "token_types": "bert.embeddings.token_type_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "layers/{}/attn/q": "bert.encoder.layer.{}.attention.self.query",
    "layers/{}/attn/k": "bert.encoder.layer.{}.attention.self.key",
    "layers/{}/attn/v": "bert.encoder.layer.{}.attention.self.value",
    "layers/{}/attn/out": "bert.encoder.layer.{}.attention.output.dense",
    "layers/{}/attn_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "layers/{}/mlp/up": "bert.encoder.layer.{}.intermediate.dense",
    "layers/{}/mlp/down": "bert.encoder.layer.{}.output.dense",
    "layers/{}/mlp_norm": "bert.encoder.layer.{}.output.LayerNorm",
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
    "lm_head": "cls.predictions",
    "lm_head/dense": "cls.predictions.transform.dense",
    "lm_head/norm": "cls.predictions.transform.LayerNorm",
}


def full_name(tensor: str) -> str:
    """With the prefix that a bare encoder's checkpoint lacks; norms by their present names, not TensorFlow's."""
    tensor = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", tensor))
    return tensor if tensor.startswith(("bert.", "cls.", "classifier.")) else f"bert.{tensor}"


def sentence_embedding(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of each text's real tokens, of length 1: hidden ``[B, T, D]``, mask ``[B, T]`` -> float32 ``[B, D]``.

    As sentence-transformers pools by the mean (Reimers and Gurevych 2019, arXiv:1908.10084). A text without a real
    token is all zeros.
    """
    weights = mask.astype(jnp.float32)[..., None]
    mean = (hidden.astype(jnp.float32) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _norm(config: dict, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config["hidden_size"], epsilon=config["layer_norm_eps"], use_fast_variance=False, rngs=rngs)


class Layer(nnx.Module):
    """A block: attention and MLP, each with a residual and a norm after it."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        self.attn = Attention(config["hidden_size"], config["num_attention_heads"], rngs=rngs)
        self.attn_norm = _norm(config, rngs)
        act = activation(config, "hidden_act")
        self.mlp = MLP(config["hidden_size"], config["intermediate_size"], act, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = self.attn_norm(x + self.attn(x, bias)[0])
        return self.mlp_norm(x + self.mlp(x))


class Encoder(nnx.Module):
    """The encoder without a head. ``config`` is the checkpoint's ``config.json`` as a dict.

    A pooler that the checkpoint may have is left out: hidden states do not depend on it.
    """

    def __init__(self, config: dict, *, rngs: nnx.Rngs):
        width = config["hidden_size"]
        self.max_length = config["max_position_embeddings"]
        self.embed = Embedding(config["vocab_size"], width, rngs=rngs)
        self.positions = Embedding(self.max_length, width, rngs=rngs)
        self.token_types = Embedding(config["type_vocab_size"], width, rngs=rngs)
        self.embed_norm = _norm(config, rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states of the last layer: int ``[B, T]`` -> ``[B, T, D]``; those of padding mean nothing.

        ``mask`` is bool or int ``[B, T]`` (1 = real token); ``token_types`` int ``[B, T]``, default all 0, tells the
        first text of a pair from the second. Raises ValueError if T exceeds the position table.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"BERT: {length} tokens in a row, the position table has room for {self.max_length}")
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = self.embed(tokens) + self.token_types(types) + self.positions(jnp.arange(length, dtype=jnp.int32)[None])
        x = self.embed_norm(x)
        bias = padding_bias(mask, x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Classifier(Encoder):
    """Logits ``[B, labels]`` of whole texts, from the first token by way of the pooler; one label is a regression."""

    def __init__(self, config: dict, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config["hidden_size"]
        self.pooler = nnx.Linear(width, width, rngs=rngs)
        self.classifier = nnx.Linear(width, label_count(config), rngs=rngs)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        first = super().__call__(tokens, mask, token_types)[:, 0]
        return self.classifier(jnp.tanh(self.pooler(first)))


class LMHead(nnx.Module):
    """From hidden states to logits; ``table`` is the word embedding, to which the head is tied."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        if not config["tie_word_embeddings"]:
            raise ValueError("config.json: tie_word_embeddings False is not supported for BertForMaskedLM")
        width = config["hidden_size"]
        self.activation = activation(config, "hidden_act")
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.norm = _norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros((config["vocab_size"],)))

    def __call__(self, x: jax.Array, table: Embedding) -> jax.Array:
        x = self.norm(self.activation(self.dense(x)))
        return table.attend(x) + self.bias[...][None, None]


class MaskedLM(Encoder):
    """Logits ``[B, T, V]`` of the token at each place."""

    def __init__(self, config: dict, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.lm_head = LMHead(config, rngs)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        return self.lm_head(super().__call__(tokens, mask, token_types), self.embed)


ARCHITECTURES = {"BertModel": Encoder, "BertForSequenceClassification": Classifier, "BertForMaskedLM": MaskedLM}


def network(config: dict, *, rngs: nnx.Rngs) -> Encoder:
    """The module that the configuration's ``architectures`` names; without one, the encoder.

    Raises ValueError for another architecture, a decoder, positions that are not a table, an unknown activation, a
    masked language model whose head is not tied to its embedding.
    """
    config = DEFAULTS | config
    name = (config["architectures"] or DEFAULTS["architectures"])[0]
    if name not in ARCHITECTURES:
        raise ValueError(f"config.json: architecture {name} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for key in ("is_decoder", "position_embedding_type"):
        if config[key] != DEFAULTS[key]:
            raise ValueError(f"config.json: {key} {config[key]!r} is not supported; supported: {DEFAULTS[key]!r}")
    return ARCHITECTURES[name](config, rngs=rngs)


FAMILY = Family(
    network,
    CHECKPOINT_NAMES,
    full_name,
    # Heads beside the one that the configuration asks for, and the copies of tied parameters.
    ignored=(
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
        *("cls.seq_relationship.weight", "cls.seq_relationship.bias"),
        *("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    ),
    causal=False,
)
