"""Encoding the weights and fixing the inputs' grids: what every recipe ends with. Alone, it is round to nearest."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxq.formats import Format, Int, grid_from_range
from jaxq.observers import Observer, Range, average_min_max
from jaxq.program._compat import quick_jit
from jaxq.program.groups import GroupPlan
from jaxq.qtensor import Grid, PerChannel, PerGroup, PerTensor, is_qtensor
from jaxq.quantizer import Quantizer, quantize_weight
from jaxq.steps.group import Group, Spec, Step, encoded, tokens_of

Description = Format | Quantizer | None


def quantize(
    weights: Description = Int(8),
    activations: Description = Int(8),
    attention: Description = None,
    embeddings: Description = None,
) -> Step:
    """Quantizes each group as its earlier steps left it.

    Args:
      weights: of contractions with a parameter; a bare format means one grid an output channel. None: full precision.
      activations: what those contractions read; a bare format means one static grid for the tensor, ranged by the
        quantizer's observer over all batches.
      attention: both operands of contractions of two activations (q k^T and p v).
      embeddings: tables that are looked up; a bare format means one grid a row.

    Raises:
      TypeError: one of them is neither a format, a quantizer nor None.
    """
    per_row = _described(embeddings, PerChannel())
    by_kind = {
        "attention": (None, _described(attention, PerTensor())),
        "lookup": (per_row, None),
    }
    usual = (_described(weights, PerChannel()), _described(activations, PerTensor()))

    def plan(group: GroupPlan, spec: Spec) -> Spec:
        w, x = by_kind.get(group.kind, usual)
        _check_group_size(group, w, x)
        return replace(spec, weights=w, activations=x, touched=spec.touched or bool(w or x))

    def apply(group: Group) -> Group:
        return encode_weights(fix_input(group))

    return Step(plan, apply, rehearse=apply)


def _check_group_size(group: GroupPlan, weights: Quantizer | None, activations: Quantizer | None) -> None:
    """Groups are runs along the last of the axes that are summed over: of the activation, and of each weight's leaf."""
    grouped = isinstance(weights, Quantizer) and isinstance(weights.granularity, PerGroup)
    if grouped and not all(member.site.leaf_axes for member in group.members):
        raise ValueError(
            f"{group.name}: no whole rows of it are looked up, so that it has no runs of channels; choose another "
            "granularity than groups, or leave it out with a `skip` pattern"
        )
    runs = [(activations, group.x_shape[i]) for i in group.x_axes[-1:]]
    for site in (member.site for member in group.members):
        runs += [(weights, site.ref.shape[i]) for i in site.leaf_axes[-1:] if site.ref is not None]
    for quantizer, channels in runs:
        if quantizer is not None and isinstance(quantizer.granularity, PerGroup):
            size = quantizer.granularity.size
            if channels % size:
                raise ValueError(
                    f"{group.name}: groups of {size} do not divide its {channels} channels; choose a divisor of "
                    f"{channels}, or leave it out with a `skip` pattern"
                )


def _described(what: Description, granularity: PerChannel | PerTensor) -> Quantizer | None:
    if not isinstance(what, Description):
        raise TypeError(f"quantize: {what!r} is neither a format, as Int(8) or Float(2, 1), nor a quantizer, nor None")
    return what if what is None or isinstance(what, Quantizer) else Quantizer(what, granularity)


def input_observer(group: Group) -> Observer | None:
    """What ranges the group's input; None where it has no static grid. Clipping by tokens clips no attention
    probabilities, as in the published code (Outlier Suppression, arXiv:2209.13325): they have no outlying tokens."""
    quantizer = group.spec.activations
    if quantizer is None or quantizer.dynamic:
        return None
    return average_min_max() if quantizer.observer.clips_tokens and group.of_pairs else quantizer.observer


def fix_input(group: Group) -> Group:
    """The static grid of the group's input, from its observer; dynamic inputs have none."""
    quantizer, observer = group.spec.activations, input_observer(group)
    if quantizer is None or observer is None:
        return group
    quantizer = replace(quantizer, observer=observer)
    grid, before = None, None
    for x, valid in zip(group.x, group.valid, strict=True):
        grid, before = group.call(_ranged(), quantizer, group.token_axes, group.plan.x_axes, x, valid, before)
    return replace(group, grid=grid)


@quick_jit(static_argnums=(0, 1, 2))
def _ranged(
    quantizer: Quantizer,
    token_axes: tuple[int, ...],
    x_axes: tuple[int, ...],
    x: jax.Array,
    valid: jax.Array | None,
    before: tuple[Range, jax.Array] | None,
) -> tuple[Grid, tuple[Range, jax.Array]]:
    """The grid of all batches so far, their merged range and their number; `before` is the two latter without this one.
    Each batch counts once (the published code counts the first twice)."""
    tokens, real = tokens_of(x, valid, token_axes, x_axes)
    low, high = quantizer.observer.measure(tokens, quantizer.format, real)
    count = jnp.int32(0)
    if before is not None:
        so_far, count = before
        low, high = quantizer.observer.merge(so_far, (low, high), count)
    return Grid(*grid_from_range(quantizer.format, low[0], high[0])), ((low, high), count + 1)


def encode_weights(group: Group) -> Group:
    """The group's weights as codes; a weight that another site has already encoded stays as it is."""
    quantizer = group.spec.weights
    if quantizer is None:
        return group
    codes = {}
    for member in group.plan.members:
        w = group.weights[member.site.path]
        if not is_qtensor(w):
            codes[member.site.path] = group.call(_encoded(), w, quantizer, member.site.leaf_axes, member.site.experts)
    return encoded(group, codes)


_encoded = quick_jit(static_argnums=(1, 2, 3))(quantize_weight)
