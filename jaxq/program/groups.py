"""Groups: the contractions that read the same activation, and where that activation's shift and scale can go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from jaxq.program.fold import Edit, Fold, find_fold
from jaxq.program.graph import Graph, Ref, all_graphs
from jaxq.program.patterns import output_columns
from jaxq.program.sites import Site, Skipped, find_sites
from jaxq.program.views import Broadcast, Forward, Pull, ViewError, pull, view_of


@dataclass(frozen=True)
class Member:
    """A site of a group, and the bias parameter that is added to its output, if there is one of its own."""

    site: Site
    bias: Edit | None = None


@dataclass(frozen=True)
class GroupPlan:
    """What can be known of a group without running the program.

    `name` is the first site's path (for an operand of attention: `.../dot0:lhs`). `x` is the value that is read and
    `x_axes` its channel axes, `x_shape` its shape; `start` is the node at which the group's input is complete.
    `shared` says why the group's weights cannot be changed for it alone (empty where they can).
    """

    name: str
    kind: str
    x: int
    x_axes: tuple[int, ...]
    members: tuple[Member, ...]
    start: int
    x_shape: tuple[int, ...]
    fold: Fold = field(default_factory=lambda: Fold(None, None))
    shared: str = ""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(m.site.path for m in self.members)


@dataclass(frozen=True)
class Layout:
    """One graph with its sites and groups, and the layouts of the loop bodies inside, by node and body number."""

    graph: Graph
    groups: tuple[GroupPlan, ...]
    skipped: tuple[Skipped, ...]
    bodies: dict[tuple[int, int], Layout]
    depth: int = 0

    def all(self) -> list[Layout]:
        return [self] + [x for body in self.bodies.values() for x in body.all()]


def lay_out(
    graph: Graph, uses: dict[str, int] | None = None, depth: int = 0, taken: dict[tuple, int] | None = None
) -> Layout:
    uses = parameter_uses(graph) if uses is None else uses
    taken = {} if taken is None else taken
    sites, skipped = find_sites(graph, taken)
    groups = tuple(_group(graph, uses, depth, members) for members in _same_input(graph, sites))
    bodies = {
        (node.index, i): lay_out(body, uses, depth + (node.name == "scan"), taken)
        for node in graph.nodes
        for i, body in enumerate(node.bodies)
    }
    return Layout(graph, groups, tuple(skipped), bodies, depth)


def parameter_uses(graph: Graph) -> dict[str, int]:
    """How many equations read each parameter, views aside, wherever they are."""
    uses: Counter[str] = Counter()
    for g in all_graphs(graph):
        for node in g.nodes:
            if node.bodies or (len(node.outs) == 1 and node.outs[0] in g.refs):
                continue
            uses.update(ref.path for v in node.ins if (ref := g.leaf(v)) is not None)
        uses.update(ref.path for v in g.outputs if (ref := g.leaf(v)) is not None)
    return dict(uses)


def _same_input(graph: Graph, sites: list[Site]) -> list[list[Site]]:
    """Sites by the activation that they read; attention's operands are groups of their own."""
    found: dict[tuple, list[Site]] = {}
    for site in sites:
        if site.kind == "attention":
            for side in (0, 1):
                flipped = replace(site.operands, x=side, w=1 - side)
                found[site.path, side] = [replace(site, operands=flipped if side else site.operands)]
        elif site.kind == "lookup":
            found[site.path, "lookup", site.node] = [site]
        else:
            x = graph.nodes[site.node].ins[site.operands.x]
            assert isinstance(x, int)
            found.setdefault((graph.root(x), site.operands.x_axes, site.kind), []).append(site)
    return list(found.values())


def _group(graph: Graph, uses: dict[str, int], depth: int, sites: list[Site]) -> GroupPlan:
    first = sites[0]
    node = graph.nodes[first.node]
    side = first.operands.x
    x = node.ins[side]
    assert isinstance(x, int)
    shape = tuple(graph.avals[x].shape)
    if first.kind == "lookup":
        return GroupPlan(first.path, "lookup", x, (), (Member(first),), first.node, shape)
    if first.kind == "attention":
        axes = node.params["dimension_numbers"][0][side]
        name = f"{first.path}:{'rhs' if side else 'lhs'}"
        return GroupPlan(name, "attention", x, tuple(axes), (Member(first),), first.node, shape)
    axes = first.operands.x_axes
    spread = tuple(n if i in axes else 1 for i, n in enumerate(shape))
    fold = find_fold(graph, x, spread, uses, depth, len(sites))
    members = tuple(Member(site, _find_bias(graph, uses, depth, site)) for site in sites)
    shared = next(filter(None, (_why_shared(site.ref, uses, depth) for site in sites)), "")
    if shared:
        fold = replace(fold, scale=None, shift=None, scale_reason=shared, shift_reason=shared)
    elif first.kind == "conv":
        fold = replace(fold, shift=None, shift_reason="a shift is not exact at a convolution's padding")
    return GroupPlan(first.path, first.kind, x, axes, members, first.node, shape, fold, shared)


def _why_shared(ref: Ref | None, uses: dict[str, int], depth: int) -> str:
    """Why a parameter cannot be changed for one group alone; empty if it can."""
    if ref is not None and uses.get(ref.path, 0) > 1:
        return f"{ref.path} is used in {uses[ref.path]} places"
    return f"{ref.path} is shared by all layers of a scan" if ref is not None and ref.depth != depth else ""


def _find_bias(graph: Graph, uses: dict[str, int], depth: int, site: Site) -> Edit | None:
    """The parameter added to a contraction's output, through views and with no other reader on the way."""
    if site.kind != "linear":
        return None
    node, readers = graph.nodes[site.node], graph.consumers
    outputs = {graph.root(v) for v in graph.outputs if isinstance(v, int)}
    v, chain = node.outs[0], ()
    while True:
        after = readers.get(v, [])
        if len(after) != 1 or v in outputs:
            return None
        step = after[0]
        view = view_of(step.name, step.params, graph.avals[v], graph.avals[step.outs[0]])
        if view is None:
            break
        v, chain = step.outs[0], (*chain, Forward(view))
    if step.name != "add":
        return None
    other = next((o for o in step.ins if isinstance(o, int) and graph.root(o) != v), None)
    ref, pulls = (None, ()) if other is None else _bias_leaf(graph, other, chain)
    if ref is None or _why_shared(ref, uses, depth) or not _takes(graph, ref, pulls, site):
        return None
    return Edit(ref.path, pulls)


def _bias_leaf(graph: Graph, v: int, chain: tuple[Pull, ...]) -> tuple[Ref | None, tuple[Pull, ...]]:
    node = graph.producer.get(v)
    if v not in graph.refs and node is not None and node.name == "broadcast_in_dim" and isinstance(node.ins[0], int):
        after = tuple(graph.avals[v].shape)
        before = tuple(graph.avals[node.ins[0]].shape)
        chain = (*chain, Broadcast(tuple(node.params["broadcast_dimensions"]), before, after))
        v = node.ins[0]
    ref = graph.refs.get(v)
    return ref, (*chain, *reversed(ref.views)) if ref else ()


def _takes(graph: Graph, ref: Ref, pulls: tuple[Pull, ...], site: Site) -> bool:
    """Whether the bias has one value for each output channel, so that any vector can be added to it."""
    node = graph.nodes[site.node]
    shape = graph.avals[node.outs[0]].shape
    out = [i for i in output_columns(graph, node, site.operands.w).out if i is not None]
    probe = np.ones([n if i in out else 1 for i, n in enumerate(shape)])
    try:
        return pull(pulls, probe).shape == ref.shape
    except ViewError:
        return False


def skipped_in(layout: Layout) -> list[Skipped]:
    return [s for part in layout.all() for s in part.skipped]
