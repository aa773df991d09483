"""Whole tiny models quantized by the published code: same scales and shifts, same logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxq
from jaxq.models import load
from jaxq.observers import average_min_max
from jaxq.qtensor import PerTensor
from jaxq.quantizer import per_channel, per_group, per_tensor, per_token
from jaxq.search import exhaustive
from jaxq.steps import Group, Step, as_the_paper, fed_by_norm, foldable, quantize, transformed
from jaxq.steps.os_plus import scale_for, search_scale, thresholds
from jaxq.steps.shift import touch

GOLDENS = Path(__file__).resolve().parents[1] / "../shared/goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.exists(), reason="the published code's numbers (../shared) are not here")

OPT = {"model_type": "opt", "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 96,
       "vocab_size": 160, "max_position_embeddings": 64, "word_embed_proj_dim": 48,
       "tie_word_embeddings": True}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4,
         "num_hidden_layers": 2, "intermediate_size": 80, "vocab_size": 160, "max_position_embeddings": 64,
         "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 48, "n_head": 4, "n_layer": 2, "vocab_size": 160}

TENSOR8 = per_tensor(jaxq.Int(8), average_min_max())
CASES = {
    "e2e_opt_int8": (OPT, quantize(per_tensor(jaxq.Int(8)), TENSOR8, attention=TENSOR8)),
    "e2e_bloom_int8": (BLOOM, quantize(per_tensor(jaxq.Int(8)), TENSOR8, attention=TENSOR8)),
    "e2e_opt_int5_token": (OPT, quantize(per_channel(jaxq.Int(5, False)), per_token(jaxq.Int(5, False)))),
    "e2e_opt_int4_group16": (OPT, quantize(per_group(jaxq.Int(4, False), 16), per_group(jaxq.Int(4, False), 16))),
    "e2e_llama_int4_token": (LLAMA, quantize(per_channel(jaxq.Int(4, False)), per_token(jaxq.Int(4, False)))),
}


def golden_model(z, config: dict, path: Path):
    prefix = "fp_state__"
    state = {k.removeprefix(prefix): z[k] for k in z.files if k.startswith(prefix) and "inv_freq" not in k}
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return load(path)


class Replay:
    """OS+ at every group that the published code migrates, each search on the very input that its search saw, so that a
    code that flips on a rounding tie in one group does not change what the next one is asked. The walk then goes on
    with the published shift and scale."""

    def __init__(self, z, lower: float):
        self.z, self.lower, self.done = z, lower, 0

    def __call__(self, group: Group) -> Group:
        z, k = self.z, self.done
        self.done += 1
        shift = jnp.asarray(z[f"shift__{k}"]) if f"shift__{k}" in z else None
        # The published code ranges over padded tokens too (B4), and searches on the first batch alone (B3).
        shown = replace(transformed(group, shift=shift), x=(jnp.asarray(z[f"search{k}__input"]),))
        x = z[f"search{k}__input"]
        low, high = jnp.asarray(x.min((0, 1))), jnp.asarray(x.max((0, 1)))
        grid = thresholds(low, high, self.lower, 100)
        best, losses = search_scale(shown, as_the_paper(group.objectives), grid, low, high, exhaustive())
        theirs = int(np.abs(grid - z[f"search{k}__range"]).argmin())
        np.testing.assert_allclose(grid[theirs], z[f"search{k}__range"], rtol=1e-5)
        s = scale_for(jnp.float32(grid[theirs]), low, high)
        np.testing.assert_allclose(s, z[f"scale__{k}"], rtol=1e-5)
        self.check_choice(group, losses, best, theirs)
        return transformed(group, shift=shift, scale=s)

    def check_choice(self, group: Group, losses: np.ndarray, best: int, theirs: int) -> None:
        # Per tensor, the published search has one grid for q, k and v stacked, the published model one for each, as
        # jaxq has throughout: the losses of the two differ, by more than the choice matters. BLOOM's fused projection
        # it splits in the wrong places (B2): it chose for another objective.
        stacked = isinstance(group.spec.weights.granularity, PerTensor) and len(group.plan.members) > 1
        other = stacked or group.plan.name.endswith("qkv/kernel")
        assert losses[theirs] <= losses[best] * (1.3 if other else 1 + 2e-3)


def calibrated(z, config: dict, end: Step, path: Path):
    model = golden_model(z, config, path)
    llama = config["model_type"] == "llama"
    replay = Replay(z, 0.1 if llama else 1.0)
    where = foldable if llama else fed_by_norm
    migrate = Step(touch(where), lambda group: replay(group) if where(group.plan) else group)
    recipe = jaxq.skip(["lm_head/*" if llama else "embed/*"], jaxq.chain(migrate, end))
    order = [0, 0, 1, 2, 3]  # the averaging observers count the first batch twice (B6)
    ids = [jnp.asarray(z[f"calib{i}__input_ids"]) for i in order]
    if llama:
        return model, jaxq.calibrate(model.forward, model.params, ids, recipe)
    masks = [jnp.asarray(z[f"calib{i}__attention_mask"]) for i in order]
    return model, jaxq.calibrate(model.forward, model.params, list(zip(ids, masks)), recipe, masks=masks)


# jaxq's names of the published models' activation quantizers, by layer.
OPT_ACTIVATIONS = {
    "attn/q/kernel": "first_act_fake_quant",
    "attn/dot0:lhs": "self_attn.query_permute_post_act_fake_quant",
    "attn/dot0:rhs": "self_attn.key_transpose_post_act_fake_quant",
    "attn/dot1:lhs": "self_attn.attention_probs_post_act_fake_quant",
    "attn/dot1:rhs": "self_attn.value_permute_post_act_fake_quant",
    "attn/out/kernel": "self_attn.out_proj.act_fake_quant",
    "mlp/up/kernel": "second_act_fake_quant",
    "mlp/down/kernel": "fc2.act_fake_quant",
}
BLOOM_ACTIVATIONS = {
    "attn/qkv/kernel": "first_act_fake_quant",
    "attn/qkv/dot0:lhs": "self_attn.query_post_act_fake_quant",
    "attn/qkv/dot0:rhs": "self_attn.key_post_act_fake_quant",
    "attn/qkv/dot1:lhs": "self_attn.attention_probs_post_act_fake_quant",
    "attn/qkv/dot1:rhs": "self_attn.value_post_act_fake_quant",
    "attn/out/kernel": "self_attn.dense.act_fake_quant",
    "mlp/up/kernel": "second_act_fake_quant",
    "mlp/down/kernel": "fc2.act_fake_quant",
}
STATIC = {
    "e2e_opt_int8": ("model.decoder.layers", OPT_ACTIVATIONS),
    "e2e_bloom_int8": ("transformer.h", BLOOM_ACTIVATIONS),
}


def with_published_grids(z, quantized: jaxq.Quantized, layers: str, names: dict[str, str]) -> jaxq.Quantized:
    """Each static grid, found close to the published one, replaced by it.

    The published code updates its averages batch by batch while they are in use, so batch k is observed on a network
    quantized with the average of batches 0 to k; jaxq averages each range over all batches before it is used.
    """
    inputs = {}
    for name, quant in quantized.inputs.items():
        _, layer, site = name.split("/", 2)
        theirs = jnp.asarray(z[f"q__{layers}.{layer}.{names[site]}__scale"][0])
        if site == "attn/qkv/dot0:lhs":  # BLOOM's queries, scaled after they are quantized there
            theirs = theirs * 12**-0.5
        np.testing.assert_allclose(quant.grid.scale, theirs, rtol=2e-2)
        inputs[name] = replace(quant, grid=replace(quant.grid, scale=theirs))
    assert len(inputs) == 2 * len(names)
    return replace(quantized, inputs=inputs)


# OPT and BLOOM per tensor are quick enough.
SLOW = ("e2e_opt_int5_token", "e2e_opt_int4_group16", "e2e_llama_int4_token")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def test_end_to_end(case: str, tmp_path: Path) -> None:
    z = np.load(GOLDENS / f"{case}.npz")
    model, quantized = calibrated(z, *CASES[case], tmp_path)
    assert len(quantized.transforms) == sum(k.startswith("scale__") for k in z.files)
    folded = jaxq.fold(model.forward, model.params, quantized.transforms, z["eval0__input_ids"])
    assert not folded.inputs
    if case in STATIC:
        quantized = with_published_grids(z, quantized, *STATIC[case])
    run, forward = jax.jit(jaxq.execute(model.forward)), jax.jit(model.forward)
    errors = []
    for i in range(3):
        ids = jnp.asarray(z[f"eval{i}__input_ids"])
        fp, theirs = z["fp_logits"][i], z["q_logits"][i]
        np.testing.assert_allclose(forward(model.params, ids), fp, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(forward(folded.params, ids), fp, rtol=1e-3, atol=1e-3)
        sizes = (np.linalg.norm(a, axis=(1, 2)) for a in (np.asarray(run(quantized, ids)) - theirs, theirs))
        errors += list(np.divide(*sizes))
    # On some processors a code in one of the texts falls the other way at a tie; what follows it there sees it, too.
    assert sorted(errors)[-2] < (1e-3 if case in STATIC else 1e-5) and max(errors) < 0.1
