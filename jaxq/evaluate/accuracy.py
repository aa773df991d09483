"""How many examples a classifier gets right."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track


@dataclass(frozen=True)
class Accuracy:
    """The share of ``examples`` that have the label of the largest logit, Matthews' correlation, and the seconds."""

    accuracy: float
    matthews: float
    examples: int
    seconds: float


def accuracy(
    forward: Callable[..., jax.Array],
    params: Any,
    inputs: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    labels: np.ndarray,
    batch_size: int = 8,
    progress: bool = False,
) -> Accuracy:
    """Accuracy of ``forward(params, *inputs(rows)) -> logits [B, labels]``.

    ``inputs`` makes a batch from examples' numbers, int ``[B]``; ``labels`` is int ``[N]``. One shape is compiled: the
    last batch is filled up with copies that do not count. The seconds include compilation.
    Raises ValueError without examples, for logits of another shape or not finite, and for labels beyond them.
    """
    if len(labels) == 0:
        raise ValueError("there are no examples to measure accuracy on")
    started, batch_size, run = time.perf_counter(), min(batch_size, len(labels)), jax.jit(forward)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, params)
    found = np.empty(len(labels), np.int64)
    for begin in track(range(0, len(labels), batch_size), description="accuracy", disable=not progress):
        rows = np.minimum(np.arange(begin, begin + batch_size), len(labels) - 1)
        logits = np.asarray(run(params, *inputs(rows)), np.float32)
        if begin == 0:
            _check(logits, labels)
        if not math.isfinite(logits.sum()):
            raise ValueError("the logits are not finite: the weights, or the inputs, are not the model's own")
        found[rows] = logits.argmax(axis=-1)
    right = float(np.mean(found == labels))
    return Accuracy(right, matthews(found, labels), len(labels), time.perf_counter() - started)


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model gives {list(logits.shape)}, not logits [examples, labels]: it is no classifier")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but the model tells {logits.shape[1]} apart: "
            f"0 to {logits.shape[1] - 1}"
        )


def matthews(found: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two int ``[N]``, for any number of labels (Gorodkin 2004); 0 if either is constant."""
    kinds = np.arange(1 + max(found.max(), labels.max()))
    x, y = (np.float64(values[:, None] == kinds) for values in (found, labels))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm else 0.0
