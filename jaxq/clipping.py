"""Token-wise clipping with a searched percentile (Outlier Suppression, arXiv:2209.13325, sec. 4.2; used by OS+)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.calibrate import Batch, calibrate
from jaxq.execute import execute
from jaxq.formats import grid_from_range
from jaxq.observers import token_quantile, token_range
from jaxq.qtensor import Grid, Quantized, Transform
from jaxq.steps.group import Group, Step, tokens_of, transformed

Ranges = dict[str, tuple[np.ndarray, np.ndarray]]  # by group, the low and high end for each percentile


@dataclass(frozen=True)
class Clipping:
    """The best percentile and the model calibrated with it; `losses[i]` is the cross-entropy with `percentiles[i]`."""

    quantized: Quantized
    percentile: float
    percentiles: tuple[float, ...]
    losses: tuple[float, ...]


def search_percentile(
    forward: Callable,
    params: Any,
    batches: Sequence[Batch],
    step_of: Callable[[float], Step],
    percentiles: Sequence[float],
    *,
    masks: Sequence[Any] | None = None,
    propagate: Literal["quantized", "full_precision"] = "quantized",
    on_group: Callable[[Group], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Clipping:
    """Calibrates with the percentile of least language-model cross-entropy on the calibration batches.

    What a percentile changes is the static ranges of activations, not the transforms nor the weights. So there are two
    walks, whatever the number of percentiles: one that calibrates, and one that takes every percentile's ranges on the
    full-precision activations (as the paper's code does). Then each percentile costs one pass of the quantized model.

    Args:
      forward, params, batches, masks, propagate, on_group: as for `calibrate`; `forward` gives logits [B, T, V] for its
        first input, int tokens [B, T]. Labels that `masks` call padding do not count (in the paper's code they do).
      checkpoint: as for `calibrate`, for the first walk, which is the one that searches.
      step_of: the recipe at a percentile, with `token_quantile(percentile)` for the activations.
      percentiles: at least one; the first of several equally good ones is taken.

    Raises:
      ValueError: as `calibrate`; besides, no percentiles, no input with that observer, or one inside `lax.scan`.
    """
    if not percentiles:
        raise ValueError("search_percentile: no percentiles to choose from")
    start = step_of(1.0)
    first = calibrate(
        forward, params, batches, start, masks=masks, propagate=propagate, on_group=on_group, checkpoint=checkpoint
    )
    ranges: Ranges = {}
    observer = Step(
        start.plan, partial(_observe, first.transforms, np.asarray(percentiles, np.float32), ranges), start.patterns
    )
    calibrate(forward, params, batches, observer, masks=masks, propagate="full_precision")
    if not ranges:
        raise ValueError("search_percentile: the recipe ranges no activation with `token_quantile(percentile)`")
    loss = jax.jit(partial(_cross_entropy, execute(forward)))
    ready = jax.tree.map(jnp.asarray, first)
    losses = [_total(loss, _with_ranges(ready, ranges, i), batches, masks) for i in range(len(percentiles))]
    best = int(np.argmin(losses))
    return Clipping(_with_ranges(first, ranges, best), percentiles[best], tuple(percentiles), tuple(losses))


def _observe(transforms: dict[str, Transform], percentiles: np.ndarray, ranges: Ranges, group: Group) -> Group:
    """Notes the ranges of one group's transformed input at every percentile."""
    quantizer, name = group.spec.activations, group.plan.name
    if name in transforms:
        group = transformed(group, transforms[name].shift, transforms[name].scale)
    if quantizer is None or quantizer.observer != token_quantile(1.0):
        return group
    if name in ranges:
        raise ValueError(f"{name}: inside `lax.scan`, where a percentile cannot be searched: give one in the recipe")
    axes = group.token_axes, group.plan.x_axes
    found = [_ranges(*tokens_of(x, valid, *axes), percentiles) for x, valid in zip(group.x, group.valid)]
    lows, highs = zip(*found)
    ranges[name] = np.mean(lows, axis=0), np.mean(highs, axis=0)
    return group


@jax.jit
def _ranges(x: jax.Array, valid: jax.Array | None, percentiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = jax.vmap(lambda p: token_range(x, p, valid))(percentiles)
    return low[:, 0], high[:, 0]


def _with_ranges(quantized: Quantized, ranges: Ranges, i: int) -> Quantized:
    inputs = dict(quantized.inputs)
    for name, (low, high) in ranges.items():
        fmt = inputs[name].format
        assert fmt is not None
        grid = Grid(*grid_from_range(fmt, jnp.float32(low[i]), jnp.float32(high[i])))
        inputs[name] = replace(inputs[name], grid=grid)
    return replace(quantized, inputs=inputs)


def _total(loss: Callable, quantized: Quantized, batches: Sequence[Batch], masks: Sequence[Any] | None) -> float:
    """The mean cross-entropy of all real predictions of all batches."""
    sums = []
    for i, batch in enumerate(batches):
        inputs = batch if isinstance(batch, tuple | list) else (batch,)
        real = jnp.ones(np.shape(inputs[0]), bool) if masks is None else jnp.asarray(masks[i]).astype(bool)
        sums.append(loss(quantized, tuple(inputs), real))
    total, count = np.sum(np.asarray(sums, np.float64), axis=0)
    return float(total / max(count, 1.0))


def _cross_entropy(run: Callable, quantized: Quantized, inputs: tuple, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = run(quantized, *inputs)[:, :-1].astype(jnp.float32)
    labels = jnp.asarray(inputs[0])[:, 1:]
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    counted = real[:, 1:] & real[:, :-1]
    return jnp.where(counted, nll, jnp.float32(0)).sum(), counted.sum().astype(jnp.float32)
