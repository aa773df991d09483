"""BERT beside what transformers computed, and its checkpoints' many names"""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.models import load, save_hf, sentence_embedding
from jaxq.models.build import flat
from jaxq.models.checkpoint import read_tensors, write_tensors

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = ("bert", "bert-classifier", "bert-masked-lm")
SHAPES = {"bert": (2, 10, 24), "bert-classifier": (2, 3), "bert-masked-lm": (2, 10, 40)}


@cache
def golden(name):
    """The model, its compiled function, and what is expected."""
    model = load(GOLDEN / name)
    return model, jax.jit(model.forward), dict(np.load(GOLDEN / name / "expected.npz"))


def real(expected, name):
    return np.ones(2, bool) if name == "bert-classifier" else expected["mask"].astype(bool)


def edited(tmp_path, name, edit, **config):
    """A golden's checkpoint with other tensors and another configuration."""
    directory = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    tensors = {key: tensor.copy() for key, tensor in read_tensors(directory).items()}
    write_tensors(directory, edit(tensors), 10**9)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


def bits(model):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flat(model.params).items()}


@pytest.mark.parametrize("name", NAMES)
class TestForward:
    def test_without_padding(self, name):
        model, forward, expected = golden(name)
        found = forward(model.params, expected["tokens"])
        assert found.shape == SHAPES[name] and not model.causal
        np.testing.assert_allclose(found, expected["logits"], rtol=1e-5, atol=2e-5)

    def test_padding_is_not_seen(self, name):
        model, forward, expected = golden(name)
        tokens, mask = expected["tokens"], expected["mask"].copy()
        mask[0] = 1  # the classifier reads the first place
        mask[0, -3:] = 0
        counted = np.ones(2, bool) if name == "bert-classifier" else mask.astype(bool)
        changed = np.where(mask == 1, tokens, (tokens + 1) % 40)
        before, after = (np.asarray(forward(model.params, t, mask))[counted] for t in (tokens, changed))
        np.testing.assert_array_equal(before, after)
        assert not np.allclose(before, np.asarray(forward(model.params, changed))[counted]), "unless it is real"


# A head does not see the mask: the encoder alone has both kinds.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bert", np.int32),
        ("bert", bool),
        ("bert-classifier", np.int32),
        ("bert-masked-lm", bool),
        pytest.param("bert-classifier", bool, marks=pytest.mark.slow),
        pytest.param("bert-masked-lm", np.int32, marks=pytest.mark.slow),
    ],
)
def test_with_padding_and_token_types(name, dtype):
    model, forward, expected = golden(name)
    tokens, mask, counted = expected["tokens"], expected["mask"].astype(dtype), real(expected, name)
    types = expected["token_types"].astype(np.int32)
    for found, wanted in (
        (forward(model.params, tokens, mask), "masked_logits"),
        (forward(model.params, tokens, mask, types), "typed_logits"),
    ):
        np.testing.assert_allclose(np.asarray(found)[counted], expected[wanted][counted], rtol=1e-5, atol=2e-5)


def test_too_long_for_the_position_table():
    model, *_ = golden("bert")
    with pytest.raises(ValueError, match="17 tokens in a row, the position table has room for 16"):
        model.forward(model.params, np.zeros((1, 17), np.int32))


def test_sentence_embedding():
    hidden = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    found = np.asarray(sentence_embedding(jnp.asarray(hidden), jnp.asarray(mask)))
    for row, count in ((0, 2), (1, 4)):
        mean = hidden[row, :count].mean(0)
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[2], 0)


class TestCheckpoints:
    @pytest.mark.parametrize("name", NAMES)
    def test_with_and_without_the_prefix(self, name, tmp_path):
        def stripped(tensors):
            return {key.removeprefix("bert."): tensor for key, tensor in tensors.items()}

        def prefixed(tensors):
            heads = ("bert.", "cls.", "classifier.")
            return {key if key.startswith(heads) else f"bert.{key}": tensor for key, tensor in tensors.items()}

        for edit in (stripped, prefixed):
            assert bits(load(edited(tmp_path / edit.__name__, name, edit))) == bits(load(GOLDEN / name))

    def test_names_of_tensorflow_and_what_comes_along(self, tmp_path):
        """As in bert-base-uncased: norms by their old names, the pooler, the sentence head, copies of what is tied."""
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

        def edit(tensors):
            renamed = {}
            for key, tensor in tensors.items():
                ending = ".".join(key.split(".")[-2:])
                renamed[key.removesuffix(ending) + old.get(ending, ending)] = tensor
            return renamed | {
                "bert.pooler.dense.weight": np.zeros((24, 24), np.float32),
                "cls.seq_relationship.bias": np.zeros(2, np.float32),
                "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
                "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
            }

        found = load(edited(tmp_path, "bert-masked-lm", edit))
        assert bits(found) == bits(load(GOLDEN / "bert-masked-lm"))

    def test_a_table_of_integers_is_no_parameter(self, tmp_path):
        """The positions' numbers, int64, that older versions of transformers saved."""
        directory = Path(shutil.copytree(GOLDEN / "bert", tmp_path / "bert"))
        file = directory / "model.safetensors"
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        offsets = [len(body), len(body) + 16 * 8]
        header["embeddings.position_ids"] = {"dtype": "I64", "shape": [1, 16], "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + body + np.arange(16).tobytes())
        assert bits(load(directory)) == bits(load(GOLDEN / "bert"))

    @pytest.mark.parametrize("name", NAMES)
    def test_round_trip_is_exact(self, name, tmp_path):
        model = load(GOLDEN / name)
        save_hf(model, model.params, tmp_path / "saved", max_shard_bytes=10_000)
        again = load(tmp_path / "saved")
        assert bits(again) == bits(model) and again.config == model.config

    @pytest.mark.parametrize(
        "change, words",
        [
            (dict(architectures=["BertForQuestionAnswering"]), "BertForQuestionAnswering is not supported.*BertModel"),
            (dict(is_decoder=True), "is_decoder True"),
            (dict(position_embedding_type="relative_key"), "'relative_key'.*'absolute'"),
            (dict(hidden_act="swish9"), "swish9"),
            (dict(tie_word_embeddings=False), "tie_word_embeddings"),
        ],
    )
    def test_what_is_not_supported(self, change, words, tmp_path):
        with pytest.raises(ValueError, match=words):
            load(edited(tmp_path, "bert-masked-lm", dict, **change))

    def test_no_architecture_is_the_encoder(self, tmp_path):
        found = load(edited(tmp_path, "bert", dict, architectures=None))
        assert bits(found) == bits(load(GOLDEN / "bert"))
