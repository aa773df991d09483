"""ViT and DeiT beside what transformers computed, their checkpoints' names, and quantized."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.models import load, save_hf
from jaxq.models.build import flat
from jaxq.models.checkpoint import read_tensors, write_tensors
from jaxq.models.vit import RENAMED
from jaxq.steps import channel_shift, log_clips
from tests.tiny import PREPROCESSOR, VIT, tiny_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = ("vit", "deit", "deit-teacher")
ARCHITECTURES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "deit-teacher": "DeiTForImageClassificationWithTeacher",
}


def bits(model):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flat(model.params).items()}


def edited(tmp_path, name, edit=dict, **config):
    directory = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    write_tensors(directory, edit({key: tensor.copy() for key, tensor in read_tensors(directory).items()}), 10**9)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


@pytest.mark.parametrize("name", NAMES)
class TestCheckpoints:
    def test_logits(self, name):
        model, expected = load(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")
        assert model.pixels == (8, 12, 3) and not model.causal
        found = jax.jit(model.forward)(model.params, expected["pixels"])
        assert found.shape == (2, 3)
        np.testing.assert_allclose(found, expected["logits"], rtol=1e-5, atol=2e-5)

    def test_names_of_transformers_5_and_4(self, name, tmp_path):
        def new(tensors):
            for fresh, old in RENAMED.items():
                tensors = {key.replace(old, fresh): tensor for key, tensor in tensors.items()}
            return tensors

        found = edited(tmp_path, name, new)
        keys = read_tensors(found)
        prefix = name.removesuffix("-teacher")
        assert {f"{prefix}.layers.1.attention.{x}_proj.weight" for x in "qkvo"} <= keys.keys()
        assert {f"{prefix}.layers.1.mlp.{x}.bias" for x in ("fc1", "fc2")} <= keys.keys()
        assert bits(load(found)) == bits(load(GOLDEN / name))

    def test_without_the_prefix_and_with_what_comes_along(self, name, tmp_path):
        def edit(tensors):
            bare = {key.removeprefix("vit.").removeprefix("deit."): tensor for key, tensor in tensors.items()}
            return bare | {"pooler.dense.weight": np.zeros((24, 24), np.float32)}

        assert bits(load(edited(tmp_path, name, edit))) == bits(load(GOLDEN / name))

    def test_round_trip_is_exact(self, name, tmp_path):
        directory = edited(tmp_path, name)
        (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        model = load(directory)
        save_hf(model, model.params, tmp_path / "saved", max_shard_bytes=10_000)
        again = load(tmp_path / "saved")
        assert bits(again) == bits(model) and again.config == model.config
        assert again.preprocessor == model.preprocessor == PREPROCESSOR
        assert read_tensors(tmp_path / "saved").keys() == read_tensors(GOLDEN / name).keys()

    def test_beside_transformers(self, name, tmp_path):
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        sizes = {"image_size": 9, "patch_size": [4, 2], "num_channels": 2, "hidden_act": "relu", "layer_norm_eps": 1e-3}
        config = VIT | sizes | {"model_type": name.removesuffix("-teacher"), "architectures": [ARCHITECTURES[name]]}
        model = tiny_model(config)
        save_hf(model, model.params, tmp_path / "saved")
        pixels = np.random.default_rng(0).standard_normal((2, 9, 9, 2)).astype(np.float32)
        theirs = getattr(transformers, ARCHITECTURES[name]).from_pretrained(tmp_path / "saved").eval()
        with torch.no_grad():
            expected = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2))).logits.numpy()
        np.testing.assert_allclose(jax.jit(model.forward)(model.params, pixels), expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_supported(tmp_path):
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling is not supported.*ViTForImageClassification"):
        load(edited(tmp_path, "vit", architectures=["ViTForMaskedImageModeling"]))
    model = load(GOLDEN / "vit")
    with pytest.raises(ValueError, match=r"images \[8, 8, 3\], the model reads \[8, 12, 3\]"):
        model.forward(model.params, np.zeros((1, 8, 8, 3), np.float32))


# Quantized ------------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
SIX = jaxq.quantize(jaxq.per_channel(jaxq.Int(6)), jaxq.per_tensor(jaxq.Int(6, symmetric=False)))
SEARCH = jaxq.FloatSearch(clips=log_clips(0.5, 2.0, 9), method=jaxq.exhaustive(), rounds=1)
LLM_FP4 = jaxq.llm_fp4(weights=4, activations=4, search=SEARCH)
NORMED = {f"layers/{i}/{name}/kernel" for i in (0, 1) for name in ("attn/q", "mlp/up")}


DEIT = VIT | {"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"]}


@pytest.fixture(scope="module", params=[VIT, DEIT], ids=["vit", "deit-teacher"])
def model(request):
    return tiny_model(request.param)


def test_sites(model):
    found = jaxq.sites(model.forward, model.params, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    rows = {row.path: row for row in found}
    assert [row.path for row in found if row.left_out] == ["positions"], "it is added, not multiplied"
    contracted = {path for path in flat(model.params) if path.endswith("kernel")}
    assert contracted == {row.path for row in found if row.kind == "linear"}
    for path in NORMED | ({"classifier/kernel"} & rows.keys()):
        assert rows[path].scale_into and rows[path].shift_into, path


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(jaxq.chain(jaxq.os_plus(), SIX), marks=pytest.mark.slow),
        pytest.param(jaxq.chain(jaxq.smooth_quant(), SIX), marks=pytest.mark.slow),
        pytest.param(jaxq.chain(channel_shift(), LLM_FP4), marks=pytest.mark.slow),
    ],
    ids=["os_plus", "smooth_quant", "llm_fp4"],
)
def test_every_fold_leaves_the_outputs(model, recipe):
    quantized = jaxq.calibrate(model.forward, model.params, [(PIXELS[:2],), (PIXELS[2:],)], recipe)
    assert quantized.transforms.keys() >= NORMED
    before = np.asarray(jax.jit(model.forward)(model.params, PIXELS))
    for path, transform in quantized.transforms.items():
        folded = jaxq.fold(model.forward, model.params, {path: transform}, PIXELS)
        assert path not in NORMED or not folded.inputs, f"{path}: not in the norm before it"
        after = jaxq.execute(model.forward)(folded, PIXELS)
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4, err_msg=path)
    found = np.asarray(jax.jit(jaxq.execute(model.forward))(quantized, PIXELS))
    assert 0 < np.abs(found - before).max() < np.abs(before).max()
