"""Which axes of each value run over the batch and over the tokens, so that padding can be left out of statistics.

Labels: "b" (batch), "t" (tokens), "bt" (both, merged by a reshape), None (anything else).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.program._compat import scan_split
from jaxq.program.graph import Graph, Node, Operand
from jaxq.program.views import factor_groups

Labels = tuple[str | None, ...]


def label(graph: Graph, inputs: list[Labels]) -> tuple[dict[int, Labels], dict[int, list[Labels]]]:
    """The labels of every value of a graph, given those of its inputs; and, by scan node, the body's inputs'."""
    labels = dict(zip(graph.inputs, inputs, strict=True))
    bodies: dict[int, list[Labels]] = {}
    for node in graph.nodes:
        got = [_get(graph, labels, v) for v in node.ins]
        if node.name == "scan":
            outs, bodies[node.index] = _scan(graph, node, got)
        elif node.name == "cond":
            bodies[node.index] = got[1:]
            inner, _ = label(node.bodies[0], got[1:])
            outs = [_get(node.bodies[0], inner, v) for v in node.bodies[0].outputs]
        else:
            outs = [_follow(graph, node, got, v) for v in node.outs]
        labels.update(zip(node.outs, outs, strict=True))
    return labels, bodies


def _get(graph: Graph, labels: dict[int, Labels], v: Operand) -> Labels:
    if isinstance(v, int):
        return labels.get(v, (None,) * len(graph.avals[v].shape))
    return (None,) * jnp.ndim(v.value)


def _scan(graph: Graph, node: Node, got: list[Labels]) -> tuple[list[Labels], list[Labels]]:
    split, body = scan_split(node.eqn), node.bodies[0]
    outside = split.consts + split.carry
    inside = got[:outside] + [x[1:] for x in got[outside:]]
    inner, _ = label(body, inside)
    outs = [_get(body, inner, v) for v in body.outputs]
    return outs[: split.carry] + [(None, *x) for x in outs[split.carry :]], inside


def _follow(graph: Graph, node: Node, got: list[Labels], out: int) -> Labels:
    shape = graph.avals[out].shape
    rule: Callable | None = RULES.get(node.name)
    if rule is not None:
        return rule(graph, node, got, shape)
    if node.name.startswith(("reduce_", "arg")) and "axes" in node.params:
        return tuple(x for i, x in enumerate(got[0]) if i not in node.params["axes"])
    return _same_rank(graph, node, got, shape)


def _same_rank(graph: Graph, node: Node, got: list[Labels], shape: tuple[int, ...]) -> Labels:
    """Elementwise operations, slices, cumulative sums: an axis of unchanged size is the same axis."""
    result: list[str | None] = [None] * len(shape)
    for v, labels in zip(node.ins, got, strict=True):
        size = graph.shape(v)
        if len(size) == len(shape):
            result = [x or (y if n == m else None) for x, y, n, m in zip(result, labels, size, shape)]
    return tuple(result)


def _broadcast(_: Graph, node: Node, got: list[Labels], shape: tuple[int, ...]) -> Labels:
    result: list[str | None] = [None] * len(shape)
    for axis, x in zip(node.params["broadcast_dimensions"], got[0]):
        result[axis] = x
    return tuple(result)


def _transpose(_: Graph, node: Node, got: list[Labels], __: tuple[int, ...]) -> Labels:
    return tuple(got[0][i] for i in node.params["permutation"])


def _reshape(graph: Graph, node: Node, got: list[Labels], shape: tuple[int, ...]) -> Labels:
    before = graph.shape(node.ins[0])
    result: list[str | None] = [None] * len(shape)
    for ours, theirs in factor_groups(before, tuple(shape)):
        old = [(got[0][i], before[i]) for i in ours if before[i] > 1 or got[0][i]]
        new = [j for j in theirs if shape[j] > 1] or list(theirs)
        if len(old) == 1 and len(new) == 1:
            result[new[0]] = old[0][0]
        elif [x for x, _ in old] == ["b", "t"] and len(new) == 1:
            result[new[0]] = "bt"
        elif [x for x, _ in old] == ["bt"] and len(new) == 2:
            result[new[0]], result[new[1]] = "b", "t"
        elif prod(n for _, n in old) == 1:
            for j, (x, _) in zip(theirs, old):
                result[j] = x
    return tuple(result)


def _dot(_: Graph, node: Node, got: list[Labels], __: tuple[int, ...]) -> Labels:
    contract, batch = node.params["dimension_numbers"]
    free = [[x for i, x in enumerate(got[side]) if i not in contract[side] and i not in batch[side]] for side in (0, 1)]
    return (*(got[0][i] or got[1][j] for i, j in zip(*batch)), *free[0], *free[1])


def _gather(graph: Graph, node: Node, got: list[Labels], shape: tuple[int, ...]) -> Labels:
    """A look-up: the indices' axes (all but the last) are the output's axes that are not rows of the table."""
    offset = node.params["dimension_numbers"].offset_dims
    index = iter(got[1][:-1])
    return tuple(None if i in offset else next(index, None) for i in range(len(shape)))


def _ragged(_: Graph, node: Node, got: list[Labels], shape: tuple[int, ...]) -> Labels:
    return (*got[0][:-1], None)[-len(shape) :]


def _nothing(_: Graph, __: Node, ___: list[Labels], shape: tuple[int, ...]) -> Labels:
    return (None,) * len(shape)


RULES: dict[str, Any] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "gather": _gather,
    "conv_general_dilated": lambda graph, node, got, shape: (got[0][0], *(None,) * (len(shape) - 1)),
    "iota": _nothing,
    "while": _nothing,
}


def spread_mask(mask: jax.Array, labels: Labels) -> jax.Array | None:
    """A mask `[batch, tokens]` as a bool array that broadcasts against a value; None if the value has no such axes."""
    shape = [1] * len(labels)
    if "bt" in labels:
        shape[labels.index("bt")] = mask.size
    elif "b" in labels and "t" in labels:
        b, t = labels.index("b"), labels.index("t")
        shape[b], shape[t] = mask.shape
        mask = mask if b < t else mask.T
    else:
        return None
    return mask.astype(bool).reshape(shape)
