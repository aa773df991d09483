"""Checkpoints in half precision: mapped, computed with in float32, and quantized as if they were float32."""

import json
from functools import cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq import storage
from jaxq.cache import new_cache
from jaxq.fold import fold
from jaxq.models import cast_once, load, save_hf
from jaxq.program.trace import named_leaves
from jaxq.storage.models import load_model, load_to_run, save_model
from tests.tiny import LLAMA, tiny_model

TOKENS = np.random.default_rng(0).integers(0, 1024, (2, 8)).astype(np.int32)
RECIPE = jaxq.skip(["lm_head*"], jaxq.chain(jaxq.smooth_quant(), jaxq.quantize()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, path = tiny_model(LLAMA, num_hidden_layers=1), tmp_path_factory.mktemp("half") / "llama"
    save_hf(model, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), model.params), path)
    return path


@cache
def calibrated(folder: Path, dtype=None):
    model = load(folder, dtype)
    with jax.numpy_dtype_promotion("standard"):
        return model, jaxq.calibrate(model.forward, model.params, [TOKENS], RECIPE)


def bits(tree):
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def logits(model, params):
    with jax.numpy_dtype_promotion("standard"):
        return bits(jax.jit(jaxq.execute(model.forward))(params, TOKENS))


def test_what_is_computed_is_what_promoted_parameters_give(folder):
    half, full = load(folder), load(folder, np.float32)
    once = cast_once(half, half.params)
    assert bits(once) == bits(full.params) and cast_once(full, full.params) is full.params
    assert logits(half, half.params) == logits(half, once) == logits(full, full.params)
    steps = (
        model.step(model.params, TOKENS, new_cache(model.kept, 2, 8, "float32"), np.int32(0)) for model in (half, full)
    )
    first, second = map(bits, steps)
    assert first == second


def test_calibration_is_that_of_promoted_parameters(folder):
    (half, got), (full, want) = calibrated(folder), calibrated(folder, np.float32)
    assert bits((got.inputs, got.transforms)) == bits((want.inputs, want.transforms))
    assert logits(half, got) == logits(full, want)
    given = dict(named_leaves(half.params))
    assert [path for path, leaf in named_leaves(got.params) if leaf is given[path]] == [
        "embed/embedding",
        "final_norm/scale",
        "lm_head/kernel",
    ]


@pytest.mark.parametrize(
    "dtype, computes_in", [(None, "float32"), pytest.param(ml_dtypes.bfloat16, None, marks=pytest.mark.slow)]
)
def test_a_saved_model_computes_in_the_same_type(folder, dtype, computes_in, tmp_path):
    model, quantized = calibrated(folder, dtype)
    save_model(tmp_path / "saved", model, quantized, {"name": "a llama"})
    assert storage.load(tmp_path / "saved")[1].get("computes_in") == computes_in
    again, loaded = load_model(tmp_path / "saved")
    assert again.computes_in == model.computes_in == computes_in and again.name == "a llama"
    assert logits(again, loaded) == logits(model, quantized)
    if computes_in:
        runner, ready = load_to_run(tmp_path / "saved")
        assert not any(leaf.dtype == ml_dtypes.bfloat16 for leaf in jax.tree.leaves(ready.params))
        assert logits(runner, ready) == logits(model, quantized)


def test_a_folded_model_of_mixed_types_is_a_checkpoint(folder, tmp_path):
    model, quantized = calibrated(folder)
    folded = fold(model.forward, model.params, quantized.transforms, TOKENS)
    assert {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(folded.params)} == {"bfloat16", "float32"}
    save_hf(model, folded.params, tmp_path / "folded")
    assert json.loads((tmp_path / "folded/config.json").read_text())["dtype"] == "float32"
    again = load(tmp_path / "folded")
    assert bits(again.params) == bits(folded.params)
    assert logits(again, again.params) == logits(model, folded)
