"""The calibration walk: a program evaluated piece by piece on real batches, every group handled as it is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.calibration.ahead import Ahead, decoded, rehearse
from jaxq.calibration.handle import Handled, applied, handle
from jaxq.calibration.stages import Stage, run, stages
from jaxq.fold import layer_axes, layer_of, stack_layers
from jaxq.program import _compat
from jaxq.program.graph import Node, Operand
from jaxq.program.groups import GroupPlan, Layout
from jaxq.program.segments import Segment
from jaxq.program.tokens import Labels, label
from jaxq.program.views import look
from jaxq.qtensor import InputQuant, Transform, is_qtensor
from jaxq.steps.group import Group, Spec, Step

Env = dict[int, Any]


@dataclass
class Leaves:
    """The parameters as they were and as they are by now, by path."""

    original: dict[str, Any]
    current: dict[str, Any]

    def layer(self, axes: dict[str, int], i: int) -> Leaves:
        """One scan iteration's view: slices of stacked parameters, the others as they are."""

        def pick(leaves: dict[str, Any]) -> dict[str, Any]:
            return {p: layer_of(x, i, axes[p]) if p in axes else x for p, x in leaves.items()}

        return Leaves(pick(self.original), pick(self.current))


@dataclass
class Found:
    """What the walk has to show: each group's input and transform, by name."""

    inputs: dict[str, InputQuant] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk:
    """What stays the same all the way.

    `quantized`: whether later groups see what the quantized groups before them give, or what the original ones do.
    """

    step: Step
    quantized: bool
    masks: tuple[jax.Array, ...] | None
    on_group: Callable[[Group], None]
    ahead: Ahead

    def spec(self, plan: GroupPlan) -> Spec:
        return self.step.plan(plan, Spec())


def touched(walk: Walk, layout: Layout) -> list[GroupPlan]:
    return [g for g in layout.groups if walk.spec(g).touched]


def any_touched(walk: Walk, layout: Layout, node: Node) -> bool:
    inside = [body for (index, _), body in layout.bodies.items() if index == node.index]
    return any(touched(walk, part) for body in inside for part in body.all())


@dataclass
class Place:
    """Where the walk is: one graph, with the values of every microbatch so far."""

    walk: Walk
    layout: Layout
    envs: list[Env]
    labels: dict[int, Labels]
    leaves: Leaves
    found: Found
    which: tuple[int, ...]  # the microbatches walked here (a branch of `cond` may see only some)
    done: dict[str, Handled] = field(default_factory=dict)  # the groups, by name

    def value(self, v: int, m: int, original: bool = False) -> Any:
        """A value of microbatch `m`; parameters are read when they are asked for, and decoded."""
        graph = self.layout.graph
        if v in graph.refs:
            ref = graph.refs[v]
            leaf = (self.leaves.original if original else self.leaves.current)[ref.path]
            call = self.walk.ahead
            return call(decoded(), leaf, ref.views) if is_qtensor(leaf) else look(ref.views, jnp.asarray(leaf))
        if v in graph.consts:
            return graph.consts[v]
        return self.envs[m][v]


def walk_graph(place: Place, bodies: dict[int, list[Labels]]) -> list[list[Any]]:
    """Walks one graph to its end; returns its outputs for each microbatch."""
    walk_groups(place, bodies, place.layout.graph.outputs)
    return [
        [place.value(v, m) if isinstance(v, int) else v.value for v in place.layout.graph.outputs]
        for m in range(len(place.envs))
    ]


def walk_groups(place: Place, bodies: dict[int, list[Labels]], outputs: Sequence[Operand]) -> None:
    """Walks one graph as far as its last group, or as `outputs` are known."""
    walk, layout = place.walk, place.layout
    loops = {node.index for node in layout.graph.nodes if any_touched(walk, layout, node)}
    plan, last_use = stages(layout, touched(walk, layout), loops, walk.quantized, outputs)
    rehearse(place, plan)
    for stage in plan:
        if stage.segment is not None:
            _evaluate(place, stage, stage.segment)
        _forget(place, stage.done, last_use)
        for group in stage.groups:
            _handle(place, group)
        if stage.loop is not None:
            _loop(place, stage.loop, bodies.get(stage.loop.index, []))
            _forget(place, stage.loop.index, last_use)


def _evaluate(place: Place, stage: Stage, segment: Segment) -> None:
    """Evaluates a piece of the program for every microbatch, with quantized inputs where groups have theirs."""
    refs, done = place.layout.graph.refs, [place.done[read.group.name] for read in stage.reads]
    params = {v: place.value(v, 0, original=not place.walk.quantized) for v in segment.reads if v in refs}
    biases = [d.quant.bias.get(read.path) for d, read in zip(done, stage.reads, strict=True)]
    call = place.walk.ahead
    for m, env in enumerate(place.envs):
        values = [params[v] if v in params else place.value(v, m) for v in segment.reads]
        inputs = {(read.group.name, read.x): d for d, read in zip(done, stage.reads, strict=True)}
        inputs = {
            (name, x): applied(call, d.quant, place.value(x, m), d.plan.x_axes) for (name, x), d in inputs.items()
        }
        given = [inputs[read.group.name, read.x] for read in stage.reads]
        env.update(zip(segment.writes, call(run(), segment, stage.where, values, given, biases), strict=True))


def _forget(place: Place, done: int, last_use: dict[int, int]) -> None:
    for env in place.envs:
        for v in [v for v in env if last_use.get(v, -1) <= done]:
            del env[v]


def _handle(place: Place, plan: GroupPlan) -> None:
    done = handle(place, plan)
    place.done[plan.name] = done
    if done.left is not None:
        place.found.inputs[plan.name] = done.left
    if done.transform is not None:
        place.found.transforms[plan.name] = done.transform


def _loop(place: Place, node: Node, labels: list[Labels]) -> None:
    if node.name == "scan":
        _scan(place, node, labels)
    elif node.name == "cond":
        _cond(place, node, labels)
    else:
        names = [
            g.name
            for (i, _), body in place.layout.bodies.items()
            if i == node.index
            for part in body.all()
            for g in touched(place.walk, part)
        ]
        raise ValueError(
            f"{names[0]}: inside a while loop, whose number of passes is not known, so no statistics can be collected; "
            "use lax.scan (or fori_loop with static bounds), or leave it out with a `skip` pattern"
        )


def _scan(place: Place, node: Node, labels: list[Labels]) -> None:
    """The body layer by layer on slices; what is found is stacked again."""
    split, length = _compat.scan_split(node.eqn), node.params["length"]
    outside = split.consts + split.carry
    body = place.layout.bodies[node.index, 0]
    axes = layer_axes(body)
    operands = [[_operand(place, v, m) for v in node.ins] for m in range(len(place.envs))]
    carries = [ops[split.consts : outside] for ops in operands]
    order = range(length - 1, -1, -1) if node.params["reverse"] else range(length)
    per_layer: dict[int, tuple[Found, dict[str, Any], list[list[Any]]]] = {}
    changed: set[str] = set()
    for i in order:
        leaves, found = place.leaves.layer(axes, i), Found()
        before = dict(leaves.current)
        envs = []
        for ops, carry in zip(operands, carries, strict=True):
            xs = [None if a is None else a[i] for a in ops[outside:]]
            envs.append(_env(body, [*ops[: split.consts], *carry, *xs]))
        inner, bodies = label(body.graph, labels)
        outs = walk_graph(
            replace(place, layout=body, envs=envs, labels=inner, leaves=leaves, found=found, done={}),
            bodies,
        )
        carries = [out[: split.carry] for out in outs]
        changed |= {p for p in axes if leaves.current[p] is not before[p]}
        place.leaves.current.update({p: x for p, x in leaves.current.items() if p not in axes})
        per_layer[i] = found, {p: leaves.current[p] for p in axes}, [out[split.carry :] for out in outs]
    _stack(place, node, {p: axes[p] for p in sorted(changed)}, [per_layer[i] for i in range(length)], carries)


def _operand(place: Place, v: Any, m: int) -> Any:
    """An operand of a loop; parameters are left to the body, which reads its own."""
    if not isinstance(v, int):
        return v.value
    return None if v in place.layout.graph.refs else place.value(v, m)


def _env(body: Layout, values: list[Any]) -> Env:
    return {v: x for v, x in zip(body.graph.inputs, values, strict=True) if v not in body.graph.refs}


def _stack(
    place: Place, node: Node, axes: dict[str, int], layers: list[tuple[Found, dict, list]], carries: list[list[Any]]
) -> None:
    """`axes`: of the leaves that were changed in any layer."""
    founds, leaves, ys = zip(*layers)
    for path, axis in axes.items():
        place.leaves.current[path] = stack_layers([layer[path] for layer in leaves], axis)
    place.found.inputs.update(stack_layers([f.inputs for f in founds]))
    for name in dict.fromkeys(name for f in founds for name in f.transforms):
        place.found.transforms[name] = stack_layers([f.transforms.get(name, Transform()) for f in founds])
    for m, env in enumerate(place.envs):
        stacked = [jnp.stack(list(y)) for y in zip(*(layer[m] for layer in ys))]
        env.update(zip(node.outs, [*carries[m], *stacked], strict=True))


def _cond(place: Place, node: Node, labels: list[Labels]) -> None:
    """Each branch on the microbatches that take it."""
    operands = [[_operand(place, v, m) for v in node.ins] for m in range(len(place.envs))]
    taken = [min(max(int(ops[0]), 0), len(node.bodies) - 1) for ops in operands]
    for i in range(len(node.bodies)):
        body = place.layout.bodies[node.index, i]
        mine = [m for m, branch in enumerate(taken) if branch == i]
        if not mine and (missed := [g for part in body.all() for g in touched(place.walk, part)]):
            raise ValueError(
                f"{missed[0].name}: no calibration batch takes branch {i} of the `cond` that holds it; add a batch "
                "that does, or leave it out with a `skip` pattern"
            )
        if not mine:
            continue
        inner, bodies = label(body.graph, labels)
        there = replace(
            place,
            layout=body,
            envs=[_env(body, operands[m][1:]) for m in mine],
            labels=inner,
            which=tuple(place.which[m] for m in mine),
            done={},
        )
        for m, out in zip(mine, walk_graph(there, bodies), strict=True):
            place.envs[m].update(zip(node.outs, out, strict=True))
