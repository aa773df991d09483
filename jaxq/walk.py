"""The calibration walk: a program evaluated piece by piece on real batches, every group handled as it is reached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.contraction import apply_input
from jaxq.fold import stack_layers
from jaxq.handle import Handled, handle
from jaxq.program import _compat
from jaxq.program.graph import Node, Operand
from jaxq.program.groups import GroupPlan, Layout
from jaxq.program.reach import depends_on, view_nodes
from jaxq.program.segments import Segment, cut, evaluate
from jaxq.program.tokens import Labels, label
from jaxq.program.views import look
from jaxq.qtensor import InputQuant, QTensor, Transform, logical
from jaxq.steps.group import Group, Spec, Step

Env = dict[int, Any]


@dataclass
class Leaves:
    """The parameters as they were and as they are by now, by path."""

    original: dict[str, Any]
    current: dict[str, Any]

    def layer(self, stacked: set[str], i: int) -> Leaves:
        """One scan iteration's view: slices of stacked parameters, the others as they are."""

        def pick(leaves: dict[str, Any]) -> dict[str, Any]:
            return {p: jax.tree.map(lambda a: a[i], x) if p in stacked else x for p, x in leaves.items()}

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
    running: dict[int, list[Handled]] = field(default_factory=lambda: defaultdict(list))  # by the member's node

    def value(self, v: int, m: int, original: bool = False) -> Any:
        """A value of microbatch `m`; parameters are read when they are asked for, as `QTensor` where they are one."""
        graph = self.layout.graph
        if v in graph.refs:
            ref = graph.refs[v]
            leaf = (self.leaves.original if original else self.leaves.current)[ref.path]
            if isinstance(leaf, QTensor):
                return look(ref.views, leaf.dequantize()) if ref.views else leaf
            return look(ref.views, jnp.asarray(leaf))
        if v in graph.consts:
            return graph.consts[v]
        return self.envs[m][v]


def walk_graph(place: Place, bodies: dict[int, list[Labels]]) -> list[list[Any]]:
    """Walks one graph to its end; returns its outputs for each microbatch."""
    walk_groups(place, bodies, place.layout.graph.outputs)
    return [
        [v.value if not isinstance(v, int) else array_of(place.value(v, m)) for v in place.layout.graph.outputs]
        for m in range(len(place.envs))
    ]


def array_of(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QTensor) else value


def walk_groups(place: Place, bodies: dict[int, list[Labels]], outputs: Sequence[Operand]) -> None:
    """Walks one graph as far as its last group, or as `outputs` are known."""
    graph, walk = place.layout.graph, place.walk
    starts = defaultdict(list)
    for plan in touched(walk, place.layout):
        starts[plan.start].append(plan)
    last_use = _last_use(place, starts, outputs)
    pending: list[Node] = []
    for node in graph.nodes:
        if node.index in starts:
            _flush(place, pending, last_use)
            for plan in starts[node.index]:
                _handle(place, plan)
        if any_touched(walk, place.layout, node):
            _flush(place, pending, last_use)
            _loop(place, node, bodies.get(node.index, []))
            _forget(place, node.index, last_use)
        else:
            pending.append(node)
    _flush(place, pending, last_use)


def _last_use(place: Place, starts: dict[int, list[GroupPlan]], outputs: Sequence[Operand]) -> dict[int, int]:
    """The last node that needs each value; a fold's proof needs what its producer reads until the group is reached."""
    graph = place.layout.graph
    last: dict[int, int] = {}
    for node in graph.nodes:
        last.update((v, node.index) for v in node.ins if isinstance(v, int))
    for at, plans in starts.items():
        for plan in plans:
            for v in producing(place.layout, plan).reads if plan.fold.paths else ():
                last[v] = max(last.get(v, 0), at)
    last.update((v, len(graph.nodes)) for v in outputs if isinstance(v, int))
    return last


def producing(layout: Layout, plan: GroupPlan) -> Segment:
    """The piece of program from the parameters that a fold edits to the group's input."""
    changed = depends_on(layout.graph, plan.fold.paths, plan.start)
    fixed = set(range(len(layout.graph.avals))) - changed - set(layout.graph.refs)
    return cut(layout.graph, layout.graph.nodes[: plan.start], [plan.x], stop=fixed)


def _flush(place: Place, pending: list[Node], last_use: dict[int, int]) -> None:
    """Evaluates the pending nodes, for every microbatch, as one compiled piece."""
    graph = place.layout.graph
    if not pending:
        return
    end = pending[-1].index
    made = [v for node in pending for v in node.outs]
    writes = [v for v in made if last_use.get(v, -1) > end and v not in graph.refs]
    if writes:
        segment = cut(graph, [*view_nodes(graph), *pending], writes)
        where, quants, biases = _quantized_ops(place, segment)
        params = {v: place.value(v, 0, original=not place.walk.quantized) for v in segment.reads if v in graph.refs}
        for m, env in enumerate(place.envs):
            values = [params[v] if v in params else place.value(v, m) for v in segment.reads]
            env.update(zip(segment.writes, _run(segment, where, values, quants, biases), strict=True))
    _forget(place, end, last_use)
    pending.clear()


def _forget(place: Place, done: int, last_use: dict[int, int]) -> None:
    for env in place.envs:
        for v in [v for v in env if last_use.get(v, -1) <= done]:
            del env[v]


def _quantized_ops(place: Place, segment: Segment) -> tuple[tuple, list, list]:
    """Which of a segment's contractions read quantized inputs: static places and, apart, their numbers."""
    where, quants, biases = [], [], []
    for i, index in enumerate(segment.nodes):
        for done in place.running.get(index, ()) if place.walk.quantized else ():
            member = next(m for m in done.plan.members if m.site.node == index)
            bias = done.quant.bias.get(member.site.path)
            where.append((i, member.site.operands.x, done.plan.x_axes))
            quants.append(replace(done.quant, bias={}, sites=()))
            biases.append(bias)
    return tuple(where), quants, biases


@partial(jax.jit, static_argnums=(0, 1))
def _run(segment: Segment, where: tuple, values: list, quants: list, biases: list) -> list:
    changes: dict[int, Callable] = {}
    for (op, side, axes), quant, bias in zip(where, quants, biases):
        changes[op] = partial(_quantized, changes.get(op, _compat.bind), side, axes, quant, bias)
    return evaluate(segment, logical(values), changes)


def _quantized(then: Callable, side: int, axes: tuple, quant: InputQuant, bias: Any, eqn: Any, args: list) -> list:
    args = [apply_input(quant, a, axes) if i == side else a for i, a in enumerate(args)]
    out = then(eqn, args)
    return out if bias is None else [out[0] + bias.astype(out[0].dtype)]


def _handle(place: Place, plan: GroupPlan) -> None:
    done = handle(place, plan)
    for member in plan.members:
        place.running[member.site.node].append(done)
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
    """The body layer by layer on slices; what is found is stacked along a leading layer axis."""
    split, length = _compat.scan_split(node.eqn), node.params["length"]
    outside = split.consts + split.carry
    body = place.layout.bodies[node.index, 0]
    stacked = {ref.path for v in body.graph.inputs if (ref := body.graph.refs.get(v)) and ref.depth == body.depth}
    operands = [[_operand(place, v, m) for v in node.ins] for m in range(len(place.envs))]
    carries = [ops[split.consts : outside] for ops in operands]
    order = range(length - 1, -1, -1) if node.params["reverse"] else range(length)
    per_layer: dict[int, tuple[Found, dict[str, Any], list[list[Any]]]] = {}
    for i in order:
        leaves, found = place.leaves.layer(stacked, i), Found()
        before = dict(leaves.current)
        envs = []
        for ops, carry in zip(operands, carries, strict=True):
            xs = [None if a is None else a[i] for a in ops[outside:]]
            envs.append(_env(body, [*ops[: split.consts], *carry, *xs]))
        inner, bodies = label(body.graph, labels)
        outs = walk_graph(
            replace(place, layout=body, envs=envs, labels=inner, leaves=leaves, found=found, running=defaultdict(list)),
            bodies,
        )
        carries = [out[: split.carry] for out in outs]
        changed = {p: leaves.current[p] for p in stacked if leaves.current[p] is not before[p]}
        place.leaves.current.update({p: x for p, x in leaves.current.items() if p not in stacked})
        per_layer[i] = found, changed, [out[split.carry :] for out in outs]
    _stack(place, node, [per_layer[i] for i in range(length)], carries)


def _operand(place: Place, v: Any, m: int) -> Any:
    """An operand of a loop; parameters are left to the body, which reads its own."""
    if not isinstance(v, int):
        return v.value
    return None if v in place.layout.graph.refs else place.value(v, m)


def _env(body: Layout, values: list[Any]) -> Env:
    return {v: x for v, x in zip(body.graph.inputs, values, strict=True) if v not in body.graph.refs}


def _stack(place: Place, node: Node, layers: list[tuple[Found, dict, list]], carries: list[list[Any]]) -> None:
    founds, leaves, ys = zip(*layers)
    for path in leaves[0]:
        place.leaves.current[path] = stack_layers([layer[path] for layer in leaves])
    place.found.inputs.update(stack_layers([f.inputs for f in founds]))
    place.found.transforms.update(stack_layers([f.transforms for f in founds]))
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
            running=defaultdict(list),
        )
        for m, out in zip(mine, walk_graph(there, bodies), strict=True):
            place.envs[m].update(zip(node.outs, out, strict=True))
