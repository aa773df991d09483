"""`calibrate`: from a forward function, its parameters and sample batches to a quantized parameter tree."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.calibration.ahead import Ahead
from jaxq.calibration.resume import of_calibration, resumed
from jaxq.calibration.walk import Found, Leaves, Place, Walk, walk_groups
from jaxq.program.tokens import Labels, label
from jaxq.program.trace import Program, named_leaves, replace_leaves, trace_to_edit
from jaxq.qtensor import QTensor, Quantized
from jaxq.steps.compose import matches
from jaxq.steps.group import Group, Step

Batch = Any
Propagate = Literal["quantized", "full_precision"]


def calibrate(
    forward: Callable,
    params: Any,
    batches: Sequence[Batch],
    recipe: Step,
    *,
    masks: Sequence[Any] | None = None,
    propagate: Propagate = "quantized",
    on_group: Callable[[Group], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Quantized:
    """Finds a quantized parameter tree for `forward`, in one walk over the program.

    Args:
      forward: `forward(params, *inputs) -> outputs`, any traceable function over any pytree of arrays.
      params: its parameters; leaves may be host or memory-mapped arrays, each is read when its equation runs. They and
        the batches may lie on a mesh, also of several processes, all of which then call this.
      batches: sample inputs, a tuple of inputs each (or the one input itself), all of the same shapes. All of them are
        walked together, microbatch by microbatch.
      recipe: a step, usually `chain(os_plus(), quantize(...))`.
      masks: for each batch a bool array [batch, tokens], False for padding, which enters no statistic.
      propagate: whether a group sees what the quantized groups before it give, or what the original ones do.
      on_group: called with each finished group, for progress bars and reports.
      checkpoint: a folder, made where it is missing, for what the recipe makes of each group (inside `lax.scan` of each
        layer's group), written as soon as it is known. Called again with the same arguments after an interruption,
        `calibrate` takes from there what is done and ends with the same result, bit for bit; for this the machine
        must compute the activations as it did then. Remove the folder afterwards. One calibration at a time uses it.

    Returns:
      A `Quantized` that `execute(forward)` runs.

    Raises:
      TypeError: `recipe` is no step, or `params` a `Quantized`.
      ValueError: an unknown `propagate`, no or empty batches, batches of different shapes, non-finite weights or
        activations, integers to be quantized as an activation (with their path), a rule that matches nothing, a site
        whose statistics cannot be collected. Besides, with `checkpoint`: a file there is damaged, or it was made with
        another program, batches, masks, recipe, `propagate`, parameters or activation of its group, or version of jaxq
        or JAX (of the recipe's functions their code and what they close over are compared, not what they read from
        their modules); or arrays are spread over several processes.
      FoldError: a fold changed the function.
    """
    _check_arguments(params, recipe, propagate)
    batches = [b if isinstance(b, (tuple, list)) else (b,) for b in batches]
    _check(batches, masks)
    program, leaves = trace_to_edit(forward, params, *batches[0])
    _check_patterns(program, recipe)
    graph = program.layout.graph
    inputs = graph.inputs[len(program.paths) :]
    envs = [dict(zip(inputs, map(jnp.asarray, jax.tree.leaves(tuple(b))), strict=True)) for b in batches]
    if checkpoint is not None:
        _check_here(dict(named_leaves(params)), batches)
        recipe = resumed(recipe, Path(checkpoint), of_calibration(program, batches, masks, propagate, recipe))
    labels, bodies = label(graph, _input_labels(program, envs[0], masks))
    valid = None if masks is None else tuple(jnp.asarray(m).astype(bool) for m in masks)
    placed = any(getattr(a, "committed", False) for a in jax.tree.leaves((params, batches)))
    with Ahead(placed) as ahead:
        walk = Walk(recipe, propagate == "quantized", valid, on_group or (lambda _: None), ahead)
        every = tuple(range(len(envs)))
        place = Place(walk, program.layout, envs, labels, Leaves(leaves, dict(leaves)), Found(), every)
        walk_groups(place, bodies, outputs=())
    changed = {p: x for p, x in place.leaves.current.items() if x is not leaves[p]}
    for path in _only_looked_up(program) & {p for p, x in changed.items() if isinstance(x, QTensor)}:
        changed[path] = replace(changed[path], looked_up=True)
    return Quantized(replace_leaves(params, changed), place.found.inputs, place.found.transforms)


def _check_arguments(params: Any, recipe: Any, propagate: str) -> None:
    if isinstance(params, Quantized):
        raise TypeError(
            "calibrate: params is a Quantized; give the float parameters, or its `.params` for a second pass"
        )
    if not isinstance(recipe, Step):
        raise TypeError(
            f"calibrate: recipe is {recipe!r}, not a step; make one with jaxq.quantize(...), jaxq.chain(...)"
        )
    if propagate not in get_args(Propagate):
        raise ValueError(f"calibrate: propagate is {propagate!r}; possible are {', '.join(get_args(Propagate))}")


def _check(batches: list[Any], masks: Sequence[Any] | None) -> None:
    if not batches:
        raise ValueError("calibrate: no batches; give at least one")
    shapes = [[(np.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tuple(b))] for b in batches]
    trees = [jax.tree.structure(tuple(b)) for b in batches]
    for i, found in enumerate(shapes):
        if trees[i] != trees[0]:
            raise ValueError(f"calibrate: batch {i} has the structure {trees[i]}, batch 0 has {trees[0]}")
        if any(0 in shape for shape, _ in found):
            raise ValueError(f"calibrate: batch {i} is empty: its inputs have shapes {[s for s, _ in found]}")
        if found != shapes[0]:
            raise ValueError(
                f"calibrate: batch {i} has inputs {found}, batch 0 has {shapes[0]}; "
                "pad them to one shape and give `masks`, or drop the last, smaller batch"
            )
    if masks is None:
        return
    if len(masks) != len(batches):
        raise ValueError(f"calibrate: {len(masks)} masks for {len(batches)} batches")
    for i, mask in enumerate(masks):
        if np.ndim(mask) != 2 or not any(shape[:2] == np.shape(mask) for shape, _ in shapes[i]):
            raise ValueError(f"calibrate: mask {i} has shape {np.shape(mask)}; no input [batch, tokens, ...] has it")
        if not np.asarray(mask).any():
            raise ValueError(f"calibrate: mask {i} marks every token as padding")


def _check_here(leaves: dict[str, Any], batches: list[Any]) -> None:
    """A checkpoint tells arrays by their content, which one process must have."""
    for name, a in (*leaves.items(), *((f"batch {i}", a) for i, b in enumerate(batches) for a in jax.tree.leaves(b))):
        if not all(part.is_fully_addressable for part in jax.tree.leaves(a) if isinstance(part, jax.Array)):
            raise ValueError(f"calibrate: {name} is spread over several processes; checkpoints are for one process's")


def _check_patterns(program: Program, recipe: Step) -> None:
    """A rule that matches nothing is a misspelling."""
    names = {p for layout in program.layout.all() for g in layout.groups for p in (*g.sites, g.name)}
    for pattern in recipe.patterns:
        if not any(matches(name, pattern) for name in names):
            near = get_close_matches(pattern, sorted(names), n=3, cutoff=0.3) or sorted(names)[:3]
            raise ValueError(f"the rule {pattern!r} matches no site; near it are {', '.join(near)}")


def _only_looked_up(program: Program) -> set[str]:
    """The parameters that nothing is done with but to pick rows."""
    looked_up, others = set(), set()
    for group in (group for layout in program.layout.all() for group in layout.groups):
        paths = {member.site.ref.path for member in group.members if member.site.ref is not None}
        (looked_up if group.kind == "lookup" else others).update(paths)
    return looked_up - others


def _input_labels(program: Program, env: dict[int, Any], masks: Sequence[Any] | None) -> list[Labels]:
    """Which inputs run over batch and tokens: those shaped like the mask, or else integer ones of rank 2."""
    graph = program.layout.graph

    def of(v: int) -> Labels:
        shape = graph.avals[v].shape
        plain = (None,) * len(shape)
        if v in graph.refs or len(shape) < 2:
            return plain
        tokens = jnp.issubdtype(env[v].dtype, jnp.integer) and len(shape) == 2
        fits = tokens if masks is None else shape[:2] == np.shape(masks[0])
        return ("b", "t", *plain[2:]) if fits else plain

    return [of(v) for v in graph.inputs]
