"""Sites: the equations where low-bit numbers meet, found in a graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import jax.numpy as jnp

from jaxq.program import _compat
from jaxq.program.graph import Const, Graph, Node, Operand, Ref
from jaxq.program.patterns import output_columns
from jaxq.program.views import Reshape, Transpose, ViewError, factor_groups

CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@dataclass(frozen=True)
class Operands:
    """Which axes an equation sums over: `x_axes[i]` of the activation meets `w_axes[i]` of the weight.

    `reduced` are all the weight's axes that one output channel sums over (a convolution's window among them).
    `columns` are the weight's axes among the output's (None where summed), known for `dot_general` only. `experts` are
    the weight's axes that the activation has too, or is divided by: every index is a weight of its own.
    """

    x: int
    w: int
    x_axes: tuple[int, ...]
    w_axes: tuple[int, ...]
    reduced: tuple[int, ...]
    columns: tuple[int | None, ...] = ()
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Site:
    """One contraction or look-up. `kind`: "linear", "conv", "ragged", "attention" (two activations) or "lookup".

    `path`: the parameter's path; for attention, the nearest common path of the parameters that feed it, plus `dot0`.
    `ref` is the weight (None for attention), `leaf_axes` the leaf's axes that one output channel sums over, `experts`
    those along which every index is a weight of its own (none where a reshape merges them with output channels).
    """

    path: str
    kind: str
    node: int
    operands: Operands
    shapes: tuple[tuple[int, ...], ...]
    ref: Ref | None = None
    leaf_axes: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A contraction that involves parameters and cannot be quantized, and why."""

    path: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    reason: str


def find_sites(graph: Graph, taken: dict[tuple, int]) -> tuple[list[Site], list[Skipped]]:
    """The sites of one graph (not of its loop bodies), in program order; `taken` counts the names of all graphs."""
    feeds = _Feeds(graph)
    sites, skipped = [], []
    for node in graph.nodes:
        found = _classify(graph, node, feeds)
        if isinstance(found, Site):
            found = replace(found, path=_unique(found, taken))
            sites.append(found)
        elif found is not None:
            skipped.append(found)
        feeds.visit(node, found if isinstance(found, Site) else None)
    return sites, skipped


def _unique(site: Site, taken: dict[tuple, int]) -> str:
    if site.kind == "lookup":
        return site.path
    key = site.path, site.kind == "attention"
    count = taken[key] = taken.get(key, -1) + 1
    if site.kind == "attention":
        return f"{site.path}/dot{count}".lstrip("/")
    return site.path if count == 0 else f"{site.path}#{count}"


def _classify(graph: Graph, node: Node, feeds: _Feeds) -> Site | Skipped | None:
    if node.name == "gather" and graph.leaf(node.ins[0]) and node.outs[0] not in graph.picked:
        return _lookup(graph, node)
    if node.name in CONTRACTIONS:
        return _contraction(graph, node, feeds)
    if not node.bodies:
        return _opaque(graph, node, feeds)
    return None


def _contraction(graph: Graph, node: Node, feeds: _Feeds) -> Site | Skipped | None:
    left, right = node.ins[0], node.ins[1]
    shapes = (graph.shape(left), graph.shape(right), tuple(graph.avals[node.outs[0]].shape))
    floating = all(_is_float(graph, v) for v in (left, right))
    for x, w in ((0, 1), (1, 0)):
        ref = graph.leaf(node.ins[w])
        if ref and graph.is_activation(node.ins[x]):
            return _linear(graph, node, ref, x, w, shapes)
    if not floating:
        return None
    if any(_of_params(graph, v) for v in (left, right)):
        return Skipped(feeds.all_paths(left, right), node.name, shapes, _why_left_out(graph, (left, right)))
    if all(graph.is_activation(v) and v in graph.from_params for v in (left, right)):
        operands = _operands(node, 0, 1)
        if operands.x_axes and node.name == "dot_general":
            return Site(feeds.name(left, right), "attention", node.index, operands, shapes)
    closed_over = any(_is_closed(graph, v) and len(graph.shape(v)) > 1 for v in (left, right))
    if closed_over and any(graph.is_activation(v) for v in (left, right)):
        return Skipped("(closed over)", node.name, shapes, "the weight is closed over: pass it in the params")
    return None


def _why_left_out(graph: Graph, operands: tuple[Operand, Operand]) -> str:
    """Why a contraction with a parameter, or with what is made of some, is none that can be quantized."""
    if all(_of_params(graph, v) for v in operands):
        return "both operands are parameters: no activation to calibrate on"
    if not any(graph.is_activation(v) for v in operands):
        return "the other operand is a constant of the program: no activation to calibrate on"
    if any(isinstance(v, int) and v in graph.picked for v in operands):
        return "the weight is picked by a traced index: scan over it"
    derived = [v for v in operands if isinstance(v, int) and graph.is_derived(v) and v in graph.producer]
    made = next((graph.producer[v].name for v in derived), None)
    if made is None:
        return "the weight is computed from parameters before the loop, or a reshape merges its layers with others"
    return f"the weight is computed from parameters (by {made}), not one itself"


def _of_params(graph: Graph, v: Operand) -> bool:
    """A parameter, what is made of some alone, or a piece of one picked by an index that may depend on the inputs."""
    return graph.leaf(v) is not None or graph.is_derived(v) or (isinstance(v, int) and v in graph.picked)


def _is_closed(graph: Graph, v: Operand) -> bool:
    return isinstance(v, Const) or v in graph.closed


def _linear(graph: Graph, node: Node, ref: Ref, x: int, w: int, shapes: tuple) -> Site | Skipped:
    kind = {"dot_general": "linear", "conv_general_dilated": "conv", "ragged_dot_general": "ragged"}[node.name]
    if not _is_float(graph, node.ins[w]):
        return Skipped(ref.path, kind, shapes, f"the weight has dtype {_dtype(graph, node.ins[w])}, not a float")
    if node.name != "dot_general" and w == 0:
        return Skipped(ref.path, kind, shapes, "the parameter is the contraction's left operand")
    operands = _operands(node, x, w)
    if node.name == "dot_general":
        operands = replace(operands, columns=output_columns(graph, node, w).out)
    if not operands.x_axes:
        return Skipped(ref.path, kind, shapes, "an outer product: nothing is summed over")
    try:
        leaf_axes = leaf_axes_of(ref, operands.reduced, len(shapes[w]))
    except ViewError as error:
        return Skipped(ref.path, kind, shapes, str(error))
    return Site(ref.path, kind, node.index, operands, shapes, ref, leaf_axes, _experts(ref, operands, len(shapes[w])))


def _experts(ref: Ref, operands: Operands, ndim: int) -> tuple[int, ...]:
    try:
        return leaf_axes_of(ref, operands.experts, ndim)
    except ViewError:
        return ()


def _lookup(graph: Graph, node: Node) -> Site | None:
    ref = graph.leaf(node.ins[0])
    assert ref is not None
    shape = graph.shape(node.ins[0])
    if len(shape) < 2 or not _is_float(graph, node.ins[0]):
        return None
    rows = tuple(node.params["dimension_numbers"].start_index_map)
    summed = tuple(i for i in range(len(shape)) if i not in rows)
    try:
        leaf_axes = leaf_axes_of(ref, summed, len(shape))
    except ViewError:
        return None
    shapes = (graph.shape(node.ins[1]), shape, tuple(graph.avals[node.outs[0]].shape))
    return Site(ref.path, "lookup", node.index, Operands(1, 0, (), (), summed), shapes, ref, leaf_axes)


def _opaque(graph: Graph, node: Node, feeds: _Feeds) -> Skipped | None:
    """A primitive that jaxq does not open (shard_map, pallas_call, ...) and that reads a parameter."""
    inner = _compat.nested_jaxprs(node.eqn)
    weights = [v for v in node.ins if _of_params(graph, v) and len(graph.shape(v)) > 1]
    if not inner or not weights or not any(_contracts(c) for c in inner):
        return None
    shapes = tuple(graph.shape(v) for v in node.ins)
    return Skipped(
        feeds.all_paths(*weights), node.name, shapes, f"a contraction inside {node.name}, which jaxq does not open"
    )


def _contracts(closed: Any) -> bool:
    eqns = closed.jaxpr.eqns
    return any(e.primitive.name in CONTRACTIONS or any(map(_contracts, _compat.nested_jaxprs(e))) for e in eqns)


def _operands(node: Node, x: int, w: int) -> Operands:
    if node.name == "conv_general_dilated":
        dims = node.params["dimension_numbers"]
        out = {dims.rhs_spec[0]}
        reduced = tuple(i for i in range(len(dims.rhs_spec)) if i not in out)
        grouped = node.params["feature_group_count"] > 1 or node.params["batch_group_count"] > 1
        channel = () if grouped else (dims.rhs_spec[1],)
        return Operands(0, 1, (dims.lhs_spec[1],), channel, reduced)
    ragged = node.name == "ragged_dot_general"
    numbers = (
        node.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        if ragged
        else node.params["dimension_numbers"]
    )
    contract, batch = numbers
    experts = tuple(batch[w])
    if ragged:
        experts += tuple(node.params["ragged_dot_dimension_numbers"].rhs_group_dimensions)
    pairs = sorted(zip(contract[x], contract[w]))  # as they lie in x, so that its blocks run along its innermost axis
    x_axes, w_axes = tuple(i for i, _ in pairs), tuple(j for _, j in pairs)
    return Operands(x, w, x_axes, w_axes, w_axes, experts=experts)


def leaf_axes_of(ref: Ref, axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The leaf's axes that `axes` of its view are; ViewError if a reshape mixes them with others."""
    marked = [i in axes for i in range(ndim)]
    for view in reversed(ref.views):
        if isinstance(view, Transpose):
            marked = [marked[view.permutation.index(i)] for i in range(len(marked))]
        elif isinstance(view, Reshape):
            marked = _unmark(marked, view)
    return tuple(i for i, m in enumerate(marked) if m)


def _unmark(marked: list[bool], view: Reshape) -> list[bool]:
    before = [False] * len(view.before)
    for ours, theirs in factor_groups(view.before, view.after):
        inside = {marked[j] for j in theirs if view.after[j] > 1}
        if len(inside) > 1:
            raise ViewError(f"a reshape {view.before} -> {view.after} mixes summed and output channels in one axis")
        for i in ours:
            before[i] = inside == {True}
    return before


class _Feeds:
    """Which parameters feed each value since the last linear site: what names attention's contractions."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.paths: dict[int, frozenset[str]] = {}

    def of(self, v: Operand) -> frozenset[str]:
        if not isinstance(v, int):
            return frozenset()
        if v in self.graph.refs:
            return frozenset({self.graph.refs[v].path})
        if v in self.graph.derived:
            return self.graph.derived[v].paths
        return self.paths.get(v, frozenset())

    def visit(self, node: Node, site: Site | None) -> None:
        if site is not None and site.ref is not None:
            paths = frozenset({site.ref.path})
        else:
            paths = frozenset().union(*(self.of(v) for v in node.ins))
        self.paths.update((v, paths) for v in node.outs)

    def name(self, *operands: Operand) -> str:
        """The nearest common path: of q's and k's kernels, the attention block that holds both."""
        paths = sorted(frozenset().union(*(self.of(v) for v in operands)))
        if len(paths) == 1:
            return paths[0].rpartition("/")[0] or paths[0]
        return commonpath(paths)

    def all_paths(self, *operands: Operand) -> str:
        """The parameters that an operand is or is made of, one by one."""
        made = [v for v in operands if _of_params(self.graph, v)]
        return ", ".join(sorted(frozenset().union(*(self.of(v) for v in made))))


def commonpath(paths: list[str]) -> str:
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*(p.split("/") for p in paths)))
    return "/".join(names[0] for names in shared)


def _is_float(graph: Graph, v: Operand) -> bool:
    return bool(jnp.issubdtype(_dtype(graph, v), jnp.floating))


def _dtype(graph: Graph, v: Operand) -> Any:
    return graph.avals[v].dtype if isinstance(v, int) else jnp.result_type(v.value)
