"""The tokenizer of a Hugging Face checkpoint, without transformers where only a text's tokens are asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

FILE = "tokenizer.json"
# Classes of tokenizers that are all in that file.
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
SPECIAL = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Settings that do not change which tokens a text has, where the file knows the special ones already.
HARMLESS = SPECIAL | {
    *("add_prefix_space", "backend", "chat_template", "clean_up_tokenization_spaces", "is_local", "local_files_only"),
    *("model_max_length", "name_or_path", "tokenizer_class"),
}
LEGACY = ("special_tokens_map.json", "added_tokens.json")  # further settings, in older checkpoints
LARGEST = 100_000  # of larger vocabularies transformers repairs some


def open_tokenizer(directory: Path, settings: Mapping[str, Any]) -> Any:
    """What acts as the directory's transformers tokenizer; raises whatever tokenizers and transformers do.

    ``settings`` is the content of ``tokenizer_config.json``, empty without one.
    """
    plain = settings.get("tokenizer_class") in PLAIN
    files = (directory / FILE).exists() and not any((directory / file).exists() for file in LEGACY)
    if plain and files and settings.keys() <= HARMLESS:
        found = Tokenizer.from_file(str(directory / FILE))
        if _knows(found, settings):
            return TextTokenizer(directory, found, settings.get("bos_token"))
    return _read_whole(directory, plain)


def _knows(found: Tokenizer, settings: Mapping[str, Any]) -> bool:
    """Whether transformers would change nothing of this tokenizer."""
    added = {token.content: token for token in found.get_added_tokens_decoder().values()}
    special = [settings[name] for name in SPECIAL & settings.keys() if settings[name] is not None]
    prefix = getattr(found.pre_tokenizer, "add_prefix_space", False)
    return (
        all(isinstance(token, str) and token in added and _is_plain(added[token]) for token in special)
        and prefix == settings.get("add_prefix_space", False)
        and found.get_vocab_size() <= LARGEST
    )


def _is_plain(token: AddedToken) -> bool:
    return token.special and not (token.single_word or token.lstrip or token.rstrip or token.normalized)


def _read_whole(directory: Path, plain: bool) -> Any:
    if plain:
        from transformers import PreTrainedTokenizerFast as Reader
    else:
        from transformers import AutoTokenizer as Reader  # imports PyTorch, where that is installed: seconds
    return Reader.from_pretrained(directory, local_files_only=True)


class TextTokenizer:
    """A transformers tokenizer that knows which tokens texts have, and is read when something else is asked of it.

    Importing transformers takes longer than much of what jaxq does with a text. What is not defined here is the
    transformers tokenizer's, its settings too; once that is read it answers everything.
    """

    def __init__(self, directory: Path, text: Tokenizer, bos: str | None):
        text.no_truncation()
        text.no_padding()
        vars(self).update(_directory=directory, _text=text, _bos=bos, _read=None)

    def _whole(self) -> Any:
        if self._read is None:
            vars(self)["_read"] = _read_whole(self._directory, plain=True)
        return self._read

    def __call__(self, texts: Any, *rest: Any, **options: Any) -> Any:
        """As of transformers; of a list of texts without special tokens it gives ``input_ids`` only."""
        asked = options.keys() - {"verbose"} == {"add_special_tokens"} and not options["add_special_tokens"]
        if self._read is None and isinstance(texts, list) and asked and not rest:
            return {"input_ids": [found.ids for found in self._text.encode_batch_fast(texts, add_special_tokens=False)]}
        return self._whole()(texts, *rest, **options)

    @property
    def bos_token_id(self) -> int | None:
        if self._read is not None:
            return self._read.bos_token_id
        return None if self._bos is None else self._text.token_to_id(self._bos)

    def __len__(self) -> int:
        return self._text.get_vocab_size() if self._read is None else len(self._read)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copies and pickles look for, before there is anything here
            raise AttributeError(name)
        return getattr(self._whole(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._whole(), name, value)
