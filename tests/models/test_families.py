"""Every family of decoders: what of it can be quantized, and each method on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.steps import fed_by_attention, foldable
from tests.tiny import BLOOM, LLAMA, MISTRAL, OPT, QWEN2, QWEN3, tiny_model

pytestmark = pytest.mark.slow  # minutes in all

FAMILIES = {config["model_type"]: config for config in (OPT, BLOOM, LLAMA, MISTRAL, QWEN2, QWEN3)}
FAMILIES["llama, a head for each value"] = LLAMA | {"num_key_value_heads": 2}
TOKENS = np.random.default_rng(0).integers(0, 1024, (4, 12), np.int32)
# By layer: the weights that read one activation, and what takes its scale; a shift goes into what has a bias.
QKV_GROUP = ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel")
GATED = {("mlp/gate/kernel", "mlp/up/kernel"): ("mlp_norm/scale",), ("mlp/down/kernel",): ("mlp/up/kernel",)}
LLAMA_GROUPS = {QKV_GROUP: ("attn_norm/scale",), ("attn/out/kernel",): (), **GATED}
GROUPS = {
    "opt": {
        QKV_GROUP: ("attn_norm/scale", "attn_norm/bias"),
        ("attn/out/kernel",): ("attn/v/kernel", "attn/v/bias"),
        ("mlp/up/kernel",): ("mlp_norm/scale", "mlp_norm/bias"),
        ("mlp/down/kernel",): ("mlp/up/kernel", "mlp/up/bias"),
    },
    "bloom": {
        ("attn/qkv/kernel",): ("attn_norm/scale", "attn_norm/bias"),
        ("attn/out/kernel",): ("attn/qkv/kernel", "attn/qkv/bias"),
        ("mlp/up/kernel",): ("mlp_norm/scale", "mlp_norm/bias"),
        ("mlp/down/kernel",): (),
    },
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA_GROUPS),
    "llama, a head for each value": LLAMA_GROUPS | {("attn/out/kernel",): ("attn/v/kernel",)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage(family):
    """Every weight is in its group, with its fold; attention's two products are there; nothing is left out."""
    model = tiny_model(FAMILIES[family])
    found = jaxq.sites(model.forward, jax.eval_shape(lambda: model.params), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert not [row for row in found if row.left_out]
    for i in range(2):
        rows = [row for row in found if row.path.startswith(f"layers/{i}/")]
        groups: dict[str, list] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row)
        linear = [members for members in groups.values() if members[0].kind == "linear"]
        folds = {
            tuple(row.path.removeprefix(f"layers/{i}/") for row in members): tuple(
                path.removeprefix(f"layers/{i}/") for path in members[0].scale_into
            )
            for members in linear
        }
        assert folds == GROUPS[family]
        for members in linear:
            biases = tuple(path for path in members[0].scale_into if path.endswith("bias"))
            assert members[0].shift_into in ((), biases)
            assert members[0].scale_reason or members[0].scale_into
        assert sum(row.kind == "attention" for row in rows) == 4


METHODS = {
    "os_plus": jaxq.chain(
        jaxq.os_plus(), jaxq.quantize(weights=jaxq.Int(8), activations=jaxq.Int(8), attention=jaxq.Int(8))
    ),
    "smooth_quant": jaxq.chain(
        jaxq.smooth_quant(where=lambda plan: foldable(plan) or fed_by_attention(plan)), jaxq.quantize()
    ),
    "llm_fp4": jaxq.llm_fp4(weights=8, activations=8),
}


def cases() -> list:
    """LLM-FP4 takes longest to compile: by default on one family of each kind."""
    slow = [("llm_fp4", family) for family in FAMILIES if family not in ("bloom", "qwen3")]
    pairs = [(method, family) for method in METHODS for family in FAMILIES]
    return [pytest.param(*pair, marks=pytest.mark.slow if pair in slow else ()) for pair in pairs]


@pytest.mark.parametrize("method, family", cases())
def test_methods(method, family):
    """Each runs, its folds leave the function as it is, and eight bits leave it nearly so."""
    model = tiny_model(FAMILIES[family])
    recipe = jaxq.skip(["lm_head/*" if "lm_head" in model.params else "embed/*"], METHODS[method])
    quantized = jaxq.calibrate(model.forward, model.params, [TOKENS], recipe)
    transformed = {name.partition("/")[2].partition("/")[2] for name in quantized.transforms}
    assert transformed
    if method == "os_plus":
        assert {"attn/q/kernel", "attn/qkv/kernel"} & transformed
    folded = jaxq.fold(model.forward, model.params, quantized.transforms, TOKENS)
    want = jax.jit(model.forward)(model.params, TOKENS)
    got = jax.jit(jaxq.execute(model.forward))(folded, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    left = set() if method == "llm_fp4" else {name for name, quant in folded.inputs.items() if quant.scale is not None}
    assert not left  # LLM-FP4's transforms work anywhere, at run time where they must
    error = np.linalg.norm(jax.jit(jaxq.execute(model.forward))(quantized, TOKENS) - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.3  # random weights of this size amplify it
