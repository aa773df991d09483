"""What a model is calibrated on: windows for a language model, padded sentences for an encoder, or images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxq.evaluate import pack, pad, preprocess, read_documents, read_images
from jaxq.models import Model
from jaxq.report import say

if TYPE_CHECKING:
    from jaxq.recipes.file import RecipeFile  # slow to import, and evaluation does without


@dataclass(frozen=True)
class Calibration:
    """The file of text or images, and what of the recipe's own calibration settings is overridden."""

    file: Path
    samples: int | None = None
    length: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Batches:
    """What `calibrate` takes: inputs of one shape, tokens and for an encoder their mask, or pixels; the masks apart.

    `kind` says in words what a row is.
    """

    inputs: Sequence[tuple[np.ndarray, ...]]
    masks: Sequence[np.ndarray] | None
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Batches, rows in each, and the shape of a row: tokens, or height, width and channels."""
        return len(self.inputs), *self.inputs[0][0].shape

    def __str__(self) -> str:
        count, rows, *each = self.shape
        return f"{count} batches of {rows} {self.kind} x {f'{each[0]} tokens' if len(each) == 1 else each}"


def calibration_batches(model: Model, recipe: RecipeFile, calibration: Calibration) -> Batches:
    """Windows, sentences (for an encoder) or images, spread evenly over the file; a last, smaller batch is dropped.

    A sentence is a line of text; all are padded to the longest of them. Raises ValueError where the model has no
    tokenizer or image processor, or the file is too short or not of the model's vocabulary; OSError without a file.
    """
    settings, text = recipe.calibration, calibration.file
    length = calibration.length or settings.length
    samples, size = calibration.samples or settings.samples, calibration.batch_size or settings.batch_size
    if model.pixels is not None:
        images, _ = read_images(text)
        pixels = preprocess(images[_spread(len(images), samples, f"{text}: images")], model)
        return Batches([(batch,) for batch in _batched(pixels, size)], None, "images")
    documents = read_documents(text)
    if model.causal:
        windows = model_windows(model, documents, length, text)
        picked = windows[_spread(len(windows), samples, f"{text}: windows")]
        return Batches([(batch,) for batch in _batched(picked, size)], None, "windows")
    lines = [line.strip() for document in documents for line in document.splitlines() if line.strip()]
    sentences = [lines[i] for i in _spread(len(lines), samples, f"{text}: lines")]
    tokens, mask = model_sentences(model, sentences, length, text)
    masks = _batched(mask, size)
    return Batches(list(zip(_batched(tokens, size), masks)), masks, "sentences")


def model_windows(model: Model, documents: list[str], length: int, source: object) -> np.ndarray:
    """A text as windows of at most the model's context: int32 `[windows, length]`. Errors as those of `pack`."""
    length = within_context(model, length)
    return pack(documents, model.tokenizer, length, vocab_size=model.config["vocab_size"], source=source)


def model_sentences(model: Model, sentences: list[str], length: int, source: object) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of at most the model's context, and their masks: `[sentences, T]`. Errors as those of `pad`."""
    length = within_context(model, length)
    return pad(sentences, model.tokenizer, length, vocab_size=model.config["vocab_size"], source=source)


def within_context(model: Model, length: int) -> int:
    """The length asked for, or the model's context where that is shorter; ValueError if it cannot read text at all."""
    if model.tokenizer is None:
        raise ValueError(f"{model.name}: no tokenizer files in it, so text cannot be read for it")
    context = model.config.get("max_position_embeddings") or length
    if length > context:
        say(f"{context} tokens at a time: the context of {model.name}, {length} were asked for")
    return min(length, context)


def _spread(found: int, samples: int, what: str) -> np.ndarray:
    if found < samples:
        say(f"{what}: {samples} were asked for, all {found} are used")
    return np.linspace(0, found - 1, min(samples, found)).astype(int)


def _batched(rows: np.ndarray, size: int) -> list[np.ndarray]:
    size = min(size, len(rows))
    return list(rows[: len(rows) // size * size].reshape(-1, size, *rows.shape[1:]))
