"""What is in the files, decoded by arithmetic of the test's own; and what compressed-tensors cannot hold."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq import AnyFloat, Float, Int, Quantizer, mxfp4, mxfp6, mxfp8, nvfp4, per_group, per_tensor, per_token
from jaxq.export import compressed, save_compressed
from jaxq.export.schemes import packed
from jaxq.models import Model
from tests.tiny import BERT, BLOOM, LLAMA, OPT, tiny_model

E4M3, E2M1 = Float(4, 3, reserved=1), Float(2, 1)
ELEMENTS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
TYPES = {"F32": "<f4", "I8": "i1", "U8": "u1", "I32": "<i4", "I64": "<i8", "F8_E4M3": ml_dtypes.float8_e4m3fn}
TOKENS = np.random.default_rng(0).integers(0, 1024, (2, 8), np.int32)
HEADS = ["lm_head/*"]
PATH, NAME = ("layers", 0, "mlp", "down", "kernel"), "model.layers.0.mlp.down_proj."
SIZES = {"hidden_size": 32, "intermediate_size": 64}


@pytest.fixture(scope="module")
def llama() -> Model:
    return tiny_model(LLAMA, num_hidden_layers=1, **SIZES)


def quantized(model: Model, *numbers, skipped=HEADS, **more) -> jaxq.Quantized:
    step = jaxq.skip(skipped, jaxq.quantize(*numbers, **more))
    return jaxq.calibrate(model.forward, model.params, [TOKENS], step)


def load_file(path):
    """A safetensors file; the library's own numpy reader knows no FP8."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    return {
        name: np.frombuffer(
            raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], TYPES[entry["dtype"]]
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def bits_of(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The numbers of `bits` bits in rows of int32 words, by Python's integers."""
    rows = [int.from_bytes(np.ascontiguousarray(row).tobytes(), "little") for row in words]
    return np.array([[row >> (bits * i) & (2**bits - 1) for i in range(n)] for row in rows])


def fp4(packed_bytes: np.ndarray) -> np.ndarray:
    codes = np.stack([packed_bytes & 15, packed_bytes >> 4], -1).reshape(len(packed_bytes), -1)
    return np.where(codes & 8, -1, 1).astype(np.float32) * ELEMENTS[codes & 7]


def decode(found: dict[str, np.ndarray], weights: dict) -> np.ndarray:
    """A layer's weight [out, in], float32, as the format is defined."""
    bits, scale = weights["num_bits"], found["weight_scale"]
    zero = np.float32(0)
    if "weight_shape" in found:
        rows, columns = found["weight_shape"]
        values = (bits_of(found["weight_packed"], bits, columns) - 2 ** (bits - 1)).astype(np.float32)
        if not weights["symmetric"]:
            down = bits_of(found["weight_zero_point"].T, bits, rows).T - 2 ** (bits - 1)
            zero = np.repeat(down, columns // down.shape[1], axis=1).astype(np.float32)
    elif "weight_packed" in found:
        values = fp4(found["weight_packed"])
    else:
        values = found["weight"].astype(np.float32)
        if not weights["symmetric"]:
            zero = found["weight_zero_point"].astype(np.float32)
    if scale.dtype == np.uint8:
        scale = 2.0 ** (scale.astype(np.float32) - 127)
    scale = scale.astype(np.float32) / found.get("weight_global_scale", np.float32(1))
    return (values - zero) * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)


CASES = {
    "W8A8": ((Int(8), Int(8)), "int-quantized", {"strategy": "tensor", "dynamic": False}),
    "W8A8, asymmetric": ((Int(8, False), Int(8, False)), "int-quantized", {"symmetric": False}),
    "W8A8 per token": (
        (per_tensor(Int(8)), per_token(Int(8))),
        "int-quantized",
        {"strategy": "token", "dynamic": True},
    ),
    "W6A6": ((Int(6, False), Int(6)), "int-quantized", {"num_bits": 6}),
    "W4A8 in groups": ((per_group(Int(4), 16), per_token(Int(8))), "int-quantized", {"num_bits": 8}),
    "W4A16 in groups": ((per_group(Int(4), 16), None), "pack-quantized", None),
    "W4A16 in groups, asymmetric": ((per_group(Int(4, False), 8), None), "pack-quantized", None),
    "W3A16": ((Int(3), None), "pack-quantized", None),
    "W5A16, asymmetric": ((Int(5, False), None), "pack-quantized", None),
    "FP8": ((E4M3, E4M3), "float-quantized", {"type": "float", "strategy": "tensor"}),
    "FP8 per token": ((E4M3, per_token(E4M3)), "float-quantized", {"strategy": "token"}),
    "FP8 weights": ((E4M3, None), "float-quantized", None),
    "MXFP8": ((mxfp8(), mxfp8()), "mxfp8-quantized", {"group_size": 32, "scale_dtype": "torch.uint8"}),
    "MXFP4": ((mxfp4(), mxfp4()), "mxfp4-pack-quantized", {"group_size": 32, "num_bits": 4}),
    "NVFP4 weights": ((nvfp4(), None), "nvfp4-pack-quantized", None),
}


@pytest.mark.parametrize("numbers, name, inputs", CASES.values(), ids=CASES.keys())
def test_the_files(llama, numbers, name, inputs, tmp_path):
    q = quantized(llama, *numbers)
    save_compressed(llama, q, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    found = config["quantization_config"]
    group = found["config_groups"]["group_0"]
    assert (found["quant_method"], found["format"], found["ignore"]) == ("compressed-tensors", name, ["lm_head"])
    assert config["dtype"] == "float32" and config["model_type"] == "llama"
    assert list(found["config_groups"]) == ["group_0"] and group["targets"] == ["Linear"] and group["format"] == name
    assert (inputs is None) == (group["input_activations"] is None)
    assert inputs is None or inputs.items() <= group["input_activations"].items()
    tensors = load_file(tmp_path / "out/model.safetensors")
    mine = {key.removeprefix(NAME): tensor for key, tensor in tensors.items() if key.startswith(NAME)}
    leaf = at(q.params, PATH)
    want = np.asarray(leaf.dequantize()).T
    if name.startswith("nvfp4"):  # the factor's reciprocal is rounded
        np.testing.assert_allclose(decode(mine, group["weights"]), want, rtol=3e-7)
    else:
        np.testing.assert_array_equal(decode(mine, group["weights"]), want)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], llama.params["embed"]["embedding"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], llama.params["lm_head"]["kernel"].T)
    static = inputs is not None and not group["input_activations"]["dynamic"]
    assert ("input_scale" in mine) == static
    if static:
        grid = q.inputs["layers/0/mlp/down/kernel"].grid
        np.testing.assert_array_equal(mine["input_scale"], np.ravel(grid.scale))
        if grid.zero is not None:
            half = 2 ** (numbers[1].bits - 1)
            np.testing.assert_array_equal(mine["input_zero_point"] + float(half), np.ravel(grid.zero))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_a_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 37)).astype(np.uint8)
    words = packed(codes, bits)
    assert words.dtype == np.int32 and words.shape == (3, -(-37 * bits // 32))
    np.testing.assert_array_equal(bits_of(words, bits, 37), codes)


def test_a_packed_tree_is_the_same(llama):
    q = quantized(llama, Int(4), None)
    (plain, config), (packed_too, other) = compressed(llama, q), compressed(llama, jaxq.pack(q))
    assert config == other and plain.keys() == packed_too.keys()
    for name, tensor in plain.items():
        np.testing.assert_array_equal(tensor, packed_too[name])


def test_layers_of_different_schemes(llama):
    recipe = jaxq.partition(
        {"layers/0/attn/*": jaxq.quantize(E4M3, per_token(E4M3)), "layers/0/mlp/*": jaxq.quantize(Int(4), None)}
    )
    q = jaxq.calibrate(llama.forward, llama.params, [TOKENS], jaxq.skip(["lm_head/*", "embed/*", "*/dot*"], recipe))
    _, config = compressed(llama, q)
    assert config["format"] == "mixed-precision" and config["ignore"] == ["lm_head"]
    groups = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert set(groups["float-quantized"]) == {f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"}
    assert set(groups["pack-quantized"]) == {f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")}


@pytest.mark.parametrize("config", (OPT, BLOOM, BERT), ids=lambda config: config["model_type"])
def test_what_a_tied_model_ignores(config):
    model = tiny_model(config, num_hidden_layers=1, n_layer=1)
    tensors, found = compressed(model, quantized(model, Int(8), None, skipped=["embed/*"] if model.causal else []))
    ignored = {
        "opt": ["lm_head"],
        "bloom": ["lm_head"],
        "bert": ["pooler.dense", "cls.predictions.decoder", "cls.seq_relationship"],
    }
    assert found["ignore"] == ignored[config["model_type"]]
    assert not [name for name in tensors if name.startswith("lm_head")]


def refused(model: Model, q: jaxq.Quantized, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        compressed(model, q)
    for word in words:
        assert word in str(caught.value)


REFUSED = {
    "any float": (jaxq.quantize(AnyFloat(8), None), ("layers/0/", "AnyFloat(bits=8)", "reserved=1")),
    "E2M1": (jaxq.quantize(E2M1, None), ("layers/0/", "Float(exponent_bits=2", "mxfp4()")),
    "inputs of E5M2": (jaxq.quantize(Int(8), Float(5, 2)), ("layers/0/", "input", "Float(exponent_bits=5")),
    "MXFP6": (jaxq.quantize(mxfp6(), None), ("layers/0/", "blocks of 32", "mxfp8()")),
    "inputs of MXFP6": (jaxq.quantize(mxfp8(), mxfp6()), ("layers/0/", "its input is blocks of 32", "mxfp8()")),
    "inputs of NVFP4": (jaxq.quantize(nvfp4(), nvfp4()), ("layers/0/", "every call", "weights alone")),
    "inputs alone": (jaxq.quantize(None, Int(8)), ("layers/0/", "its weight is not")),
    "attention": (jaxq.quantize(Int(8), Int(8), Int(8)), ("layers/0/attn/dot0", "attention: null")),
    "embeddings": (jaxq.quantize(Int(8), Int(8), embeddings=Int(8)), ("embed/embedding", "embeddings: null")),
    "nothing": (jaxq.quantize(None, None), ("nothing is quantized", "save_hf")),
    "a fold into MX blocks": (jaxq.chain(jaxq.smooth_quant(), jaxq.quantize(mxfp8(), mxfp8())), ("mlp/up", "folded")),
    "a fold into NVFP4": (jaxq.chain(jaxq.smooth_quant(), jaxq.quantize(nvfp4(), None)), ("mlp/up", "folded")),
}


@pytest.mark.parametrize("step, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_hold_is_refused(llama, step, words):
    refused(llama, jaxq.calibrate(llama.forward, llama.params, [TOKENS], jaxq.skip(HEADS, step)), *words)


def test_what_is_left_at_run_time_is_refused():
    model = tiny_model(OPT, num_hidden_layers=1, do_layer_norm_before=False)
    step = jaxq.skip(["embed/*"], jaxq.chain(jaxq.smooth_quant(), jaxq.quantize()))
    q = jaxq.calibrate(model.forward, model.params, [TOKENS], step)
    refused(model, q, "layers/0/mlp/up/kernel", "run time", "groups: foldable")


def test_exponents_are_refused(llama):
    q = quantized(llama, E4M3, None)
    mlp = q.params["layers"][0]["mlp"]["down"]
    mlp["kernel"] = replace(mlp["kernel"], exponents=np.ones((64, 1), np.int8))
    refused(llama, q, "layers/0/mlp/down/kernel", "exponents", "fpq_baseline")


def test_all_of_it_or_none(llama, tmp_path, monkeypatch):
    q = quantized(llama, Int(8), None)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        save_compressed(llama, q, tmp_path / "here")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("jaxq.models.hf.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_compressed(llama, q, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_files_have_their_types(llama, tmp_path):
    save_compressed(llama, quantized(llama, Quantizer(E4M3), None), tmp_path / "fp8", max_shard_bytes=50_000)
    shard_of = json.loads((tmp_path / "fp8/model.safetensors.index.json").read_text())["weight_map"]
    assert load_file(tmp_path / "fp8" / shard_of[NAME + "weight"])[NAME + "weight"].dtype == ml_dtypes.float8_e4m3fn
    assert load_file(tmp_path / "fp8" / shard_of[NAME + "weight_scale"])[NAME + "weight_scale"].shape == (32, 1)
