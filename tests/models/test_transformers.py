"""Against transformers itself, where torch is installed: configurations beyond the goldens, and what save_hf writes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxq
from jaxq.models import init, load, model_of, save_hf
from jaxq.steps import channel_scale, channel_shift, fed_by_attention, fed_by_norm, foldable
from tests.tiny import tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
OPT = dict(
    model_type="opt", vocab_size=40, hidden_size=24, ffn_dim=40, num_attention_heads=3, num_hidden_layers=2,
    max_position_embeddings=16, word_embed_proj_dim=24, pad_token_id=1, bos_token_id=2, eos_token_id=2,
)  # fmt: skip
LLAMA = dict(
    model_type="llama", vocab_size=40, hidden_size=24, intermediate_size=40, num_attention_heads=4,
    num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=16,
)  # fmt: skip
BLOOM = dict(model_type="bloom", vocab_size=40, hidden_size=24, n_head=3, n_layer=2)
BERT = dict(
    model_type="bert", architectures=["BertModel"], vocab_size=40, hidden_size=24, intermediate_size=40,
    num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=16,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, rope_theta=100.0)
QWEN3 = LLAMA | dict(model_type="qwen3", head_dim=8)
SLIDING = dict(use_sliding_window=True, sliding_window=3)
CONFIGS = {
    "opt gelu": OPT | dict(activation_function="gelu"),
    "opt untied": OPT | dict(tie_word_embeddings=False),
    "opt no biases": OPT | dict(enable_bias=False),
    "opt no affine norms": OPT | dict(layer_norm_elementwise_affine=False),
    "opt no final norm": OPT | dict(_remove_final_layer_norm=True),
    "opt pre-norm projected": OPT | dict(word_embed_proj_dim=16),
    "llama multi-head tied": LLAMA | dict(num_key_value_heads=4, tie_word_embeddings=True),
    "llama head_dim": LLAMA | dict(head_dim=8, hidden_act="gelu"),
    "llama one kv head": LLAMA | dict(num_key_value_heads=1, rope_theta=500.0),
    "rope linear": LLAMA | dict(rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=1000.0),
    "rope dynamic": LLAMA | dict(rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1000.0}),
    "rope dynamic beside theta": LLAMA | dict(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=500.0),
    "rope yarn": LLAMA | dict(head_dim=16, rope_parameters=YARN),
    "rope yarn, untruncated": LLAMA | dict(head_dim=16, rope_parameters=YARN | dict(truncate=False, beta_fast=4)),
    "rope yarn with scales": LLAMA | dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=1.0)),
    "rope yarn, factor of attention": LLAMA | dict(rope_scaling=YARN | dict(attention_factor=1.3)),
    "mistral": LLAMA | dict(model_type="mistral", sliding_window=5, head_dim=8),
    "mistral without window": LLAMA | dict(model_type="mistral", sliding_window=None, tie_word_embeddings=True),
    "qwen2": LLAMA | dict(model_type="qwen2", rope_parameters=YARN),
    "qwen2 windows from a layer on": LLAMA | dict(model_type="qwen2", max_window_layers=1, **SLIDING),
    "qwen3": QWEN3 | dict(tie_word_embeddings=True),
    "qwen3 biases, types of layers": QWEN3
    | dict(attention_bias=True, layer_types=["sliding_attention", "full_attention"], **SLIDING),
    "bloom, one head": BLOOM | dict(n_head=1),
    "bloom, twelve heads": BLOOM | dict(n_head=12),
    "bloom, residual after the norm": BLOOM | dict(apply_residual_connection_post_layernorm=True, n_head=4),
    "bloom, untied": BLOOM | dict(tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "bloom, old names": dict(
        model_type="bloom", vocab_size=40, n_embed=24, num_attention_heads=6, num_hidden_layers=2, seq_length=16
    ),
    "bert relu, one token type": BERT | dict(hidden_act="relu", type_vocab_size=1, layer_norm_eps=1e-5),
    "bert regression": BERT | dict(architectures=["BertForSequenceClassification"], id2label={"0": "score"}),
    "bert masked lm": BERT | dict(architectures=["BertForMaskedLM"], hidden_act="gelu_new"),
    "rope llama3": LLAMA | dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=32, rope_theta=100.0)),
}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), init(config))


def torch_logits(directory, tokens, mask=None):
    """The logits of the architecture that the configuration names, or the hidden states where it has no head."""
    (name,) = json.loads((directory / "config.json").read_text()).get("architectures", ["AutoModelForCausalLM"])
    model = getattr(transformers, name).from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        ids, mask = torch.tensor(tokens, dtype=torch.long), None if mask is None else torch.tensor(mask)
        found = model.eval()(ids, attention_mask=mask)
        return (found.logits if "logits" in found else found.last_hidden_state).float().numpy()


EVERY_TIME = (
    "opt gelu", "opt pre-norm projected", "llama one kv head", "rope yarn", "mistral", "qwen2", "bloom, untied",
    "qwen3 biases, types of layers", "bert regression",
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name in EVERY_TIME else pytest.mark.slow)
        for name, config in CONFIGS.items()
    ],
)
def test_saved_models_compute_the_same_in_transformers(config, tmp_path):
    length = 16 if config["model_type"] in ("opt", "bert") else 24  # beyond the nominal context, for dynamic rope
    params, tokens = random_params(config), np.random.default_rng(1).integers(0, 40, (2, length), np.int32)
    model = model_of(config, params)
    save_hf(model, params, tmp_path / "saved")
    expected = torch_logits(tmp_path / "saved", tokens)
    np.testing.assert_allclose(jax.jit(model.forward)(params, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("opt-post-norm", "llama-sharded", "mistral", "bloom", "bert"))
def test_padding_beside_transformers(name):
    model, expected = load(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")
    tokens, mask = expected["tokens"], expected["mask"]
    found = np.asarray(jax.jit(model.forward)(model.params, tokens, mask))
    np.testing.assert_allclose(
        found[mask == 1], torch_logits(GOLDEN / name, tokens, mask)[mask == 1], rtol=1e-4, atol=1e-4
    )


FOLDED = {
    "opt": (OPT, ["embed/*"]),
    "llama": (LLAMA, ["lm_head/*"]),
    "qwen3": (QWEN3 | dict(tie_word_embeddings=True), ["embed/*"]),
    "bloom": (BLOOM | dict(n_head=4), ["embed/*"]),
    "bert": (BERT, []),
    "bert masked lm": (BERT | dict(architectures=["BertForMaskedLM"]), ["embed/*"]),
}


@pytest.mark.parametrize(
    "config, skipped",
    [
        pytest.param(*given, id=name, marks=pytest.mark.slow if name in ("qwen3", "bert masked lm") else [])
        for name, given in FOLDED.items()
    ],
)
def test_a_folded_checkpoint_computes_the_same_in_transformers(config, skipped, tmp_path):
    """OS+'s shifts and scales where they can be folded: other weights, the same function."""
    tokens = np.random.default_rng(1).integers(0, 40, (2, 12), np.int32)
    model = tiny_model(config)
    shifted, scaled = (
        (fed_by_norm, foldable) if model.causal else (fed_by_attention,) * 2
    )  # BERT's residuals read norms
    recipe = jaxq.chain(jaxq.os_plus(channel_shift(shifted), channel_scale(where=scaled)), jaxq.quantize())
    quantized = jaxq.calibrate(model.forward, model.params, [tokens], jaxq.skip(skipped, recipe))
    folded = jaxq.fold(model.forward, model.params, quantized.transforms, tokens)
    assert quantized.transforms and not folded.inputs
    save_hf(model, folded.params, tmp_path / "folded")
    want = np.asarray(jax.jit(model.forward)(model.params, tokens))
    np.testing.assert_allclose(
        torch_logits(tmp_path / "folded", tokens), want, rtol=1e-3, atol=1e-5 * np.abs(want).max()
    )
    moved = [
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (model.params, folded.params)), strict=True)
    ]
    assert sum(moved) >= len(quantized.transforms)


def test_sharded_half_precision_checkpoint_loads_in_transformers(tmp_path):
    model = load(GOLDEN / "opt", dtype=np.float16)
    save_hf(model, model.params, tmp_path / "saved", max_shard_bytes=9000)
    tokens = np.load(GOLDEN / "opt" / "expected.npz")["tokens"]
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert found.dtype == torch.float16
    again = load(tmp_path / "saved")
    np.testing.assert_allclose(
        jax.jit(again.forward)(again.params, tokens),
        torch_logits(tmp_path / "saved", tokens),
        rtol=3e-2,
        atol=3e-2,
    )
