"""Pieces of a graph as compiled functions. Equal pieces (a transformer's layers) are one compilation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxq.program import _compat
from jaxq.program.graph import Const, Graph, Node


@dataclass(frozen=True)
class Op:
    """One equation of a segment; operands are numbers of the segment's own values."""

    eqn: Any
    ins: tuple[int | Const, ...]
    outs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """A straight piece of a program. Two segments are equal when they compute the same thing, whatever layer they are
    cut from: that is what lets `jax.jit` compile them once."""

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]  # segment value numbers
    outputs: tuple[int, ...]
    reads: tuple[int, ...]  # the graph's values that `inputs` stand for
    writes: tuple[int, ...]  # the graph's values that `outputs` stand for
    nodes: tuple[int, ...]  # the graph's nodes that `ops` are
    key: tuple

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def position(self, node: int) -> int:
        return self.nodes.index(node)


def cut(graph: Graph, nodes: Sequence[Node], writes: Sequence[int], stop: Iterable[int] = ()) -> Segment:
    """The segment of `nodes` (in program order) that computes the graph's values `writes`, without dead code.

    Values in `stop` are taken as inputs even where `nodes` compute them.
    """
    stop = set(stop)
    needed, kept = {v for v in writes if v not in stop}, []
    for node in sorted({n.index: n for n in nodes}.values(), key=lambda n: n.index, reverse=True):
        if any(v in needed and v not in stop for v in node.outs):
            kept.append(node)
            needed.update(v for v in node.ins if isinstance(v, int))
    kept.reverse()
    return _renumber(graph, kept, tuple(dict.fromkeys(writes)), stop)


def _renumber(graph: Graph, nodes: list[Node], writes: tuple[int, ...], stop: set[int]) -> Segment:
    number: dict[int, int] = {}
    made = {v for node in nodes for v in node.outs if v not in stop}
    reads: list[int] = []

    def use(v: int | Const) -> int | Const:
        if isinstance(v, Const):
            return v
        if v not in number:
            number[v] = len(number)
            if v not in made:
                reads.append(v)
        return number[v]

    ops = []
    for node in nodes:
        ins = tuple(use(v) for v in node.ins)
        outs = tuple(-1 if v in stop else number.setdefault(v, len(number)) for v in node.outs)
        ops.append(Op(node.eqn, ins, outs))
    outputs = tuple(n for v in writes if isinstance(n := use(v), int))
    key = (
        tuple((op.eqn.primitive.name, tuple(map(stand_in, op.ins)), op.outs, stand_in(op.eqn.params)) for op in ops),
        tuple((number[v], str(graph.avals[v])) for v in reads),
        outputs,
    )
    return Segment(
        tuple(ops), tuple(number[v] for v in reads), outputs, tuple(reads), writes, tuple(n.index for n in nodes), key
    )


def alike(graph: Graph, segments: Sequence[Segment]) -> list[Segment]:
    """The segments, equal where they differ only in what of them is read later: all of these write what one does (a
    last layer's output goes to no further layer, but is computed all the same)."""
    wanted: dict[tuple, set[int]] = {}
    for segment in segments:
        wanted.setdefault(segment.key[:2], set()).update(segment.outputs)

    def widened(segment: Segment) -> Segment:
        outputs = tuple(sorted(wanted[segment.key[:2]]))
        made = {n: v for op, i in zip(segment.ops, segment.nodes) for n, v in zip(op.outs, graph.nodes[i].outs)}
        writes = tuple(made[n] for n in outputs)
        return replace(segment, outputs=outputs, writes=writes, key=(*segment.key[:2], outputs))

    return [widened(segment) for segment in segments]


def stand_in(value: Any) -> Any:
    """A hashable stand-in for an equation's parameter or constant: equal stand-ins mean equal computations."""
    if isinstance(value, Const):
        return ("const", stand_in(value.value))
    if isinstance(value, dict):
        return tuple((k, stand_in(v)) for k, v in sorted(value.items()))
    if isinstance(value, (tuple, list)):
        return tuple(stand_in(v) for v in value)
    if isinstance(value, ClosedJaxpr):
        return (str(value.jaxpr), tuple(map(stand_in, value.consts)))
    if isinstance(value, Jaxpr):
        return str(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, jax.Array):
        return ("array", id(value))
    if isinstance(value, (int, float, bool, complex, str, bytes)):
        return (type(value).__name__, repr(value))
    try:
        hash(value)
    except TypeError:
        return ("unhashable", id(value))
    return value


def evaluate(segment: Segment, values: Sequence[Any], changes: Mapping[int, Any] | None = None) -> list[Any]:
    """Runs a segment on the values of its inputs. `changes[i]`, for the i-th op, takes the list of its operands and the
    equation and returns the list of its results in place of the equation's own."""
    env = dict(zip(segment.inputs, values, strict=True))
    for i, op in enumerate(segment.ops):
        args = [v.value if isinstance(v, Const) else env[v] for v in op.ins]
        out = changes[i](op.eqn, args) if changes and i in changes else _compat.bind(op.eqn, args)
        env.update((k, v) for k, v in zip(op.outs, out, strict=True) if k >= 0)
    return [env[v] for v in segment.outputs]


@partial(jax.jit, static_argnums=0)
def run(segment: Segment, values: Sequence[Any]) -> list[Any]:
    """`evaluate`, compiled once for all equal segments."""
    return evaluate(segment, values)
