"""Read back by the package compressed-tensors itself, and by transformers."""

import warnings

import jax
import numpy as np
import pytest

import jaxq
from jaxq import Float, Int, mxfp4, mxfp8, nvfp4, per_group, per_token
from jaxq.export import save_compressed
from tests.tiny import BLOOM, LLAMA, OPT, QWEN3, tiny_model

torch = pytest.importorskip("torch", reason="compressed-tensors needs PyTorch")
transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package's own
    pytest.importorskip("compressed_tensors", reason="pip install 'jaxq[compressed-tensors]'")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
E4M3 = Float(4, 3, reserved=1)
TOKENS = np.random.default_rng(0).integers(0, 1024, (2, 10), np.int32)
WIDE = {"hidden_size": 64, "intermediate_size": 96}
STATIC = {
    "W8A8": jaxq.quantize(Int(8), Int(8)),
    "W8A8, asymmetric": jaxq.quantize(Int(8, False), Int(8, False)),
    "FP8": jaxq.quantize(E4M3, E4M3),
    "FP8 per token": jaxq.quantize(E4M3, per_token(E4M3)),
}
WEIGHTS = {
    "W4A16 in groups": jaxq.quantize(per_group(Int(4), 16), None),
    "W4A16 in groups, asymmetric": jaxq.quantize(per_group(Int(4, False), 16), None),
    "W3A16, asymmetric": jaxq.quantize(Int(3, False), None),
    "W8A16": jaxq.quantize(Int(8), None),
    "FP8 weights": jaxq.quantize(E4M3, None),
    "MXFP8 weights": jaxq.quantize(mxfp8(), None),
    "MXFP4 weights": jaxq.quantize(mxfp4(), None),
    "NVFP4 weights": jaxq.quantize(nvfp4(), None),
}
DYNAMIC = {
    "W8A8 per token": jaxq.quantize(Int(8), per_token(Int(8))),
    "MXFP8": jaxq.quantize(mxfp8(), mxfp8()),
    "MXFP4": jaxq.quantize(mxfp4(), mxfp4()),
}


@pytest.fixture(scope="module")
def llama():
    return tiny_model(LLAMA, **WIDE)


def saved(model, step, folder):
    step = jaxq.skip(["lm_head/*" if "lm_head" in model.params else "embed/*"], step)
    q = jaxq.calibrate(model.forward, model.params, [TOKENS], step)
    save_compressed(model, q, folder)
    return q


def logits(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def close(model, q, found, tolerance):
    """The logits, beside the simulation's, as a part of what the quantization changed."""
    want = np.asarray(jax.jit(jaxq.execute(model.forward))(q, TOKENS))
    change = np.linalg.norm(want - np.asarray(jax.jit(model.forward)(model.params, TOKENS)))
    assert np.linalg.norm(found - want) < tolerance * change


@pytest.mark.parametrize(
    "step", [*STATIC.values(), *WEIGHTS.values(), *DYNAMIC.values()], ids=[*STATIC, *WEIGHTS, *DYNAMIC]
)
def test_its_own_code_decompresses_the_same_weights(llama, step, tmp_path):
    q = saved(llama, step, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out").quantization_config
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name, leaf in {
        "self_attn.q_proj": q.params["layers"][1]["attn"]["q"]["kernel"],
        "mlp.down_proj": q.params["layers"][1]["mlp"]["down"]["kernel"],
    }.items():
        prefix = f"model.layers.1.{name}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        found = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
        want = torch.tensor(np.asarray(leaf.dequantize()).T)
        if scheme.format == "nvfp4-pack-quantized":
            torch.testing.assert_close(found.float(), want, rtol=2**-8, atol=0)
        else:  # bfloat16 holds an MX number exactly
            assert torch.equal(found.float(), want)


@pytest.mark.parametrize("step", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_transformers_runs_it_with_decompressed_weights(llama, step, tmp_path):
    q = saved(llama, step, tmp_path / "out")
    found = logits(tmp_path / "out", quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    close(llama, q, found, 0.1 if step is WEIGHTS["NVFP4 weights"] else 1e-4)


@pytest.mark.parametrize("step", STATIC.values(), ids=STATIC.keys())
def test_transformers_simulates_static_inputs_as_jaxq_does(llama, step, tmp_path):
    close(llama, saved(llama, step, tmp_path / "out"), logits(tmp_path / "out"), 1e-4)


@pytest.mark.parametrize("config", (OPT, BLOOM, QWEN3), ids=lambda config: config["model_type"])
def test_families(config, tmp_path):
    model = tiny_model(config)
    q = saved(model, jaxq.chain(jaxq.smooth_quant(), jaxq.quantize()), tmp_path / "out")
    close(model, q, logits(tmp_path / "out"), 1e-4)
