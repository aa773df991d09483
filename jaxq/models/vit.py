"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) and DeiT (Touvron et al. 2020, arXiv:2012.12877) for the
classification of images, as Flax NNX modules: transformers' ``ViTForImageClassification``, DeiT's, and its two heads.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxq.models.family import Family
from jaxq.models.layers import MLP, Attention, activation, label_count, padding_bias

DEFAULTS = {
    "hidden_act": "gelu",
    "image_size": 224,
    "layer_norm_eps": 1e-12,
    "num_channels": 3,
    "patch_size": 16,
    "qkv_bias": True,
}

# What transformers 5 calls the modules of a layer, and what transformers 4 did and all checkpoints that it writes do.
RENAMED = {
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")


def checkpoint_names(prefix: str) -> dict[str, str]:
    """Parameter path -> name in a Hugging Face checkpoint, of a module or a parameter; {} stands for the layer."""
    layer = f"{prefix}.encoder.layer.{{}}"
    return {
        "patches": f"{prefix}.embeddings.patch_embeddings.projection",
        "cls_token": f"{prefix}.embeddings.cls_token",
        "distillation_token": f"{prefix}.embeddings.distillation_token",
        "positions": f"{prefix}.embeddings.position_embeddings",
        "layers/{}/attn_norm": f"{layer}.layernorm_before",
        "layers/{}/attn/q": f"{layer}.attention.attention.query",
        "layers/{}/attn/k": f"{layer}.attention.attention.key",
        "layers/{}/attn/v": f"{layer}.attention.attention.value",
        "layers/{}/attn/out": f"{layer}.attention.output.dense",
        "layers/{}/mlp_norm": f"{layer}.layernorm_after",
        "layers/{}/mlp/up": f"{layer}.intermediate.dense",
        "layers/{}/mlp/down": f"{layer}.output.dense",
        "final_norm": f"{prefix}.layernorm",
        "classifier": "classifier",
        "cls_classifier": "cls_classifier",
        "distillation_classifier": "distillation_classifier",
    }


def full_name(prefix: str, tensor: str) -> str:
    """The name that transformers 4 gives a tensor, with the prefix that a bare encoder's checkpoint lacks."""
    for new, old in RENAMED.items():
        tensor = tensor.replace(new, old)
    return tensor if tensor.startswith((f"{prefix}.", *HEADS)) else f"{prefix}.{tensor}"


def pixel_shape(config: dict) -> tuple[int, int, int]:
    """Height, width and channels of the images that the configuration's model reads."""
    config = DEFAULTS | config
    return (*_pair(config["image_size"]), config["num_channels"])


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _norm(config: dict, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config["hidden_size"], epsilon=config["layer_norm_eps"], use_fast_variance=False, rngs=rngs)


class Patches(nnx.Module):
    """Images cut into patches, each mapped linearly to a vector: ``[B, H, W, C] -> [B, patches, D]``.

    The kernel is stored as that of the convolution that this is, ``[h, w, C, D]``, and used as a matrix, so that each
    of a patch's ``h w C`` numbers is a channel to a quantizer.
    """

    def __init__(self, config: dict, rngs: nnx.Rngs):
        self.size = _pair(config["patch_size"])
        shape = (*self.size, config["num_channels"], config["hidden_size"])
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((shape[-1],)))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        (batch, height, width, channels), (h, w), kernel = pixels.shape, self.size, self.kernel[...]
        rows, columns = height // h, width // w
        cut = pixels[:, : rows * h, : columns * w].reshape(batch, rows, h, columns, w, channels)
        flat = cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, h * w * channels)
        return flat.astype(kernel.dtype) @ kernel.reshape(flat.shape[-1], -1) + self.bias[...][None, None]


class Layer(nnx.Module):
    """A block: attention and MLP, each with a residual and a norm before it."""

    def __init__(self, config: dict, rngs: nnx.Rngs):
        width = config["hidden_size"]
        self.attn_norm = _norm(config, rngs)
        self.attn = Attention(width, config["num_attention_heads"], qkv_bias=config["qkv_bias"], rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(width, config["intermediate_size"], activation(config, "hidden_act"), rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x), bias)[0]
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nnx.Module):
    """The encoder of patches, after ``tokens`` vectors of its own (1; with DeiT's distillation token 2)."""

    def __init__(self, config: dict, tokens: int, rngs: nnx.Rngs):
        width, self.pixel_shape = config["hidden_size"], pixel_shape(config)
        self.patches = Patches(config, rngs)
        count = tokens + (self.pixel_shape[0] // self.patches.size[0]) * (self.pixel_shape[1] // self.patches.size[1])
        draw = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(draw(rngs.params(), (1, 1, width)))
        self.distillation_token = nnx.Param(draw(rngs.params(), (1, 1, width))) if tokens == 2 else None
        self.positions = nnx.Param(draw(rngs.params(), (1, count, width)))
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])
        self.final_norm = _norm(config, rngs)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Before the final norm: ``[B, H, W, C] -> [B, tokens + patches, D]``; ValueError for another H, W or C."""
        if pixels.shape[1:] != self.pixel_shape:
            raise ValueError(f"ViT: images {list(pixels.shape[1:])}, the model reads {list(self.pixel_shape)}")
        x = self.patches(pixels)
        own = [token[...] for token in (self.cls_token, self.distillation_token) if token is not None]
        x = jnp.concatenate([*(jnp.broadcast_to(t, (len(x), *t.shape[1:])) for t in own), x], axis=1)
        x = x + self.positions[...]
        bias = padding_bias(None, x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Classifier(Encoder):
    """One head, on the first token. ``config`` is the checkpoint's ``config.json`` as a dict."""

    def __init__(self, config: dict, tokens: int, rngs: nnx.Rngs):
        super().__init__(config, tokens, rngs)
        self.classifier = nnx.Linear(config["hidden_size"], label_count(config), rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Float ``[B, H, W, C]`` -> logits ``[B, labels]``; ValueError for images of another size."""
        return self.classifier(self.final_norm(self.encode(pixels)[:, 0]))


class TaughtClassifier(Encoder):
    """Two heads, on the first token and on the one that learnt from a teacher; as ``Classifier``, their mean."""

    def __init__(self, config: dict, tokens: int, rngs: nnx.Rngs):
        super().__init__(config, tokens, rngs)
        self.cls_classifier = nnx.Linear(config["hidden_size"], label_count(config), rngs=rngs)
        self.distillation_classifier = nnx.Linear(config["hidden_size"], label_count(config), rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.final_norm(self.encode(pixels)[:, :2])
        return (self.cls_classifier(x[:, 0]) + self.distillation_classifier(x[:, 1])) / 2


# Architecture -> module and how many tokens come before the patches. DeiT without distillation is published as a ViT.
VIT = {"ViTForImageClassification": (Classifier, 1)}
DEIT = {"DeiTForImageClassification": (Classifier, 2), "DeiTForImageClassificationWithTeacher": (TaughtClassifier, 2)}


def _family(prefix: str, architectures: dict) -> Family:
    def network(config: dict, *, rngs: nnx.Rngs) -> Encoder:
        """The first of ``architectures`` unless the configuration names one; ValueError for one not among them."""
        config = DEFAULTS | config
        name = (config.get("architectures") or list(architectures))[0]
        if name not in architectures:
            supported = ", ".join(architectures)
            raise ValueError(f"config.json: architecture {name} is not supported; supported: {supported}")
        module, tokens = architectures[name]
        return module(config, tokens, rngs)

    return Family(
        network,
        checkpoint_names(prefix),
        lambda tensor: full_name(prefix, tensor),
        ignored=("pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"),
        causal=False,
        pixels=pixel_shape,
    )


FAMILY, FAMILY_DEIT = _family("vit", VIT), _family("deit", DEIT)
