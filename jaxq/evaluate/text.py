"""Text to evaluate on: documents from a file or from Python's own library, packed into windows, or padded."""

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

SEPARATOR = "<|endoftext|>"
HELD_OUT_OF = 17  # one module in so many is held out

# Not prose: test suites, generated tables, what was installed beside the library or exists in some versions only.
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "site-packages"),
    *("dist-packages", "__pycache__", "encodings", "pydoc_data", "_bundled", "__phello__"),
}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file, separated by ``<|endoftext|>``, stripped, empty ones left out.

    Raises FileNotFoundError, or ValueError if the file is not UTF-8 text or holds no document.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    documents = [document.strip() for document in text.split(SEPARATOR)]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{path}: no text in it")
    return documents


def stdlib_documents(split: Literal["train", "heldout"]) -> list[str]:
    """The running interpreter's standard-library modules, one document each, ordered by module name.

    A stable hash of the module's name holds about one in seventeen out, the same ones in every version of Python: what
    a model learnt from "train" in one version is never met in "heldout" of another.
    Raises ValueError for another split, FileNotFoundError if this interpreter ships no library sources.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r}: there are 'train' and 'heldout'")
    root = Path(sysconfig.get_path("stdlib"))
    modules = {_module_name(path.relative_to(root)): path for path in root.rglob("*.py")}
    names = sorted(name for name in modules if name and _held_out(name) == (split == "heldout"))
    if not names:
        raise FileNotFoundError(f"{root}: this Python has no library sources; pass a text file instead")
    texts = (modules[name].read_text(encoding="utf-8").strip() for name in names)
    return [text for text in texts if text]


def _module_name(path: Path) -> str:
    """``json/decoder.py`` -> ``json.decoder``, ``json/__init__.py`` -> ``json``; empty if the file is skipped."""
    if any(part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in path.parts):
        return ""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _held_out(module: str) -> bool:
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % HELD_OUT_OF == 0


def pack(
    documents: Sequence[str], tokenizer: Any, length: int, *, vocab_size: int | None = None, source: object = "the text"
) -> np.ndarray:
    """Tokens of all documents, one after the other, cut into windows without overlap: int32 ``[N, length]``.

    Each document begins with the tokenizer's BOS token where it has one; the remainder is dropped. ``tokenizer`` is a
    transformers tokenizer, ``vocab_size`` the model's (default: the tokenizer's), ``source`` names the text in errors.
    Raises ValueError if a token lies outside the vocabulary or the text is shorter than one window.
    """
    if length < 1:
        raise ValueError(f"length {length}: a window holds at least one token")
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    tokens = np.fromiter((token for ids in encoded for token in (*first, *ids)), np.int32)
    if tokens.size < length:
        raise ValueError(
            f"{source}: {len(documents)} documents make {tokens.size} tokens, less than one window of {length}; "
            "give more text or a shorter window"
        )
    _check_vocabulary(tokens, len(tokenizer) if vocab_size is None else vocab_size, source)
    return tokens[: tokens.size // length * length].reshape(-1, length)


def pad(
    sentences: Sequence[str], tokenizer: Any, length: int, *, vocab_size: int | None = None, source: object = "the text"
) -> tuple[np.ndarray, np.ndarray]:
    """Each sentence as a row of tokens, int32 ``[N, T]``, and which of them are real, bool ``[N, T]``.

    A row begins and ends with the tokenizer's special tokens, where it has them, and is filled up on the right; T is
    the longest sentence's number of tokens, but at most ``length``, where longer ones are cut. Other arguments as for
    ``pack``. Raises ValueError if there are no sentences or a token lies outside the vocabulary.
    """
    tokens, real, _ = pad_columns([sentences], tokenizer, length, vocab_size=vocab_size, source=source)
    return tokens, real


def pad_columns(
    columns: Sequence[Sequence[str]],
    tokenizer: Any,
    length: int,
    *,
    vocab_size: int | None = None,
    source: object = "the text",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``pad``, of one column of sentences or of two, whose pairs make one row each; and the rows' token types.

    These are int32 ``[N, T]``, 1 in the second sentence of a pair where the tokenizer tells it from the first.
    """
    if not columns[0]:
        raise ValueError(f"{source}: no sentences in it")
    found = tokenizer(*map(list, columns), truncation=True, max_length=length, verbose=False)
    rows = found["input_ids"]
    real = np.arange(max(1, *map(len, rows)))[None] < np.array([len(row) for row in rows])[:, None]
    tokens, types = np.full(real.shape, tokenizer.pad_token_id or 0, np.int32), np.zeros(real.shape, np.int32)
    tokens[real] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    if "token_type_ids" in found:
        types[real] = np.concatenate([np.asarray(row, np.int32) for row in found["token_type_ids"]])
    _check_vocabulary(tokens, len(tokenizer) if vocab_size is None else vocab_size, source)
    return tokens, real, types


def _check_vocabulary(tokens: np.ndarray, size: int, source: object) -> None:
    if tokens.max() >= size:
        raise ValueError(
            f"{source}: token {tokens.max()} for a vocabulary of {size}; is this the model's own tokenizer?"
        )
