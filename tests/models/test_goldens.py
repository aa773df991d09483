"""Logits equal to those transformers computed (experiments/make_model_goldens.py wrote them)."""

from functools import cache
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


# Of a family's several checkpoints one: they see the mask alike.
MASKS = [
    *((name, np.int32) for name in NAMES),
    *((name, bool) for name in ("opt", "llama", "mistral", "bloom")),
    *(
        pytest.param(name, bool, marks=pytest.mark.slow)
        for name in ("opt-post-norm", "llama-sharded", "llama-rope-linear", "llama-rope-llama3", "qwen2", "qwen3")
    ),
]


@cache
def golden(name):
    """The model, its compiled function, and what is expected."""
    model = load(GOLDEN / name)
    return model, jax.jit(model.forward), dict(np.load(GOLDEN / name / "expected.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    model, forward, expected = golden(name)
    logits = forward(model.params, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "dtype"), MASKS)
def test_logits_of_real_tokens_with_padding(name, dtype):
    model, forward, expected = golden(name)
    real = expected["mask"].astype(bool)
    logits = forward(model.params, expected["tokens"], expected["mask"].astype(dtype))
    np.testing.assert_allclose(np.asarray(logits)[real], expected["masked_logits"][real], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_ones_changes_nothing(name):
    model, forward, expected = golden(name)
    tokens = expected["tokens"]
    masked = forward(model.params, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(forward(model.params, tokens), masked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_position_sees_a_later_token(name):
    model, forward, expected = golden(name)
    tokens = expected["tokens"]
    changed = tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 40
    before, after = np.asarray(forward(model.params, tokens)), np.asarray(forward(model.params, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.allclose(before[:, 6:], after[:, 6:])
