"""Tokens without transformers are those of transformers, and whatever could change them is left to it."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from jaxq.models.hf import EMBEDDED, read_tokenizer
from jaxq.models.tokenizer import TextTokenizer

TEXTS = [
    "def f(x):\n    return x  # 1 µs\n",
    "",
    "  <s> two spaces</s>  and\ttabs <unk>",
    "<s><s>x",
    "日本語, é\u0301 \U0001f600 \x00 end",
    "import numpy as np\n\n\n" * 50,
]


def write(folder, added=(), prefix=False, **settings):
    """A byte-level tokenizer whose special tokens are `added`."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(added))
    if added:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    made.enable_truncation(4)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def transformers_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def tokens(tokenizer):
    ids = tokenizer(TEXTS, add_special_tokens=False, verbose=False)["input_ids"]
    return ids, tokenizer.bos_token_id, len(tokenizer)


def plain(text):
    return AddedToken(text, normalized=False, special=True)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("bos", [{}, {"bos_token": None}, {"bos_token": "<s>", "eos_token": "</s>"}])
def test_the_same_tokens(tmp_path, prefix, bos):
    settings = bos | {"add_prefix_space": prefix, "model_max_length": 8}
    folder = write(tmp_path, [plain("<s>"), plain("</s>")], prefix, **settings)
    found = read_tokenizer(folder)
    assert isinstance(found, TextTokenizer)
    assert tokens(found) == tokens(transformers_tokenizer(folder))


def test_the_embedded_model():
    found, expected = (of(EMBEDDED / "stdlib-opt") for of in (read_tokenizer, transformers_tokenizer))
    assert isinstance(found, TextTokenizer)
    assert tokens(found) == tokens(expected)


@pytest.mark.parametrize(
    ("added", "settings"),
    [
        ([], {"bos_token": "<s>"}),  # not in the vocabulary yet
        ([AddedToken("<s>", lstrip=True, special=True)], {"bos_token": "<s>"}),  # will not take the space before it
        ([plain("<s>")], {"bos_token": {"content": "<s>", "lstrip": True, "__type": "AddedToken"}}),
        ([plain("<s>")], {"add_bos_token": True, "bos_token": "<s>"}),
        ([plain("<s>")], {"split_special_tokens": True, "bos_token": "<s>"}),
        ([plain("<s>")], {"add_prefix_space": True}),
        ([plain("<s>")], {"extra_special_tokens": ["<more>"]}),
    ],
)
def test_what_is_left_to_transformers(tmp_path, added, settings):
    folder = write(tmp_path, added, **settings)
    found = read_tokenizer(folder)
    assert not isinstance(found, TextTokenizer)
    assert tokens(found) == tokens(transformers_tokenizer(folder))


def test_settings_of_older_checkpoints(tmp_path):
    folder = write(tmp_path, [plain("<s>")])
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert read_tokenizer(folder).bos_token_id == transformers_tokenizer(folder).bos_token_id is not None


def test_everything_else_is_transformers(tmp_path):
    folder = write(tmp_path, [plain("<s>"), plain("</s>")], bos_token="<s>", eos_token="</s>")
    found, expected = read_tokenizer(folder), transformers_tokenizer(folder)
    assert found("a text") == expected("a text")
    assert found(TEXTS, truncation=True, max_length=3) == expected(TEXTS, truncation=True, max_length=3)
    assert found.decode(found.encode("a text")) == expected.decode(expected.encode("a text"))
    assert (found.eos_token_id, found.pad_token_id) == (expected.eos_token_id, None)
    assert tokens(found) == tokens(expected)


def test_what_is_set_is_set_in_transformers(tmp_path):
    found = read_tokenizer(write(tmp_path, [plain("<s>"), plain("</s>")], bos_token="<s>"))
    found.bos_token = "</s>"
    found.add_tokens(["whole"])
    assert found.bos_token_id == found.convert_tokens_to_ids("</s>")
    assert found(["whole"], add_special_tokens=False)["input_ids"] == [[len(found) - 1]]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(tmp_path, again):
    found = read_tokenizer(write(tmp_path, [plain("<s>")], bos_token="<s>"))
    assert tokens(again(found)) == tokens(found)


def test_tokens_do_without_transformers():
    code = (
        "import sys; from jaxq.models import load; from jaxq.evaluate import pack;"
        "pack(['some text ' * 20], load('stdlib-opt').tokenizer, 8); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
