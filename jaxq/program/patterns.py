"""What an equation is to a vector that belongs to its result's channels: a view, a part, a contraction's columns."""

from __future__ import annotations

import numpy as np

from jaxq.program.graph import Const, Graph, Node, Operand
from jaxq.program.views import Broadcast, Columns, Convert, Part, Pull, Transpose, view_of


def one_step(graph: Graph, node: Node) -> Pull | None:
    """The view that an equation is, a broadcast among them."""
    if not node.ins or not isinstance(node.ins[0], int):
        return None
    before, after = graph.avals[node.ins[0]], graph.avals[node.outs[0]]
    if node.name == "broadcast_in_dim" and before.size != after.size:
        return Broadcast(tuple(node.params["broadcast_dimensions"]), tuple(before.shape), tuple(after.shape))
    return view_of(node.name, node.params, before, after)


def part_of(graph: Graph, node: Node, v: Operand, fill: float) -> Part | None:
    """One output of a split, as of q, k and v made by one contraction."""
    if node.name != "split":
        return None
    axis, sizes = node.params["axis"], node.params["sizes"]
    start = sum(sizes[: node.outs.index(v)])
    return Part(axis, start, start + graph.shape(v)[axis], sum(sizes), fill)


def weight_columns(graph: Graph, node: Node) -> tuple[int, Columns] | None:
    """The weight operand of a contraction with a parameter, and its axes among the output's."""
    for w in (1, 0):
        if graph.leaf(node.ins[w]) is not None and graph.is_activation(node.ins[1 - w]):
            return w, output_columns(graph, node, w)
    return None


def output_columns(graph: Graph, node: Node, w: int) -> Columns:
    (contract, batch) = node.params["dimension_numbers"]
    ndim = len(graph.shape(node.ins[w]))
    other = len(graph.shape(node.ins[1 - w])) - len(contract[1 - w]) - len(batch[1 - w])
    free = [i for i in range(ndim) if i not in contract[w] and i not in batch[w]]
    start = len(batch[w]) + (other if w == 1 else 0)
    where = {i: k for k, i in enumerate(batch[w])} | {i: start + k for k, i in enumerate(free)}
    return Columns(tuple(where.get(i) for i in range(ndim)))


def sums_to_one(graph: Graph, v: Operand, axes: tuple[int, ...]) -> bool:
    """Whether `v` is e / sum(e) over just these axes, as a softmax ends."""
    while isinstance(v, int) and (node := graph.producer.get(v)) is not None and node.name != "div":
        step = one_step(graph, node)
        if isinstance(step, Transpose):
            axes = tuple(step.permutation[i] for i in axes)
        elif not isinstance(step, Convert):
            return False
        v = node.ins[0]
    if not isinstance(v, int) or v not in graph.producer:
        return False
    above, below = graph.producer[v].ins
    spread = graph.producer.get(below) if isinstance(below, int) else None
    total = graph.producer.get(spread.ins[0]) if spread is not None and isinstance(spread.ins[0], int) else None
    if spread is None or total is None or (spread.name, total.name) != ("broadcast_in_dim", "reduce_sum"):
        return False
    kept = tuple(i for i in range(len(graph.shape(above))) if i not in axes)
    same = total.ins[0] == above and set(total.params["axes"]) == set(axes)
    return same and tuple(spread.params["broadcast_dimensions"]) == kept


def is_zero(graph: Graph, v: Operand) -> bool:
    """Whether `v` is a constant 0, as relu's other operand."""
    if isinstance(v, int) and v not in graph.consts:
        node = graph.producer.get(v)
        return node is not None and node.name == "broadcast_in_dim" and is_zero(graph, node.ins[0])
    value = np.asarray(v.value if isinstance(v, Const) else graph.consts[v])
    return value.size > 0 and not value.any()
