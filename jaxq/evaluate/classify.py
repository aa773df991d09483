"""Sentences, or pairs of them, with labels, as in GLUE (Wang et al. 2018, arXiv:1804.07461)."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxq.evaluate.accuracy import Accuracy, accuracy
from jaxq.evaluate.batches import by_width, cut
from jaxq.evaluate.text import pad_columns
from jaxq.models import Model

FORM = "what is read has `sentence, label` or `sentence, sentence, label`, or a header that says which column is which"
NO_TEXT = ("label", "idx", "index", "id")  # columns beside the sentences


@dataclass(frozen=True)
class Labelled:
    """A sentence or two, and the label's number or name; `source` says where they are from."""

    texts: tuple[str, ...]
    label: str
    source: str


def read_labelled(path: str | Path) -> list[Labelled]:
    """Rows of a file with tabs between cells, or of a `.csv` file: `sentence, label` or `sentence, sentence, label`.

    GLUE's own forms are read, too: a header with `label` among its names, whose other columns but for the index are
    the sentences; and CoLA's four columns, of which the second is the label and the fourth the sentence.

    Raises FileNotFoundError, or ValueError if the file is not UTF-8 text, has no rows, or a row of another form.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            comma = Path(path).suffix.lower() == ".csv"
            lines = csv.reader(file) if comma else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = [(f"{path}: row {i}", cells) for i, cells in enumerate(lines, start=1) if cells]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a table of text ({error})") from error
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    header = [cell.strip().lower() for cell in rows[0][1]]
    if "label" in header:
        rows = rows[1:]
        texts, label = [i for i, name in enumerate(header) if name not in NO_TEXT], header.index("label")
    else:
        count = len(header)
        texts, label = ([3], 1) if count == 4 else (list(range(count - 1)), count - 1)
    if not rows or not 1 <= len(texts) <= 2:
        raise ValueError(f"{path}: the first row is {header}; {FORM}")
    for source, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{source} has {len(cells)} cells, the first one {len(header)}; {FORM}")
    return [Labelled(tuple(cells[i] for i in texts), cells[label].strip(), source) for source, cells in rows]


def classify(
    forward: Callable[..., jax.Array],
    params: Any,
    model: Model,
    rows: Sequence[Labelled],
    batch_size: int = 8,
    length: int = 128,
    progress: bool = False,
) -> Accuracy:
    """Accuracy of `forward(params, tokens, mask, token_types) -> logits [B, labels]`, each int32 or bool `[B, T]`.

    Args:
      model: where the tokenizer and the labels' names come from.
      length: longer rows are cut there; at most the model's context.

    Raises ValueError for a language model, a label that is neither a number nor one of the model's names, and as
    `pad_columns` and `accuracy` do.
    """
    if model.causal:
        raise ValueError(f"{model.name} is a language model; labels are for classifiers")
    names = {name: int(number) for number, name in model.config.get("id2label", {}).items()}
    labels = np.array([_number(row, names) for row in rows])
    columns = list(zip(*(row.texts for row in rows)))
    inputs = pad_columns(columns, model.tokenizer, length, vocab_size=model.config["vocab_size"])
    widths = by_width(inputs[1].sum(axis=1), batch_size, length)
    batches = ((some, tuple(cut(x[some], width) for x in inputs)) for some, width in widths)
    return accuracy(forward, params, batches, labels, progress)


def _number(row: Labelled, names: dict[str, int]) -> int:
    if row.label in names:
        return names[row.label]
    try:
        return int(row.label)
    except ValueError:
        known = f", nor one of the model's: {', '.join(names)}" if names else ""
        raise ValueError(f"{row.source}: label {row.label!r} is no number{known}") from None
