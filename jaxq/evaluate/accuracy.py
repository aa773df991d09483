"""How many examples a classifier gets right."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.progress import track

from jaxq.arrays import NotFinite, on_device


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
    batches: Iterable[tuple[np.ndarray, tuple[np.ndarray, ...]]],
    labels: np.ndarray,
    progress: bool = False,
) -> Accuracy:
    """Accuracy of ``forward(params, *inputs) -> logits [B, labels]``, whose largest is compared with ``labels``.

    ``labels`` is int ``[N]``; ``batches`` gives the numbers of some examples, int ``[B]``, with their inputs. Each of
    the N is in a batch; one that is there again does not count twice. The seconds include compilation.
    Raises ValueError without examples, for logits of another shape, and for labels beyond them; NotFinite for logits
    that are not.
    """
    if len(labels) == 0:
        raise ValueError("there are no examples to measure accuracy on")
    started, run, params = time.perf_counter(), jax.jit(forward), on_device(params)
    found = np.empty(len(labels), np.int64)
    for rows, inputs in track(batches, description="accuracy", disable=not progress):
        logits = np.asarray(run(params, *inputs), np.float32)
        _check(logits, labels)
        if not math.isfinite(logits.sum()):
            raise NotFinite("the logits are not finite: the weights, or the inputs, are not the model's own")
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
