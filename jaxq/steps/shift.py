"""OS+'s channel-wise shift: it takes the asymmetry out of an activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax

from jaxq.program.groups import GroupPlan
from jaxq.steps.group import Group, Spec, Step, channel_range, first_batches, transformed

Where = Callable[[GroupPlan], bool]


def fed_by_norm(plan: GroupPlan) -> bool:
    """The activation is a norm's output, whether or not others read it too (post-norm blocks do)."""
    return plan.fold.producer == "norm"


def foldable(plan: GroupPlan) -> bool:
    """The norm-fed groups, and those whose scale an earlier contraction's columns can take (but not through
    attention): where OS+ works for free, or at the cost of one fused subtraction and product."""
    return fed_by_norm(plan) or (plan.fold.producer == "linear" and plan.fold.scale is not None)


def fed_by_attention(plan: GroupPlan) -> bool:
    """The activation is attention's output, and the columns that make the values can take its scale; no published
    method migrates it."""
    return plan.fold.producer == "attention" and plan.fold.scale is not None


def channel_shift(where: Where = fed_by_norm, batches: int | None = None) -> Step:
    """z_c = (max x_c + min x_c) / 2 over the real tokens (OS+, eq. 2): the middle of each channel's range.

    Only where every consumer has a bias to take `z W`; elsewhere (LLaMA) see `run_time_shift`.

    Args:
      where: which groups, by what is known of them.
      batches: how many microbatches it looks at; None is all.
    """
    return _shift(where, batches, lambda group: group.can_shift())


def run_time_shift(where: Where = fed_by_norm, batches: int | None = None) -> Step:
    """The same shift where consumers have no bias: subtracted at run time, `z W` added to their outputs."""
    return _shift(where, batches, lambda group: group.plan.kind == "linear" and group.can_scale())


def _shift(where: Where, batches: int | None, able: Callable[[Group], bool]) -> Step:
    def apply(group: Group) -> Group:
        if not where(group.plan) or not able(group):
            return group
        return transformed(group, shift=middle(*channel_range(first_batches(group, batches))))

    return Step(touch(where), apply)


def middle(low: jax.Array, high: jax.Array) -> jax.Array:
    return (low + high) / 2


def touch(where: Where) -> Callable[[GroupPlan, Spec], Spec]:
    """A plan that asks for the real activation of the groups it works on."""

    def plan(group: GroupPlan, spec: Spec) -> Spec:
        return replace(spec, touched=True) if where(group) and group.kind in ("linear", "conv", "ragged") else spec

    return plan
