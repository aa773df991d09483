"""Folding equivalent transforms into parameters: x' = (x - z) / s, written into what makes x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.contraction import along
from jaxq.program.graph import Node
from jaxq.program.groups import GroupPlan, Layout
from jaxq.program.trace import replace_leaves, trace_to_edit
from jaxq.program.views import pull
from jaxq.qtensor import InputQuant, Packed, QTensor, Quantized, Transform, is_qtensor
from jaxq.steps.group import through

Leaves = dict[str, Any]


class FoldError(ValueError):
    """A fold changed the function: the numeric proof after it failed."""


def divided(leaf: Any, v: jax.Array) -> Any:
    """A leaf over a spread vector; a quantized one keeps its codes and divides its scales (exact: only its output
    channels are concerned)."""
    if is_qtensor(leaf):
        name = "stored" if isinstance(leaf, Packed) else "grid"
        grid = getattr(leaf, name)
        coarsest = "scale" if grid.outer is None else "outer"  # a block's scale stays a number of few bits
        factor = getattr(grid, coarsest) / v.astype(jnp.float32)
        return replace(leaf, **{name: replace(grid, **{coarsest: factor})})
    return jnp.asarray(leaf) / v.astype(leaf.dtype)


def absorb(plan: GroupPlan, leaves: Leaves, transform: Transform) -> tuple[Leaves, Transform]:
    """The producer's parameters after they took as much of the transform as they can, and what is left of it."""
    z, s = transform.shift, transform.scale
    changed: Leaves = {}
    ndim = len(plan.x_shape)
    if z is not None and plan.fold.shift is not None:
        for edit in plan.fold.shift:
            leaf = jnp.asarray(changed.get(edit.path, leaves[edit.path]))
            changed[edit.path] = leaf - pull(edit.pulls, along(z, plan.x_axes, ndim)).astype(leaf.dtype)
        z = None
    if s is not None and plan.fold.scale is not None:
        for edit in plan.fold.scale:
            leaf = changed.get(edit.path, leaves[edit.path])
            changed[edit.path] = divided(leaf, pull(edit.pulls, along(s, plan.x_axes, ndim)))
        z, s = (None if z is None else z / s), None
    return changed, Transform(z, s)


def rescaled(plan: GroupPlan, transform: Transform, inputs: dict[str, InputQuant]) -> dict[str, InputQuant]:
    """The earlier inputs whose run-time output bias goes with columns that `absorb` divided."""
    changed: dict[str, InputQuant] = {}
    if transform.scale is None:
        return changed
    scale = along(transform.scale, plan.x_axes, len(plan.x_shape))
    for edit in plan.fold.scale or ():
        for name, quant in inputs.items():
            if edit.columns and edit.path in quant.bias:
                s = pull(edit.to_output, scale)
                bias = {**quant.bias, edit.path: quant.bias[edit.path] / s.astype(quant.bias[edit.path].dtype)}
                changed[name] = replace(quant, bias=bias)
    return changed


def fold(forward: Callable, params: Any, transforms: dict[str, Transform], *inputs: Any) -> Quantized:
    """Applies equivalent transforms to full-precision parameters (law 1: the function stays the same).

    Args:
      forward, inputs: as for `calibrate`; the inputs' shapes are enough.
      params: the original parameters.
      transforms: `calibrate(...).transforms`.

    Returns:
      A `Quantized` without a quantized leaf: `params` is a plain tree that `forward` itself runs where everything could
      be folded, i.e. where `inputs` is empty; `inputs` holds what is left to do at run time, for `execute`.

    Raises:
      ValueError: a transform's group is not in the program, or its weights serve elsewhere too.
    """
    program, leaves = trace_to_edit(forward, params, *inputs)
    known = {g.name: g for layout in program.layout.all() for g in layout.groups if g.kind != "lookup"}
    for name in transforms:
        if name not in known:
            raise ValueError(f"no group {name!r} in this program; it has {sorted(known)[:5]} ...")
        if known[name].shared:
            raise ValueError(f"{name}: its transform cannot go into the weights: {known[name].shared}")
    found: dict[str, InputQuant] = {}
    changed = _fold_layout(program.layout, leaves, transforms, found)
    return Quantized(replace_leaves(params, changed), found, transforms)


def _fold_layout(layout: Layout, leaves: Leaves, transforms: dict[str, Transform], found: dict) -> Leaves:
    changed: Leaves = {}
    for group in layout.groups:
        if group.name in transforms:
            current = {**leaves, **changed}
            new, quant = fold_group(group, current, transforms[group.name])
            changed.update(new)
            found.update(rescaled(group, transforms[group.name], found))
            if quant is not None:
                found[group.name] = quant
    for (index, _), body in layout.bodies.items():
        node = layout.graph.nodes[index]
        inner = {g.name for part in body.all() for g in part.groups} & set(transforms)
        if inner and node.name == "scan":
            changed.update(_fold_scan(node, body, {**leaves, **changed}, transforms, inner, found))
        elif inner:
            changed.update(_fold_layout(body, {**leaves, **changed}, transforms, found))
    return changed


def _fold_scan(node: Node, body: Layout, leaves: Leaves, transforms: dict, inner: set[str], found: dict) -> Leaves:
    """Layer by layer on slices, stacked again."""
    axes = layer_axes(body)
    layers, inputs = [], []
    for i in range(node.params["length"]):
        here = {**leaves, **{p: layer_of(leaves[p], i, axis) for p, axis in axes.items()}}
        mine = {name: layer_of(transforms[name], i) for name in inner}
        residue: dict[str, InputQuant] = {}
        layers.append(_fold_layout(body, here, mine, residue))
        inputs.append(residue)
    found.update(stack_layers(inputs))
    return {path: stack_layers([layer[path] for layer in layers], axes[path]) for path in layers[0]}


def fold_group(group: GroupPlan, leaves: Leaves, transform: Transform) -> tuple[Leaves, InputQuant | None]:
    """One group's consumers and producer after its transform, and what stays at run time."""
    changed, left = absorb(group, leaves, transform)
    z, s = transform.shift, transform.scale
    biases = {}
    for member in group.members:
        path, bias = member.site.path, None if member.bias is None else member.bias.path
        b = None if bias is None else jnp.asarray(leaves[bias])
        w, b, lost = through(member, jnp.asarray(leaves[path]), b, z, s)
        if s is not None:
            changed[path] = w
        if z is not None and bias is not None:
            changed[bias] = b
        if lost is not None:
            biases[path] = lost
    if left.shift is None and left.scale is None and not biases:
        return changed, None
    return changed, InputQuant(left.shift, left.scale, bias=biases, sites=group.sites)


def layer_axes(layout: Layout) -> dict[str, int]:
    """The parameters of which a scan's body sees one layer at a time, and the axis that their layers lie along."""
    refs = [layout.graph.refs.get(v) for v in layout.graph.inputs]
    return {ref.path: ref.axes[-1] for ref in refs if ref is not None and ref.depth == layout.depth}


def layer_of(tree: Any, i: int, axis: int = 0) -> Any:
    return jax.tree.map(lambda a: a[(slice(None),) * axis + (i,)], tree)


# What layers without one of these have where others have one: it changes nothing.
NEUTRAL = {"shift": 0, "scale": 1, "exponents": 0}


def stack_layers(layers: list[Any], axis: int = 0) -> Any:
    """Trees of each layer as one tree with a layer axis. They are equal but for transforms and exponents, which a
    search may have found in some layers only: the others get neutral ones."""

    def stacked(*parts: Any) -> Any:
        return jax.tree.map(lambda *a: jnp.stack([jnp.asarray(x) for x in a], axis), *_completed(parts))

    return jax.tree.map(stacked, *layers, is_leaf=lambda a: isinstance(a, QTensor | InputQuant | Transform))


def _completed(parts: Sequence[Any]) -> Sequence[Any]:
    for name, value in NEUTRAL.items():
        found = [getattr(part, name, None) for part in parts]
        given = next((a for a in found if a is not None), None)
        if given is not None:
            same = jnp.full_like(given, value)
            parts = [replace(part, **{name: same}) if a is None else part for part, a in zip(parts, found)]
    return parts
