"""Tracing a forward function: every parameter known by its path in the pytree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jaxq.program import _compat
from jaxq.program.graph import Ref, build
from jaxq.program.groups import Layout, lay_out
from jaxq.program.widening import Widened, only_widened, same_but_views
from jaxq.qtensor import Packed, is_qtensor


@dataclass(frozen=True)
class Program:
    """A traced forward function: `closed` takes the parameters' leaves, in the order of `paths`, then the inputs'."""

    closed: ClosedJaxpr
    paths: tuple[str, ...]
    layout: Layout
    out_tree: Any


def path_name(keys: tuple[Any, ...]) -> str:
    """`blocks/3/attn/q/kernel`, whatever containers hold it; NNX's `.value` at the end is left away."""
    names = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys]
    if len(names) > 1 and getattr(keys[-1], "name", None) in ("value", "raw_value"):
        names = names[:-1]
    return "/".join(names)


def named_leaves(params: Any) -> list[tuple[str, Any]]:
    """The leaves of a parameter tree (a `QTensor` is one leaf) with their paths."""
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    return [(path_name(keys), leaf) for keys, leaf in found]


def replace_leaves(params: Any, leaves: dict[str, Any]) -> Any:
    """The tree with the leaves at the given paths replaced."""

    def new(keys: tuple[Any, ...], leaf: Any) -> Any:
        return leaves.get(path_name(keys), leaf)

    return jax.tree_util.tree_map_with_path(new, params, is_leaf=is_qtensor)


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The logical shape and dtype of a leaf, without reading it."""
    if isinstance(leaf, Packed):
        first = _compat.shape_of(leaf.planes[0], leaf.dtype)
        under_mesh = getattr(first, "sharding", None) is not None
        return jax.eval_shape(leaf.dequantize) if under_mesh else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if is_qtensor(leaf):
        return _compat.shape_of(leaf.codes, leaf.dtype)
    if isinstance(leaf, Widened):
        return leaf.abstract()
    if isinstance(leaf, jax.Array):
        return _compat.shape_of(leaf, leaf.dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    array = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def trace(forward: Callable, params: Any, *inputs: Any) -> Program:
    """Traces `forward(params, *inputs)` on shapes alone."""
    shapes = jax.tree.map(abstract, params, is_leaf=is_qtensor)
    paths = tuple(path for path, _ in named_leaves(shapes))
    twice = {p for p in paths if paths.count(p) > 1} if len(set(paths)) < len(paths) else None
    if twice:
        raise ValueError(f"two parameters share the path {sorted(twice)[0]!r}: rename one")
    if marked := [p for p in paths if "#" in p]:
        raise ValueError(f"the parameter {marked[0]!r} has a # in its path, which numbers a weight's uses: rename it")
    in_shapes = jax.tree.map(abstract, inputs)
    closed, out_shape = jax.make_jaxpr(forward, return_shape=True)(shapes, *in_shapes)
    count = len(closed.jaxpr.invars) - len(paths)
    kinds = [Ref(path, tuple(aval.shape)) for path, aval in zip(paths, closed.in_avals)] + ["input"] * count
    return Program(closed, paths, lay_out(build(closed, kinds)), jax.tree.structure(out_shape))


def trace_to_edit(forward: Callable, params: Any, *inputs: Any) -> tuple[Program, dict[str, Any]]:
    """`trace`, and the leaves by path, of a function whose parameters are going to be changed.

    Half-precision arrays that the function reads as float32 only are `Widened`, and the program is that of float32
    ones: what is written in their place need not be rounded to half precision. Not so where the function does something
    else with float32 ones than to leave out the casts, since it asks for their types.
    """
    program, leaves = trace(forward, params, *inputs), dict(named_leaves(params))
    paths = [path for path in only_widened(program.layout.graph) if not is_qtensor(leaves[path])]
    if not paths:
        return program, leaves
    widened = {path: Widened(leaves[path]) for path in paths}
    wide = trace(forward, replace_leaves(params, widened), *inputs)
    if not same_but_views(program.layout.graph, wide.layout.graph):
        return program, leaves
    return wide, leaves | widened
