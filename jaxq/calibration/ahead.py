"""Compiling ahead of the walk: a rehearsal on shapes alone says what it will call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxq.calibration.handle import applied, input_quant, leaf_path, tokens
from jaxq.calibration.stages import Stage, run
from jaxq.program._compat import quick_jit
from jaxq.program.groups import GroupPlan
from jaxq.program.trace import abstract
from jaxq.program.views import View, look
from jaxq.qtensor import Packed, QTensor, is_qtensor
from jaxq.steps.group import Group

if TYPE_CHECKING:
    from jaxq.calibration.walk import Place

THREADS = 2


class Ahead:
    """Calls compiled functions; what has been rehearsed is compiled on other threads, in the order of the rehearsal.

    XLA compiles without Python's lock, so that the walk goes on meanwhile. What turns out otherwise (a bias where there
    was none) is compiled when it is called. `placed`: whether arrays are committed to devices; where values will be is
    not known ahead then, and nothing is rehearsed.
    """

    def __init__(self, placed: bool) -> None:
        self.placed = placed
        self._pool = ThreadPoolExecutor(THREADS)
        self._begun: dict[tuple, tuple[Any, Future]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, f: Callable, *args: Any) -> Any:
        """`f(*args)`, once it is compiled; should that have failed, it fails again here."""
        if begun := self._begun.get(_key(f, args)):
            wait([begun[1]])
        return f(*args)

    def rehearse(self, f: Any, *args: Any) -> Any:
        """The shapes of `f(*args)`, a jitted function of shapes, which begins to be compiled for them."""
        key = _key(f, args)
        if key not in self._begun:
            # Lowered here: what `with jax.default_matmul_precision(...)` and the like say is for this thread alone.
            lowered = f.lower(*args)
            self._begun[key] = lowered.out_info, self._pool.submit(lowered.compile)
        return self._begun[key][0]


def _key(f: Callable, args: tuple) -> tuple:
    leaves, tree = jax.tree.flatten(args)
    return f, tree, tuple((a.shape, a.dtype) if hasattr(a, "shape") else a for a in leaves)


@quick_jit(static_argnums=1)
def decoded(leaf: QTensor | Packed, views: tuple[View, ...]) -> jax.Array:
    return look(views, leaf.dequantize())


def rehearse(place: Place, plan: Sequence[Stage]) -> None:
    """Begins to compile what the walk of one graph will call, as far as its steps can be rehearsed."""
    if place.walk.ahead.placed:
        return
    graph, call = place.layout.graph, place.walk.ahead.rehearse
    leaves, quants = {path: abstract(leaf) for path, leaf in place.leaves.current.items()}, {}

    def shape(v: int) -> Any:
        aval = graph.avals[v]
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)

    for stage in plan:
        if stage.segment is not None:
            reads = [graph.refs[v] for v in stage.segment.reads if v in graph.refs]
            for leaf, views in ((leaves[ref.path], ref.views) for ref in reads) if place.walk.quantized else ():
                if is_qtensor(leaf):
                    call(decoded(), leaf, views)
            inputs = [quants[r.group.name](shape(r.x)) for r in stage.reads]
            values = [shape(v) for v in stage.segment.reads]
            call(run(), stage.segment, stage.where, values, inputs, [None] * len(inputs))
        for group in stage.groups:
            x = shape(group.x)
            fits = jnp.issubdtype(x.dtype, jnp.floating)  # else the walk says what is wrong, when it comes here
            found = place.walk.step.rehearse(_of_shapes(place, group, x, leaves)) if fits else None
            quants[group.name] = (
                _unknown if found is None else partial(applied, call, input_quant(found), axes=group.x_axes)
            )
            if found is not None:
                leaves.update((leaf_path(path), w) for path, w in found.weights.items())


def _unknown(x: Any) -> Any:
    """The input of a group whose steps cannot be rehearsed; what they quantize has the shape and dtype of `x`."""
    return x


def _of_shapes(place: Place, plan: GroupPlan, x: Any, leaves: dict[str, Any]) -> Group:
    token_axes, valid = tokens(place, plan)
    return Group(
        plan=plan,
        spec=place.walk.spec(plan),
        x=(x,) * len(valid) if plan.kind != "lookup" else (),
        valid=valid,
        token_axes=token_axes,
        weights={m.site.path: leaves[leaf_path(m.site.path)] for m in plan.members if m.site.ref is not None},
        biases={},
        find_objectives=lambda: None,
        call=place.walk.ahead.rehearse,
    )
