"""Write tests/golden/<name>/: tiny random checkpoints and what transformers computes from them (needs torch).

python experiments/make_model_goldens.py [NAME ...]

Logits, or the hidden states of models without a head.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
VOCABULARY, BATCH, LENGTH = 40, 2, 10

OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "ffn_dim": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "dropout": 0.0,
}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
}
ROPE = {"rope_theta": 100.0, "factor": 4.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 24, "n_head": 3, "n_layer": 2}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
VIT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "image_size": [8, 12],
    "patch_size": 4,
    "num_labels": 3,
}


def models() -> dict[str, PreTrainedModel]:
    return {
        "opt": OPTForCausalLM(OPTConfig(**OPT)),
        "opt-post-norm": OPTForCausalLM(OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16)),
        "llama": LlamaForCausalLM(LlamaConfig(**LLAMA)),
        "llama-sharded": LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
        "llama-rope-linear": LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters={"rope_type": "linear", **ROPE})),
        "llama-rope-llama3": LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=LLAMA3)),
        "mistral": MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**LLAMA)),
        "bloom": BloomForCausalLM(BloomConfig(**BLOOM)),
        "bert": BertModel(BertConfig(**BERT)),
        "bert-classifier": BertForSequenceClassification(BertConfig(**BERT)),
        "bert-masked-lm": BertForMaskedLM(BertConfig(**BERT)),
        "vit": ViTForImageClassification(ViTConfig(**VIT, qkv_bias=False)),
        "deit": DeiTForImageClassification(DeiTConfig(**VIT)),
        "deit-teacher": DeiTForImageClassificationWithTeacher(DeiTConfig(**VIT)),
    }


def randomise(model: PreTrainedModel) -> None:
    """Every parameter away from its initial value, for zero biases and unit scales would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = noise + 1 if "norm" in name.lower() and name.endswith("weight") else noise


def outputs(model: PreTrainedModel, inputs: np.ndarray, **more: np.ndarray) -> np.ndarray:
    found = model(torch.tensor(inputs), **{name: torch.tensor(value) for name, value in more.items()})
    return (found.logits if "logits" in found else found.last_hidden_state).numpy()


@torch.no_grad()
def write(name: str, model: PreTrainedModel) -> None:
    model.eval().set_attn_implementation("eager")
    randomise(model)
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="12KB" if "sharded" in name else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = of_images(model) if isinstance(model.config, ViTConfig | DeiTConfig) else of_text(name, model)
    np.savez_compressed(folder / "expected.npz", **expected)


def of_images(model: PreTrainedModel) -> dict[str, np.ndarray]:
    shape = (BATCH, *model.config.image_size, model.config.num_channels)
    pixels = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return {"pixels": pixels, "logits": outputs(model, pixels.transpose(0, 3, 1, 2))}


def of_text(name: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (BATCH, LENGTH))
    mask = np.ones((BATCH, LENGTH), np.int64)
    mask[0, :3], mask[1, -2:] = 0, 0  # one row padded on the left, one on the right
    more = {}
    if name.startswith("bert"):
        more["token_types"] = (np.arange(LENGTH) >= np.array([[4], [7]])).astype(np.int64)
        more["typed_logits"] = outputs(model, tokens, attention_mask=mask, token_type_ids=more["token_types"])
    return more | {
        "tokens": tokens.astype(np.int32),
        "mask": mask.astype(np.int32),
        "logits": outputs(model, tokens),
        "masked_logits": outputs(model, tokens, attention_mask=mask),
    }


if __name__ == "__main__":
    chosen = sys.argv[1:]
    for name, model in models().items():
        if not chosen or name in chosen:
            write(name, model)
