"""Cuts the pieces of program in which a group's quantization error is measured, and gathers what they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxq.program.groups import GroupPlan, Layout
from jaxq.program.reach import member_inputs, member_outputs, next_input, view_nodes
from jaxq.program.segments import Segment, cut
from jaxq.program.sites import CONTRACTIONS
from jaxq.program.tokens import spread_mask
from jaxq.steps.objective import Consumer, Objective, Objectives, Piece

if TYPE_CHECKING:
    from jaxq.calibration.walk import Place

# Between a group and the next input: attention, or a fused projection cut apart (its pieces meet again).
MIXING = (*CONTRACTIONS, "split", "slice", "dynamic_slice")


def objectives(place: Place, plan: GroupPlan) -> Objectives | None:
    """The objectives of a group of weights; None for attention's operands and look-ups, which have none."""
    if plan.kind not in ("linear", "conv", "ragged"):
        return None
    layout = place.layout
    own = [layout.graph.nodes[m.site.node] for m in plan.members]
    inputs = member_inputs(layout, plan)
    segment = cut(layout.graph, [*view_nodes(layout.graph), *own], member_outputs(layout, plan), stop=inputs)
    outputs = _objective(place, plan, segment)
    target = next_input(layout, plan)
    if target is None:
        return Objectives(outputs)
    known = {v for v in place.envs[0]} | set(inputs) | set(layout.graph.consts)
    segment = cut(layout.graph, layout.graph.nodes, [target], stop=known)
    members = {m.site.node for m in plan.members}
    between = [op for i, op in zip(segment.nodes, segment.ops, strict=True) if i not in members]
    mixes = len(members) > 1 or any(op.eqn.primitive.name in MIXING for op in between)
    if not members <= set(segment.nodes):
        return Objectives(outputs)
    return Objectives(outputs, _objective(place, plan, segment), mixes)


def _objective(place: Place, plan: GroupPlan, segment: Segment) -> Objective:
    slots, others = _slots(place.layout, plan, segment)
    consumers = tuple(
        Consumer(
            segment.position(m.site.node),
            m.site.kind,
            m.site.operands,
            len(m.site.shapes[m.site.operands.w]),
            m.site.leaf_axes,
            m.site.experts,
            m.site.ref.views if m.site.ref else (),
        )
        for m in plan.members
    )
    count = range(len(place.envs))
    masks = place.walk.masks
    valid = tuple(
        tuple(
            None if masks is None else spread_mask(masks[place.which[m]], place.labels.get(v, ()))
            for v in segment.writes
        )
        for m in count
    )
    return Objective(
        Piece(segment, slots, consumers, plan.x_axes),
        tuple(tuple(place.value(v, m) for v in others) for m in count),
        valid,
        _tokens(place, plan),
    )


def _tokens(place: Place, plan: GroupPlan) -> tuple[int, ...]:
    """How many real tokens there are in each microbatch."""
    if place.walk.masks is not None:
        return tuple(int(np.asarray(place.walk.masks[m]).sum()) for m in place.which)
    channels = int(np.prod([plan.x_shape[i] for i in plan.x_axes]))
    return (int(np.prod(plan.x_shape)) // channels,) * len(place.envs)


def _slots(layout: Layout, plan: GroupPlan, segment: Segment) -> tuple[tuple[tuple[str, int], ...], list[int]]:
    """What each of the segment's inputs is to the group; and the values that are nothing to it."""
    inputs = set(member_inputs(layout, plan))
    weights = {m.site.path.partition("#")[0]: k for k, m in enumerate(plan.members)}
    biases = {m.bias.path: k for k, m in enumerate(plan.members) if m.bias is not None}
    slots: list[tuple[str, int]] = []
    others: list[int] = []
    for v in segment.reads:
        path: Any = layout.graph.refs[v].path if v in layout.graph.refs else None
        if v in inputs:
            slots.append(("x", 0))
        elif path in weights:
            slots.append(("weight", weights[path]))
        elif path in biases:
            slots.append(("bias", biases[path]))
        else:
            slots.append(("other", len(others)))
            others.append(v)
    return tuple(slots), others
