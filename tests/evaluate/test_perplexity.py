"""Perplexity: exact on made-up models, and the known numbers of real ones."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.evaluate import pack, perplexity, read_documents, stdlib_documents
from jaxq.models import load

SHARED = Path(__file__).resolve().parents[2] / "../shared"


def unigram(params, tokens):
    """The same logits [V] everywhere."""
    return jnp.broadcast_to(params[None, None], (*tokens.shape, params.shape[0]))


@given(st.integers(1, 7), st.integers(2, 5), st.integers(1, 9))
def test_is_the_exponent_of_the_mean_loss_whatever_the_batch(count, length, batch_size):
    rng = np.random.default_rng(count)
    logits, windows = rng.standard_normal(11).astype(np.float32), rng.integers(0, 11, (count, length), np.int32)
    losses = -np.log(np.exp(logits) / np.exp(logits).sum())[windows[:, 1:]]
    found = perplexity(unigram, logits, windows, batch_size)
    np.testing.assert_allclose(found.perplexity, np.exp(losses.mean()), rtol=1e-5)
    assert found.tokens == count * (length - 1)
    assert found.seconds > 0


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    windows = np.zeros((3, 4), np.int32)
    np.testing.assert_allclose(perplexity(unigram, np.zeros(17, np.float32), windows).perplexity, 17, rtol=1e-6)


def test_one_shape_is_compiled():
    shapes = []

    def forward(params, tokens):
        shapes.append(tokens.shape)
        return unigram(params, tokens)

    perplexity(forward, np.zeros(5, np.float32), np.zeros((7, 4), np.int32), batch_size=3, progress=True)
    assert shapes == [(3, 4)]


@pytest.mark.parametrize("at_once", (1, 4))
def test_batches_side_by_side_count_once_each(monkeypatch, at_once):
    monkeypatch.setattr(sys.modules[perplexity.__module__], "batches_at_once", lambda: at_once)
    logits, tokens = np.random.default_rng(0).standard_normal(40).astype(np.float32), np.arange(40, dtype=np.int32)
    found = perplexity(unigram, logits, np.stack([tokens, tokens[::-1]], axis=1), batch_size=3)
    expected = np.exp(np.log(np.exp(logits).sum()) - logits.mean())  # every token is predicted once
    np.testing.assert_allclose(found.perplexity, expected, rtol=1e-6)


def test_bfloat16_logits():
    found = perplexity(unigram, jnp.zeros(16, jnp.bfloat16), np.zeros((2, 4), np.int32))
    np.testing.assert_allclose(found.perplexity, 16, rtol=1e-6)


@pytest.mark.parametrize("shape", ((0, 4), (3, 1), (4,)))
def test_bad_windows(shape):
    with pytest.raises(ValueError, match="perplexity needs"):
        perplexity(unigram, np.zeros(5, np.float32), np.zeros(shape, np.int32))


def test_logits_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        perplexity(unigram, np.full(5, np.nan, np.float32), np.zeros((2, 4), np.int32))


def test_the_embedded_model_has_learnt_python():
    model = load("stdlib-opt")
    length = model.config["max_position_embeddings"]
    windows = pack(stdlib_documents("heldout"), model.tokenizer, length, vocab_size=model.config["vocab_size"])
    # 15.8 to 17.9 on the libraries of Python 3.11 to 3.13: their modules differ.
    assert perplexity(model.forward, model.params, windows[::16]).perplexity < 20
    tokens = jnp.asarray(model.tokenizer("import numpy as np\n\n\ndef __init__(")["input_ids"])[None]
    logits = jax.jit(model.forward)(model.params, tokens)
    assert model.tokenizer.decode([int(logits[0, -1].argmax())]) == "self"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, length, count, expected",
    [
        ("llama-stories260k", 512, None, 4.421),
        ("llama-stories260k", 256, None, 4.572),
        ("opt-tinystories-trained-here", 128, 1536, 9.215),
        ("bloom-tinystories-trained-here", 128, 1536, 8.917),
        ("bloom-tinystories-trained-here", 256, 768, 8.753),
    ],
)
def test_known_perplexities(name, length, count, expected):
    text = SHARED / "data" / "text" / "tinystories.valid.txt"
    if not text.exists():
        pytest.skip(f"needs {text.name} and {name} from the shared data")
    model = load(SHARED / "models" / name)
    windows = pack(read_documents(text), model.tokenizer, length, vocab_size=model.config["vocab_size"])
    found = perplexity(model.forward, model.params, windows[:count], 16)
    assert found.perplexity == pytest.approx(expected, abs=1e-3)
