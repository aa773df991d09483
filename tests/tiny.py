"""Models small enough to make and quantize within a test, in Hugging Face format."""

from functools import cache
from pathlib import Path

import jax
import numpy as np

from jaxq.models import Model, init, load, model_of, save_hf

OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 1024,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
BLOOM = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "hidden_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 1024,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 32,
}
VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "id2label": {str(i): str(i) for i in range(5)},
}
PREPROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
TEXT = (
    "def add(a, b):\n    return a + b\n\n\nclass Thing:\n    name = 'x'\n    for i in range(10):\n        print(i)\n"
    * 40
)


@cache
def tokenizer():
    """The embedded model's, of 1024 tokens."""
    return load("stdlib-opt").tokenizer


def tiny_model(config: dict, **changes: object) -> Model:
    """Random weights; the norms have the channel outliers and shifts that OS+ is there for."""
    config = {**config, **changes}
    random = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, noise = jax.tree_util.keystr(path), random.standard_normal(leaf.shape).astype(np.float32)
        if "norm" in name:
            return np.exp(noise) if "scale" in name else noise
        return noise * np.float32(0.5 if "kernel" in name else 0.1)

    layout = jax.eval_shape(lambda: init(config))
    params = jax.tree_util.tree_map_with_path(draw, layout)
    if "image_size" in config:
        return model_of(config, params, name="tiny", preprocessor=PREPROCESSOR)
    return model_of(config, params, tokenizer(), "tiny")


def write_model(folder: Path, config: dict, max_shard_bytes: int = 10**9, **changes: object) -> Path:
    model = tiny_model(config, **changes)
    save_hf(model, model.params, folder, max_shard_bytes=max_shard_bytes)
    return folder
