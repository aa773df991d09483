"""Outlier Suppression+ (arXiv:2304.09145): channel-wise shift and scale, the scale found by a search on the error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import divide
from jaxq.quantizer import Quantizer
from jaxq.search import Search, coarse_to_fine, each, padded, search
from jaxq.steps.compose import chain
from jaxq.steps.group import Group, Step, channel_range, first_batches, numbers_of, transformed
from jaxq.steps.objective import Numbers, Objective, Objectives, Piece, replay, replay_quantized, squared_error
from jaxq.steps.shift import Where, channel_shift, foldable, touch

Choose = Callable[[Objectives], Objective]


def group_outputs(objectives: Objectives) -> Objective:
    """The error of the group's own outputs."""
    return objectives.outputs


def next_input(objectives: Objectives) -> Objective:
    """The error of the next contraction's input: attention's output for q, k, v; the product for gate and up."""
    return objectives.next_input or objectives.outputs


def as_the_paper(objectives: Objectives) -> Objective:
    """The next input where the group's outputs are mixed with each other on the way to it, else the outputs."""
    return next_input(objectives) if objectives.mixes else objectives.outputs


def os_plus(shift: Step | None = None, scale: Step | None = None) -> Step:
    """OS+: `channel_shift()`, then `channel_scale()`; give either with other arguments, or `nothing()`."""
    return chain(shift or channel_shift(), scale or channel_scale())


def channel_scale(
    lower: float = 0.1,
    candidates: int = 100,
    search: Search = coarse_to_fine(),
    objective: Choose = as_the_paper,
    where: Where = foldable,
    batches: int | None = 4,
) -> Step:
    """The scale that squeezes outlying channels to a threshold t, with the t of least quantized error (OS+, eq. 5-8).

    s_c(t) = max(1, max x_c / t, min x_c / -t); candidates for t run from max |x| down to `lower`.

    Args:
      lower: the smallest threshold, in units of the activation (the paper's code: 1.0 after a shift, 0.1 for LLaMA).
      candidates: how many steps; more where the activation is larger than 50, so that no step exceeds 0.5.
      search: `exhaustive()` or `coarse_to_fine()`.
      objective: which error counts.
      where: which groups, by what is known of them.
      batches: how many microbatches, the first ones, the search looks at; None is all. The paper's code looks at 1:
        often too few for static ranges (LLaMA of 260k parameters, W6A6 per tensor: perplexity 5.999; with 4 5.215).

    The recipe must quantize weights or activations further down the chain, else there is no error to minimize.
    """

    def apply(group: Group) -> Group:
        if not where(group.plan) or not group.can_scale():
            return group
        if group.spec.weights is None and group.spec.activations is None:
            raise ValueError(f"{group.plan.name}: channel_scale needs a `quantize` further down the chain")
        few = first_batches(group, batches)
        low, high = channel_range(few)
        grid = thresholds(low, high, lower, candidates)
        if len(grid) == 0:
            return group.noted(thresholds=grid, losses=grid)
        pieces = group.objectives
        assert pieces is not None  # can_scale: its consumers are weights
        best, losses = search_scale(few, objective(pieces), grid, low, high, search)
        s = scale_for(jnp.float32(grid[best]), low, high)
        return transformed(group, scale=s).noted(thresholds=grid, losses=losses, best=best)

    return Step(touch(where), apply)


def scale_for(t: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """s_c(t): only channels that exceed t are scaled, exactly down to it (OS+, eq. 7)."""
    above = jnp.where(high > t, divide(high, t), jnp.float32(1))
    below = jnp.where(low < -t, divide(low, -t), jnp.float32(1))
    return jnp.maximum(above, below)


def thresholds(low: jax.Array, high: jax.Array, lower: float, count: int) -> np.ndarray:
    """The candidates, float64, from max |x| (no scaling) down to `lower` in equal steps; empty if it is below."""
    top, bottom = max(float(high.max()), 0.0), min(float(low.min()), 0.0)
    largest = max(top, -bottom)
    if largest < lower:
        return np.zeros(0)
    step = (largest - lower) / max(count, int(top / 0.5))
    # Subtracted one after the other as the reference does: whether `lower` itself is reached depends on rounding.
    found = [largest]
    while step > 0 and found[-1] - step >= lower:
        found.append(found[-1] - step)
    return np.array(found)


def search_scale(
    group: Group, objective: Objective, grid: np.ndarray, low: jax.Array, high: jax.Array, method: Search
) -> tuple[int, np.ndarray]:
    """The best threshold's index and the losses: mean over real tokens, sum over features, of the squared error."""
    few = [numbers_of(group, objective, m) for m in range(len(group.x))]
    targets = [_targets(objective.piece, numbers) for numbers in few]
    tokens = objective.tokens_in(len(few))

    def losses(ts: np.ndarray) -> np.ndarray:
        asked = jnp.asarray(padded(ts), jnp.float32)
        formats = group.spec.weights, group.spec.activations
        total = sum(
            _losses(objective.piece, *formats, numbers, target, valid, low, high, asked, len(ts))
            for numbers, target, valid in zip(few, targets, objective.valid)
        )
        return np.asarray(total)[: len(ts)] / tokens

    return search(method, grid, losses)


@partial(jax.jit, static_argnums=0)
def _targets(piece: Piece, numbers: Numbers) -> list[jax.Array]:
    return replay(piece, numbers)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _losses(
    piece: Piece,
    weights: Quantizer | None,
    activations: Quantizer | None,
    numbers: Numbers,
    targets: list[jax.Array],
    valid: tuple,
    low: jax.Array,
    high: jax.Array,
    ts: jax.Array,
    count: int | jax.Array,
) -> jax.Array:
    """The error of the first `count` thresholds on one microbatch, in one compiled call (OS+, eq. 8)."""

    def loss(t: jax.Array) -> jax.Array:
        s = scale_for(t, low, high)
        return squared_error(replay_quantized(piece, weights, activations, numbers, s, t), targets, valid)

    return each(loss, ts, count)
