"""A traced function as a flat graph of equations, every value traced back to the parameter it is, where it is one.

Calls (`jit`, `remat`, `custom_vjp`, ...) are inlined, loops keep their bodies as graphs of their own. The graph is for
reading: `execute` re-runs the original jaxpr and finds its equations by `Node.address`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxq.program import _compat
from jaxq.program.views import Convert, View, first_axis, view_of


@dataclass(frozen=True)
class Ref:
    """A value that is a parameter, seen through views. `axes` are the layer axes that the scans around it slice away,
    the outermost first, each an axis of what is left of the leaf there; `shape` is what is left in the end."""

    path: str
    shape: tuple[int, ...]
    views: tuple[View, ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """How many scans slice it."""
        return len(self.axes)


@dataclass(frozen=True)
class Derived:
    """A value computed from these parameters alone."""

    paths: frozenset[str]


@dataclass(frozen=True)
class Const:
    """An operand whose value is part of the program."""

    value: Any


Operand = int | Const


@dataclass
class Node:
    """An equation: its address in the nested jaxprs, its operands and results as value numbers, its loop bodies."""

    index: int
    address: tuple[int, ...]
    eqn: Any
    ins: tuple[Operand, ...]
    outs: tuple[int, ...]
    bodies: tuple[Graph, ...] = ()

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params


@dataclass
class Graph:
    """Nodes in program order; `same[v]` is the first value that provably equals `v`; `closed` are the arrays that the
    function closes over, and what is made of them alone."""

    nodes: list[Node] = field(default_factory=list)
    avals: list[Any] = field(default_factory=list)
    refs: dict[int, Ref] = field(default_factory=dict)
    derived: dict[int, Derived] = field(default_factory=dict)
    consts: dict[int, Any] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    from_params: set[int] = field(default_factory=set)
    from_inputs: set[int] = field(default_factory=set)
    picked: set[int] = field(default_factory=set)
    same: dict[int, int] = field(default_factory=dict)
    producer: dict[int, Node] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    outputs: list[Operand] = field(default_factory=list)

    def new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def shape(self, v: Operand) -> tuple[int, ...]:
        return tuple(self.avals[v].shape) if isinstance(v, int) else tuple(np.shape(v.value))

    def leaf(self, v: Operand) -> Ref | None:
        return self.refs.get(v) if isinstance(v, int) else None

    def is_activation(self, v: Operand) -> bool:
        return isinstance(v, int) and v in self.from_inputs

    def is_derived(self, v: Operand) -> bool:
        """Computed from parameters alone, and not a plain view of one."""
        return isinstance(v, int) and v in self.derived

    def root(self, v: int) -> int:
        return self.same.get(v, v)

    @property
    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {ref.path: ref.shape for ref in self.refs.values()}

    @cached_property
    def consumers(self) -> dict[int, list[Node]]:
        """The nodes that read each value, once for each operand; equal values and equal views of a value count as one
        (being a program output is not counted here)."""
        uses: dict[int, list[Node]] = {}
        for node in self.nodes:
            if len(node.outs) == 1 and self.root(node.outs[0]) != node.outs[0]:
                continue
            for v in node.ins:
                if isinstance(v, int):
                    uses.setdefault(self.root(v), []).append(node)
        return uses


# A parameter, a value computed from some, "closed" (over by the function), "input" (depends on the inputs), or None
Kind = Ref | Derived | str | None


def build(closed: ClosedJaxpr, kinds: Sequence[Kind]) -> Graph:
    """Reads a jaxpr whose invars are of the given kinds."""
    graph = Graph()
    for var, kind in zip(closed.jaxpr.invars, kinds, strict=True):
        v = graph.new(var.aval)
        graph.inputs.append(v)
        _set_kind(graph, v, kind)
    numbered: dict[Any, int] = {}
    graph.outputs = _inline(graph, closed, list(graph.inputs), (), numbered)
    return graph


def _set_kind(graph: Graph, v: int, kind: Kind) -> None:
    if isinstance(kind, Ref):
        graph.refs[v] = kind
        graph.from_params.add(v)
    elif isinstance(kind, Derived):
        graph.derived[v] = kind
        graph.from_params.add(v)
    elif kind == "closed":
        graph.closed.add(v)
    elif kind is not None:
        graph.from_inputs.add(v)
        if kind == "input+params":
            graph.from_params.add(v)


def _inline(
    graph: Graph, closed: ClosedJaxpr, args: list[Operand], at: tuple[int, ...], numbered: dict
) -> list[Operand]:
    env: dict[Any, Operand] = dict(zip(closed.jaxpr.invars, args, strict=True))
    for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        v = graph.new(var.aval)
        graph.consts[v] = value
        graph.closed.add(v)
        env[var] = v

    def read(atom: Any) -> Operand:
        return Const(atom.val) if _compat.is_literal(atom) else env[atom]

    for i, eqn in enumerate(closed.jaxpr.eqns):
        ins = [read(a) for a in eqn.invars]
        if eqn.primitive.name in _compat.INLINED:
            outs = _inline(graph, _compat.called_jaxpr(eqn), ins, (*at, i), numbered)
        else:
            outs = _add(graph, eqn, ins, (*at, i), numbered)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in closed.jaxpr.outvars]


def _add(graph: Graph, eqn: Any, ins: list[Operand], at: tuple[int, ...], numbered: dict) -> list[Operand]:
    outs = tuple(graph.new(var.aval) for var in eqn.outvars)
    node = Node(len(graph.nodes), at, eqn, tuple(ins), outs)
    graph.nodes.append(node)
    given = [(closed, [_kind(graph, v) for v in operands]) for closed, operands in given_inside(node)]
    node.bodies = tuple(build(closed, _inside(node, kinds)) for closed, kinds in given)
    params = any(v in graph.from_params for v in ins if isinstance(v, int))
    inputs = any(v in graph.from_inputs for v in ins if isinstance(v, int))
    closed = any(v in graph.closed for v in ins if isinstance(v, int))
    for v in outs:
        graph.producer[v] = node
        if params:
            graph.from_params.add(v)
        if inputs:
            graph.from_inputs.add(v)
        elif params:
            graph.derived[v] = _made_of(graph, ins)
        elif closed:
            graph.closed.add(v)
    if _picks_a_piece(graph, node):
        graph.picked.add(outs[0])
    _follow_view(graph, node, numbered)
    return list(outs)


def _picks_a_piece(graph: Graph, node: Node) -> bool:
    """`w[i]` with a traced scalar `i` takes a piece of a parameter (an embedding look-up takes a row a token)."""
    if not node.ins or not (graph.leaf(node.ins[0]) or graph.is_derived(node.ins[0])):
        return False
    if node.name == "gather":
        return len(node.params["dimension_numbers"].offset_dims) == len(graph.avals[node.outs[0]].shape)
    return node.name == "dynamic_slice"


def _follow_view(graph: Graph, node: Node, numbered: dict) -> None:
    """Notes that a view of a parameter is that parameter, and that two equal views of one value are one value."""
    if len(node.outs) != 1 or not node.ins or not isinstance(node.ins[0], int):
        return
    source, out = node.ins[0], node.outs[0]
    view = view_of(node.name, node.params, graph.avals[source], graph.avals[out])
    if view is None:
        return
    if source in graph.picked:
        graph.picked.add(out)
    if source in graph.refs:
        ref = graph.refs[source]
        graph.refs[out] = replace(ref, views=(*ref.views, view))
        graph.derived.pop(out, None)
    root = graph.same.get(source, source)
    identity = isinstance(view, Convert) and view.before == view.after
    graph.same[out] = root if identity else numbered.setdefault((root, view), out)


def given_inside(node: Node) -> list[tuple[ClosedJaxpr, tuple[Operand, ...]]]:
    """The programs inside a loop or branch, with the operand that each of their inputs starts as."""
    if node.name == "scan":
        return [(node.params["jaxpr"], node.ins)]
    if node.name == "cond":
        return [(branch, node.ins[1:]) for branch in node.params["branches"]]
    if node.name == "while":
        skip = node.params["cond_nconsts"]
        carry = node.ins[skip + node.params["body_nconsts"] :]
        return [(node.params["cond_jaxpr"], node.ins[:skip] + carry), (node.params["body_jaxpr"], node.ins[skip:])]
    return []


def _inside(node: Node, kinds: list[Kind]) -> list[Kind]:
    """What the inputs of a program inside a loop or branch are, given what its operands are."""
    if node.name == "cond":
        return kinds
    if node.name == "scan":
        split = _compat.scan_split(node.eqn)
        start, stop = split.consts, split.consts + split.carry
    else:
        stop = len(kinds)
        start = stop - (len(node.ins) - node.params["cond_nconsts"] - node.params["body_nconsts"])
    return [*kinds[:start], *map(_mixed, kinds[start:stop]), *map(_slice, kinds[stop:])]


def _kind(graph: Graph, v: Operand) -> Kind:
    if not isinstance(v, int):
        return None
    if v in graph.refs:
        return graph.refs[v]
    if v in graph.derived:
        return graph.derived[v]
    if v in graph.from_inputs:
        return "input+params" if v in graph.from_params else "input"
    return "closed" if v in graph.closed else None


def _made_of(graph: Graph, ins: list[Operand]) -> Derived:
    known = [graph.derived[v].paths for v in ins if isinstance(v, int) and v in graph.derived]
    return Derived(frozenset({ref.path for v in ins if (ref := graph.leaf(v))}).union(*known))


def _mixed(_: Kind) -> Kind:
    """A loop carry: whatever it starts as, the body may make it depend on everything."""
    return "input+params"


def _slice(kind: Kind) -> Kind:
    """What one iteration sees of an operand that is scanned over."""
    if not isinstance(kind, Ref):
        return kind
    found = first_axis(kind.views)
    if found is None:
        return Derived(frozenset({kind.path}))
    axis, views = found
    shape = (*kind.shape[:axis], *kind.shape[axis + 1 :])
    return replace(kind, shape=shape, views=views, axes=(*kind.axes, axis))


def all_graphs(graph: Graph) -> list[Graph]:
    """The graph and every loop body below it, outermost first."""
    return [graph] + [g for node in graph.nodes for body in node.bodies for g in all_graphs(body)]
