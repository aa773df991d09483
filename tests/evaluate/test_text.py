"""Documents and windows."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.evaluate import pack, read_documents, stdlib_documents
from jaxq.evaluate.text import _held_out, _module_name


class Letters:
    """A tokenizer of lower-case letters: a = 1, b = 2, ...; BOS = 0."""

    def __init__(self, bos=0):
        self.bos_token_id = bos

    def __len__(self):
        return 27

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}


class TestReadDocuments:
    def test_splits_strips_and_drops_the_empty(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("one\n<|endoftext|>\n two é<|endoftext|>\n\n<|endoftext|>", encoding="utf-8")
        assert read_documents(path) == ["one", "two é"]

    @pytest.mark.parametrize("content", ("", " \n", "<|endoftext|>"))
    def test_empty(self, tmp_path, content):
        (tmp_path / "text.txt").write_text(content)
        with pytest.raises(ValueError, match=r"text\.txt: no text"):
            read_documents(tmp_path / "text.txt")

    def test_binary(self, tmp_path):
        (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"text\.txt: not UTF-8"):
            read_documents(tmp_path / "text.txt")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_documents(tmp_path / "none.txt")


class TestPack:
    def test_documents_begin_with_bos_and_the_remainder_is_dropped(self):
        windows = pack(["abc", "de", "f"], Letters(), 3)
        np.testing.assert_array_equal(windows, [[0, 1, 2], [3, 0, 4], [5, 0, 6]])
        assert windows.dtype == np.int32
        np.testing.assert_array_equal(pack(["abc", "de"], Letters(bos=None), 2), [[1, 2], [3, 4]])

    @given(st.lists(st.text("abc", min_size=1), min_size=1), st.integers(1, 9))
    def test_windows_are_the_stream(self, documents, length):
        stream = [t for d in documents for t in (0, *(ord(c) - 96 for c in d))]
        if len(stream) < length:
            return
        windows = pack(documents, Letters(), length)
        assert windows.shape == (len(stream) // length, length)
        np.testing.assert_array_equal(windows.reshape(-1), stream[: windows.size])

    @pytest.mark.parametrize("documents", ([], ["ab"]))
    def test_too_short(self, documents):
        with pytest.raises(ValueError, match=r"x\.txt: \d documents make \d tokens, less than one window of 8"):
            pack(documents, Letters(), 8, source="x.txt")

    def test_token_outside_the_vocabulary(self):
        with pytest.raises(ValueError, match=r"x\.txt: token 26 for a vocabulary of 20"):
            pack(["abz"], Letters(), 2, vocab_size=20, source="x.txt")

    def test_no_length(self):
        with pytest.raises(ValueError, match="length 0"):
            pack(["ab"], Letters(), 0)


class TestStdlib:
    def test_the_splits_are_disjoint_and_real(self):
        train, heldout = stdlib_documents("train"), stdlib_documents("heldout")
        assert len(train) > 300 and 15 <= len(heldout) <= len(train) / 8
        assert not set(train) & set(heldout)
        assert any("def loads(" in document for document in train)

    def test_the_held_out_modules_stay_the_same(self):
        assert all(map(_held_out, ("gettext", "random", "subprocess", "tokenize", "warnings")))
        assert not any(map(_held_out, ("argparse", "json", "json.decoder", "os", "typing")))

    def test_module_names(self):
        from pathlib import Path

        assert _module_name(Path("json/decoder.py")) == "json.decoder"
        assert _module_name(Path("json/__init__.py")) == "json"
        for skipped in ("test/test_os.py", "unittest/test/x.py", "site-packages/a.py", "_sysconfigdata__linux.py"):
            assert _module_name(Path(skipped)) == ""

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="'train' and 'heldout'"):
            stdlib_documents("test")  # type: ignore[arg-type]

    def test_no_sources(self, monkeypatch, tmp_path):
        monkeypatch.setattr("jaxq.evaluate.text.sysconfig", SimpleNamespace(get_path=lambda _: str(tmp_path)))
        with pytest.raises(FileNotFoundError, match="no library sources"):
            stdlib_documents("train")
