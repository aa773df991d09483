"""Token-wise clipping with a searched percentile (Outlier Suppression, arXiv:2209.13325, sec. 4.2; used by OS+)."""

from __future__ import annotations

import os
from collections import defaultdict
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
from jaxq.steps.quantize import input_observer

Transforms = dict[str, list[Transform]]  # by group, in the order in which a walk comes to its layers


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
      ValueError: as `calibrate`; besides, no percentiles, or no input with that observer.
    """
    if not percentiles:
        raise ValueError("search_percentile: no percentiles to choose from")
    start = step_of(1.0)
    transforms: Transforms = defaultdict(list)

    def note(group: Group) -> None:
        transforms[group.plan.name].append(Transform(group.shift, group.scale))
        if on_group is not None:
            on_group(group)

    first = calibrate(
        forward, params, batches, start, masks=masks, propagate=propagate, on_group=note, checkpoint=checkpoint
    )
    observer = Step(start.plan, partial(_observe, transforms, np.asarray(percentiles, np.float32)), start.patterns)
    observed = calibrate(forward, params, batches, observer, masks=masks, propagate="full_precision")
    grids = {name: quant.grid for name, quant in observed.inputs.items() if quant.grid is not None}
    if not grids:
        raise ValueError("search_percentile: the recipe ranges no activation with `token_quantile(percentile)`")
    loss = jax.jit(partial(_cross_entropy, execute(forward)))
    ready = jax.tree.map(jnp.asarray, first)
    losses = [_total(loss, _with_grids(ready, grids, i), batches, masks) for i in range(len(percentiles))]
    best = int(np.argmin(losses))
    return Clipping(_with_grids(first, grids, best), percentiles[best], tuple(percentiles), tuple(losses))


def _observe(transforms: Transforms, percentiles: np.ndarray, group: Group) -> Group:
    """One group's grids at every percentile, along a last axis, of its input as the first walk transformed it."""
    quantizer, found = group.spec.activations, transforms[group.plan.name].pop(0)
    if quantizer is None or input_observer(group) != token_quantile(1.0):
        return group
    seen = transformed(group, found.shift, found.scale)
    axes = group.token_axes, group.plan.x_axes
    lows, highs = zip(*(_ranges(*tokens_of(x, valid, *axes), percentiles) for x, valid in zip(seen.x, seen.valid)))
    ends = jnp.stack(lows).mean(0), jnp.stack(highs).mean(0)
    return replace(group, grid=Grid(*grid_from_range(quantizer.format, *ends)))


@jax.jit
def _ranges(x: jax.Array, valid: jax.Array | None, percentiles: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = jax.vmap(lambda p: token_range(x, p, valid))(percentiles)
    return low[:, 0], high[:, 0]


def _with_grids(quantized: Quantized, grids: dict[str, Grid], i: int) -> Quantized:
    chosen = {name: jax.tree.map(lambda a: a[..., i], grid) for name, grid in grids.items()}
    inputs = {name: replace(quantized.inputs[name], grid=grid) for name, grid in chosen.items()}
    return replace(quantized, inputs={**quantized.inputs, **inputs})


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
