"""Semantic textual similarity (STS-B): do a model's sentences lie as close together as people find them alike?"""

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxq.arrays import NotFinite, on_device
from jaxq.evaluate.batches import by_width, cut
from jaxq.evaluate.text import pad
from jaxq.models import sentence_embedding

Row = tuple[str, str, float]


@dataclass(frozen=True)
class Similarity:
    """Spearman's rank correlation of ``pairs`` cosine similarities with the scores, and how long that took."""

    spearman: float
    pairs: int
    seconds: float


def read_sts(path: str | Path) -> list[Row]:
    """Pairs of sentences with the score that people gave them, from a CSV file without a header: ``s1,s2,score``.

    Raises FileNotFoundError, or ValueError if the file is not UTF-8 text or a line is not of that form.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            return [_row(path, i, line) for i, line in enumerate(csv.reader(file), start=1) if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def _row(path: str | Path, number: int, cells: list[str]) -> Row:
    try:
        first, second, score = cells
        return first, second, float(score)
    except ValueError:
        raise ValueError(f"{path}: row {number} is {cells}; what is read has `sentence,sentence,score`") from None


def sts(
    forward: Callable[..., jax.Array],
    params: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int = 64,
    length: int = 128,
    progress: bool = False,
) -> Similarity:
    """How well the cosine similarity of two sentences ranks the pairs, as on STS-B (Cer et al. 2017, arXiv:1708.00055).

    Args:
      forward, params, tokenizer, batch_size, length, progress: as for `embed`.
      rows: `(sentence, sentence, score)`.

    Raises:
      ValueError: fewer than two rows, similarities or scores that are all the same, and what `embed` raises.
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} pairs of sentences: a correlation needs two at least")
    from scipy.stats import spearmanr  # slow to import

    started = time.perf_counter()
    sentences = list(dict.fromkeys(sentence for row in rows for sentence in row[:2]))
    found = dict(zip(sentences, embed(forward, params, tokenizer, sentences, batch_size, length, progress)))
    similarities = np.array([found[first] @ found[second] for first, second, _ in rows])
    scores = np.array([score for *_, score in rows])
    for what, values in (("similarities", similarities), ("scores", scores)):
        if np.ptp(values) == 0:
            raise ValueError(f"the {what} of all pairs are {values[0]}: they cannot be ranked")
    correlation = float(spearmanr(similarities, scores).statistic)  # type: ignore[attr-defined]
    return Similarity(correlation, len(rows), time.perf_counter() - started)


def embed(
    forward: Callable[..., jax.Array],
    params: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    batch_size: int = 64,
    length: int = 128,
    progress: bool = False,
) -> np.ndarray:
    """Sentences as vectors of length 1, float32 `[N, D]`.

    Args:
      forward: `forward(params, tokens, mask)`, of int32 and bool `[B, T]`, gives hidden states `[B, T, D]`, which are
        averaged over the real tokens, or the sentences' vectors `[B, D]`.
      tokenizer: a transformers tokenizer.
      length: longer sentences are cut there; at most the model's context.

    Raises ValueError if there are no sentences, NotFinite if the vectors are not.
    """
    tokens, mask = pad(sentences, tokenizer, length)
    run = jax.jit(_embed, static_argnums=0)
    params = on_device(params)
    batches = list(by_width(mask.sum(axis=1), batch_size, length))
    result: dict[int, np.ndarray] = {}
    for rows, width in track(batches, description="sentences", disable=not progress):
        vectors = run(forward, params, cut(tokens[rows], width), cut(mask[rows], width))
        result.update(zip(rows.tolist(), np.asarray(vectors)))
    found = np.stack([result[i] for i in range(len(sentences))])
    if not math.isfinite(found.sum()):
        raise NotFinite("the sentences' vectors are not finite: the weights, or the tokenizer, are not the model's own")
    return found


def _embed(forward: Callable[..., jax.Array], params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    found = forward(params, tokens, mask)
    if found.ndim == 3:
        return sentence_embedding(found, mask)
    found = found.astype(jnp.float32)
    return found / jnp.maximum(jnp.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
