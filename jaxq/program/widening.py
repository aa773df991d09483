"""Parameters in half precision that a function reads as float32 only: they count as float32, and stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.arrays import HALF
from jaxq.program import _compat
from jaxq.program.graph import Const, Graph, all_graphs, given_inside
from jaxq.program.segments import stand_in


class Widened:
    """A half-precision parameter as the float32 array that it is to its function: converted whenever it is read, so
    that what is in memory, or mapped, is half of it."""

    def __init__(self, leaf: Any) -> None:
        self.leaf, self.shape, self.ndim, self.size = leaf, leaf.shape, leaf.ndim, leaf.size
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, index: Any) -> Widened:
        return Widened(self.leaf[index])

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self.leaf).astype(self.dtype)

    def abstract(self) -> jax.ShapeDtypeStruct:
        return _compat.shape_of(self.leaf, self.dtype)


def only_widened(graph: Graph) -> set[str]:
    """The half-precision parameters that a program casts to float32 wherever it reads them, views aside."""
    reads = [read for part in all_graphs(graph) for read in _reads(part)]
    return {path for path, to in reads if to == "float32"} - {path for path, to in reads if to == "other"}


def _reads(graph: Graph) -> Iterator[tuple[str, str]]:
    """Each read of a half-precision parameter in a graph, and what it is made: "float32", "same" or "other"."""
    half = {v: ref.path for v, ref in graph.refs.items() if graph.avals[v].dtype in HALF}
    for node in graph.nodes:
        for body, (_, operands) in zip(node.bodies, given_inside(node)):
            for v, inner in zip(operands, body.inputs, strict=True):
                if isinstance(v, int) and v in half:
                    yield half[v], "same" if inner in body.refs else "other"
        for v in node.ins if not node.bodies else ():
            if isinstance(v, int) and v in half:
                out = graph.avals[node.outs[0]].dtype if node.outs[0] in graph.refs else None
                yield half[v], "same" if out == graph.avals[v].dtype else "float32" if out == np.float32 else "other"
    yield from ((half[v], "other") for v in graph.outputs if isinstance(v, int) and v in half)


def same_but_views(one: Graph, other: Graph) -> bool:
    """Whether two programs compute the same, but for the views (casts among them) in which they read parameters."""
    ours, theirs = all_graphs(one), all_graphs(other)
    return len(ours) == len(theirs) and all(_computed(a) == _computed(b) for a, b in zip(ours, theirs))


def _computed(graph: Graph) -> list[Any]:
    """What a graph computes that is no view of a parameter."""
    nodes = [node for node in graph.nodes if not any(v in graph.refs for v in node.outs)]
    return [
        (
            node.name,
            [(graph.avals[v].shape, graph.avals[v].dtype) for v in node.outs],
            [stand_in(v) for v in node.ins if isinstance(v, Const)],
        )
        for node in nodes
    ]
