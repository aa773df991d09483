"""Logits equal to those transformers computed (experiments/make_model_goldens.py wrote them)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxq.models import load

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = (
    "opt",
    "opt-post-norm",
    "llama",
    "llama-sharded",
    "llama-rope-linear",
    "llama-rope-llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "bloom",
)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    model, expected = load(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")
    logits = jax.jit(model.forward)(model.params, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (np.int32, bool))
def test_logits_of_real_tokens_with_padding(name, dtype):
    model, expected = load(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")
    real = expected["mask"].astype(bool)
    logits = jax.jit(model.forward)(model.params, expected["tokens"], expected["mask"].astype(dtype))
    np.testing.assert_allclose(np.asarray(logits)[real], expected["masked_logits"][real], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_ones_changes_nothing(name):
    model, tokens = load(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")["tokens"]
    forward = jax.jit(model.forward)
    masked = forward(model.params, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(forward(model.params, tokens), masked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_position_sees_a_later_token(name):
    model, tokens = load(GOLDEN / name), np.load(GOLDEN / name / "expected.npz")["tokens"]
    changed = tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 40
    forward = jax.jit(model.forward)
    before, after = np.asarray(forward(model.params, tokens)), np.asarray(forward(model.params, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.allclose(before[:, 6:], after[:, 6:])
