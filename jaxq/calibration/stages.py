"""What the walk does in one graph, known before any of it is run: pieces of program between the groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from jaxq.program import _compat
from jaxq.program.graph import Node, Operand
from jaxq.program.groups import GroupPlan, Layout
from jaxq.program.reach import depends_on, view_nodes
from jaxq.program.segments import Segment, alike, cut, evaluate


@dataclass(frozen=True)
class Read:
    """A contraction of a segment that reads a group's input: the operand `side` of the op `op`, the value `x`."""

    op: int
    side: int
    x: int
    path: str
    group: GroupPlan


@dataclass(frozen=True)
class Stage:
    """A piece of the program (None: nothing of it is read later), then the groups that start or the loop after it.

    `done` is the last node that has been evaluated then.
    """

    segment: Segment | None
    reads: tuple[Read, ...]
    done: int
    groups: tuple[GroupPlan, ...] = ()
    loop: Node | None = None

    @property
    def where(self) -> tuple[tuple[int, int], ...]:
        return tuple((read.op, read.side) for read in self.reads)


def stages(
    layout: Layout, groups: Sequence[GroupPlan], loops: set[int], quantized: bool, outputs: Sequence[Operand]
) -> tuple[list[Stage], dict[int, int]]:
    """Cuts a graph where groups start and before and after its `loops`; and the last node that needs each value.

    Args:
      groups: those of the graph that the walk stops at.
      loops: the nodes with such groups inside.
      quantized: whether the pieces read the groups' inputs quantized.
      outputs: what must be known at the end.
    """
    graph = layout.graph
    starts: dict[int, list[GroupPlan]] = defaultdict(list)
    readers: dict[int, list[Read]] = defaultdict(list)
    for plan in groups:
        starts[plan.start].append(plan)
        for member in plan.members if quantized and plan.kind != "lookup" else ():
            node, side = member.site.node, member.site.operands.x
            x = graph.nodes[node].ins[side]
            assert isinstance(x, int)
            readers[node].append(Read(-1, side, x, member.site.path, plan))
            if x != plan.x:  # a cast of the group's input, say: it must be known before this member reads it
                starts[node] += []
    last_use = _last_use(layout, starts, outputs)
    found: list[Stage] = []
    pending: list[Node] = []

    def flush(**after: Any) -> None:
        segment, done = None, pending[-1].index if pending else -1
        made = [v for node in pending for v in node.outs]
        writes = [v for v in made if last_use.get(v, -1) > done and v not in graph.refs]
        if writes:
            segment = cut(graph, [*view_nodes(graph), *pending], writes)
        nodes = segment.nodes if segment else ()
        reads = [Read(i, r.side, r.x, r.path, r.group) for i, n in enumerate(nodes) for r in readers.get(n, ())]
        found.append(Stage(segment, tuple(reads), done, **after))
        pending.clear()

    for node in graph.nodes:
        if node.index in starts:
            flush(groups=tuple(starts[node.index]))
        if node.index in loops:
            flush(loop=node)
        else:
            pending.append(node)
    flush()
    segments = iter(alike(graph, [stage.segment for stage in found if stage.segment is not None]))
    return [replace(stage, segment=next(segments)) if stage.segment else stage for stage in found], last_use


def _last_use(layout: Layout, starts: dict[int, list[GroupPlan]], outputs: Sequence[Operand]) -> dict[int, int]:
    """The last node that needs each value; a fold's proof needs what its producer reads until the group is reached."""
    graph = layout.graph
    last: dict[int, int] = {}
    for node in graph.nodes:
        last.update((v, node.index) for v in node.ins if isinstance(v, int))
    for at, plans in starts.items():
        for plan in plans:
            for v in producing(layout, plan).reads if plan.fold.paths else ():
                last[v] = max(last.get(v, 0), at)
    last.update((v, len(graph.nodes)) for v in outputs if isinstance(v, int))
    return last


def producing(layout: Layout, plan: GroupPlan) -> Segment:
    """The piece of program from the parameters that a fold edits to the group's input."""
    changed = depends_on(layout.graph, plan.fold.paths, plan.start)
    fixed = set(range(len(layout.graph.avals))) - changed - set(layout.graph.refs)
    return cut(layout.graph, layout.graph.nodes[: plan.start], [plan.x], stop=fixed)


@_compat.quick_jit(static_argnums=(0, 1))
def run(segment: Segment, where: tuple, values: list, inputs: list, biases: list) -> list:
    """A segment's outputs, where the operands `where` are `inputs` instead, and what is not None in `biases` is added
    to the results of their contractions."""
    changes: dict[int, Callable] = {}
    for (op, side), x, bias in zip(where, inputs, biases, strict=True):
        changes[op] = partial(_replaced, changes.get(op, _compat.bind), side, x, bias)
    return evaluate(segment, values, changes)


def _replaced(then: Callable, side: int, x: jax.Array, bias: jax.Array | None, eqn: Any, args: list) -> list:
    out = then(eqn, [x if i == side else a for i, a in enumerate(args)])
    return out if bias is None else [out[0] + bias.astype(out[0].dtype)]
