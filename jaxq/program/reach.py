"""What a group's outputs flow into: the nodes up to the next site's input, and those that a fold would change."""

from __future__ import annotations

from jaxq.program.graph import Graph, Node
from jaxq.program.groups import GroupPlan, Layout

MEETS_WEIGHT = ("linear", "conv", "ragged")


def member_outputs(layout: Layout, plan: GroupPlan) -> list[int]:
    return [layout.graph.nodes[m.site.node].outs[0] for m in plan.members]


def member_inputs(layout: Layout, plan: GroupPlan) -> list[int]:
    """The activation as each member reads it: one value, under as many numbers as there are casts or reshapes."""
    operands = [(layout.graph.nodes[m.site.node].ins, m.site.operands.x) for m in plan.members]
    return [ins[x] for ins, x in operands if isinstance(ins[x], int)]  # type: ignore[misc]


def next_input(layout: Layout, plan: GroupPlan) -> int | None:
    """The activation of the first contraction with a weight that the group's outputs reach (OS+'s attention output
    for q, k and v; `act(gate) * up` for gate and up); None if they leave the program or enter a loop before."""
    reads = {
        m.site.node: layout.graph.nodes[m.site.node].ins[m.site.operands.x]
        for group in layout.groups
        if group.kind in MEETS_WEIGHT
        for m in group.members
    }
    own = {m.site.node for m in plan.members}
    reached = set(member_outputs(layout, plan))
    for node in layout.graph.nodes[plan.start :]:
        if node.index in own:
            continue
        touched = any(v in reached for v in node.ins if isinstance(v, int))
        if node.index in reads and reads[node.index] in reached:
            target = reads[node.index]
            return target if isinstance(target, int) else None
        if touched and node.bodies:
            return None
        if touched and node.index not in reads:
            reached.update(node.outs)
    return None


def view_nodes(graph: Graph) -> list[Node]:
    """Nodes that only look at a parameter: re-run where needed, never stored, since the parameter may change."""
    return [n for n in graph.nodes if len(n.outs) == 1 and n.outs[0] in graph.refs]


def depends_on(graph: Graph, paths: tuple[str, ...], before: int) -> set[int]:
    """The values, made before a node, that the parameters at `paths` influence."""
    found = {v for v, ref in graph.refs.items() if ref.path in paths}
    for node in graph.nodes[:before]:
        if any(v in found for v in node.ins if isinstance(v, int)):
            found.update(node.outs)
    return found
