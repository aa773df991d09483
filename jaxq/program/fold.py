"""Where a per-channel shift and scale can go: the query that follows an activation back to parameters.

x' = (x - z) / s is the same function when the parameters that make x take the change: a norm's scale and bias, or an
earlier contraction's columns and bias. Every value on the way must have no other reader.

Attention's output is a mean of its values, token by token: the values' columns take its scale, and where the weights of
the mean are seen to sum to one, its shift. Where several heads share their values, no column belongs to one channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from jaxq.program.graph import Const, Graph, Node, Operand
from jaxq.program.patterns import is_zero, one_step, output_columns, part_of, sums_to_one, weight_columns
from jaxq.program.views import Columns, Mixed, Pull, ViewError, pull


class Unfoldable(ValueError):
    """Why a transform has to stay at run time."""


@dataclass(frozen=True)
class Edit:
    """A parameter that takes a per-channel vector: `pulls` carry the vector from the activation to the leaf."""

    path: str
    pulls: tuple[Pull, ...]

    @property
    def columns(self) -> bool:
        """The leaf is an earlier contraction's weight (or its bias, reached the same way), not a norm's scale."""
        return any(isinstance(p, Columns) for p in self.pulls)

    @property
    def mixed(self) -> frozenset[int]:
        return frozenset(p.node for p in self.pulls if isinstance(p, Mixed))

    @property
    def to_output(self) -> tuple[Pull, ...]:
        """The part of `pulls` that leads to the output of the earlier contraction."""
        return tuple(takewhile(lambda p: not isinstance(p, Columns), self.pulls))


@dataclass(frozen=True)
class Fold:
    """Parameters to divide by s and, before that, to subtract z from; None with the reason where there is no way.

    `producer` is "norm", "linear", "attention" or None: what makes the activation, whether or not it can take the
    change; `gamma` is then the norm's scale.
    """

    scale: tuple[Edit, ...] | None
    shift: tuple[Edit, ...] | None
    scale_reason: str = ""
    shift_reason: str = ""
    producer: str | None = None
    gamma: Edit | None = None

    @property
    def mixed(self) -> frozenset[int]:
        """The contractions of two activations on the way: what they read changes with the fold."""
        return frozenset().union(*(e.mixed for e in (self.scale or ()) + (self.shift or ())))

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(e.path for e in (self.scale or ()) + (self.shift or ())))


@dataclass(frozen=True)
class Chase:
    """What a query needs to know of the program: who reads each value, how often each parameter is used."""

    graph: Graph
    readers: dict[int, list[Node]]
    uses: dict[str, int]
    depth: int
    exclusive: bool = True


def find_fold(graph: Graph, x: int, spread: tuple[int, ...], uses: dict[str, int], depth: int, members: int) -> Fold:
    """How the activation `x` (a group's `members` contractions read it) can absorb a vector of shape `spread`."""
    readers = graph.consumers
    outputs = {graph.root(v) for v in graph.outputs if isinstance(v, int)}
    probe = np.ones(spread)
    root = graph.root(x)
    shared = len(readers.get(root, [])) > members or root in outputs
    chase = Chase(graph, readers, uses, depth)
    scale, why_scale = _attempt(_scale_edits, chase, x, probe, shared)
    shift, why_shift = _attempt(_shift_edits, chase, x, probe, shared)
    loose = Chase(graph, readers, uses, depth, exclusive=False)
    source, _ = _attempt(_scale_edits, loose, x, probe, False)
    if source is None:
        return Fold(scale, shift, why_scale, why_shift)
    if any(e.mixed for e in source):
        return Fold(scale, shift, why_scale, why_shift, "attention")
    if any(e.columns for e in source):
        return Fold(scale, shift, why_scale, why_shift, "linear")
    beta, _ = _attempt(_shift_edits, loose, x, probe, False)
    gamma = next((e for e in source if e.path not in {b.path for b in beta or ()}), None)
    return Fold(scale, shift, why_scale, why_shift, "norm", gamma)


def _attempt(query, chase: Chase, x: int, probe: np.ndarray, shared: bool) -> tuple[tuple[Edit, ...] | None, str]:
    try:
        edits = tuple(query(chase, x, probe, ()))
        if shared:
            raise Unfoldable("the activation is also read outside the group (a residual, say)")
        return edits, ""
    except (Unfoldable, ViewError) as error:
        return None, str(error)


def _scale_edits(chase: Chase, v: Operand, probe: np.ndarray, pulls: tuple[Pull, ...]) -> Iterator[Edit]:
    """The edits that divide `v` by a vector."""
    graph = chase.graph
    if isinstance(v, int) and v in graph.refs:
        yield _leaf_edit(chase, v, probe, pulls)
        return
    node = _producer(chase, v)
    if (step := one_step(graph, node)) is not None or (step := part_of(graph, node, v, 1.0)) is not None:
        yield from _scale_edits(chase, _only(chase, node.ins[0]), step.backward(probe), (*pulls, step))
    elif node.name in ("add", "sub"):
        for operand in node.ins:
            yield from _scale_edits(chase, _only(chase, operand), _fit(chase, operand, probe), pulls)
    elif node.name in ("mul", "div"):
        yield from _first(chase, node.ins if node.name == "mul" else node.ins[:1], probe, pulls)
    elif node.name == "neg" or (node.name == "max" and any(is_zero(graph, o) for o in node.ins)):
        operand = next(o for o in node.ins if not is_zero(graph, o))
        yield from _scale_edits(chase, _only(chase, operand), probe, pulls)
    elif node.name == "dot_general" and (columns := weight_columns(graph, node)) is not None:
        w, step = columns
        yield from _scale_edits(chase, node.ins[w], step.backward(probe), (*pulls, step))
    elif node.name == "dot_general" and all(map(graph.is_activation, node.ins)):
        yield from _values(chase, node, probe, pulls, _scale_edits)
    else:
        raise Unfoldable(f"made by {node.name}, which does not commute with a scale")


def _shift_edits(chase: Chase, v: Operand, probe: np.ndarray, pulls: tuple[Pull, ...]) -> Iterator[Edit]:
    """The edits that subtract a vector from `v`."""
    graph = chase.graph
    if isinstance(v, int) and v in graph.refs:
        yield _leaf_edit(chase, v, probe, pulls)
        return
    node = _producer(chase, v)
    if (step := one_step(graph, node)) is not None or (step := part_of(graph, node, v, 0.0)) is not None:
        yield from _shift_edits(chase, _only(chase, node.ins[0]), step.backward(probe), (*pulls, step))
    elif node.name == "add":
        yield from _first(chase, node.ins, probe, pulls, _shift_edits)
    elif node.name == "dot_general" and all(map(graph.is_activation, node.ins)):
        yield from _values(chase, node, probe, pulls, _shift_edits)
    else:
        raise Unfoldable(f"no bias on the way: made by {node.name}")


def _first(
    chase: Chase, operands: tuple[Operand, ...], probe: np.ndarray, pulls: tuple, query=_scale_edits
) -> list[Edit]:
    """One operand suffices; a parameter is asked first."""
    reasons = []
    for operand in sorted(operands, key=lambda o: chase.graph.leaf(o) is None):
        try:
            return list(query(chase, _only(chase, operand), _fit(chase, operand, probe), pulls))
        except (Unfoldable, ViewError) as error:
            reasons.append(str(error))
    raise Unfoldable("; ".join(dict.fromkeys(reasons)))


def _values(chase: Chase, node: Node, probe: np.ndarray, pulls: tuple[Pull, ...], query) -> list[Edit]:
    """Into the operand of a contraction of two activations that has the channels: sum_s p_ts (v_sc - z_c) / s_c."""
    for side in (1, 0):
        step = Mixed(node.index, output_columns(chase.graph, node, side))
        try:
            within = step.backward(probe)
        except ViewError:
            continue
        weights, summed = node.ins[1 - side], node.params["dimension_numbers"][0][1 - side]
        if query is _shift_edits and not sums_to_one(chase.graph, weights, tuple(summed)):
            raise Unfoldable("the weights of a sum over tokens are not seen to sum to one (by a softmax)")
        return list(query(chase, _only(chase, node.ins[side]), within, (*pulls, step)))
    raise Unfoldable(f"made by {node.name} of two activations, neither of which has all channels")


def _leaf_edit(chase: Chase, v: int, probe: np.ndarray, pulls: tuple[Pull, ...]) -> Edit:
    ref = chase.graph.refs[v]
    if chase.uses.get(ref.path, 0) > 1:
        raise Unfoldable(f"{ref.path} is used in {chase.uses[ref.path]} places")
    if ref.depth != chase.depth:
        raise Unfoldable(f"{ref.path} is shared by all layers of a scan")
    shape, leaf = pull(tuple(reversed(ref.views)), probe).shape, ref.shape
    if len(leaf) != len(shape) or any(n != 1 and n != m for n, m in zip(shape, leaf)):
        raise Unfoldable(f"{ref.path} of shape {leaf} has no value of its own for each channel")
    return Edit(ref.path, (*pulls, *reversed(ref.views)))


def _producer(chase: Chase, v: Operand) -> Node:
    if isinstance(v, Const) or v in chase.graph.closed:
        raise Unfoldable("a constant of the program is on the way")
    if v not in chase.graph.producer:
        raise Unfoldable("it is an input of the program or of a loop body")
    return chase.graph.producer[v]


def _only(chase: Chase, v: Operand) -> Operand:
    """`v`, if nothing else reads it."""
    if chase.exclusive and isinstance(v, int) and v not in chase.graph.refs:
        graph, root = chase.graph, chase.graph.root(v)
        returned = [o for o in graph.outputs if isinstance(o, int) and graph.root(o) == root]
        if len(chase.readers.get(root, ())) + len(returned) > 1:
            raise Unfoldable("a value on the way is also read elsewhere")
    return v


def _fit(chase: Chase, operand: Operand, probe: np.ndarray) -> np.ndarray:
    """Elementwise operands of size 1 are broadcast without an equation of their own."""
    shape = chase.graph.avals[operand].shape if isinstance(operand, int) else np.shape(operand.value)
    if not shape or (len(shape) == probe.ndim and any(n == 1 < p for n, p in zip(shape, probe.shape))):
        raise Unfoldable("a factor with one value for all channels is on the way")
    return probe
