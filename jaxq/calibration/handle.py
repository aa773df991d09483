"""One group of the walk: gather what its steps need, run them, fold what they found, prove the fold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.calibration.pieces import objectives
from jaxq.calibration.stages import producing
from jaxq.contraction import apply_input, transform
from jaxq.fold import FoldError, absorb, rescaled
from jaxq.program._compat import quick_jit
from jaxq.program.groups import GroupPlan
from jaxq.program.segments import run
from jaxq.program.tokens import spread_mask
from jaxq.qtensor import InputQuant, PerTensor, Transform, is_qtensor
from jaxq.steps.group import Call, Group

if TYPE_CHECKING:
    from jaxq.calibration.walk import Place

# How far a folded activation may be from the transformed one, relative to its largest value: rounding is far below.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Handled:
    """A finished group: `quant` for the rest of the walk (the whole transform), `left` for the result (what could not
    be folded; None if nothing is left to do at run time)."""

    plan: GroupPlan
    quant: InputQuant
    left: InputQuant | None
    transform: Transform | None


_applied = quick_jit(static_argnums=2)(apply_input)


def applied(call: Call, quant: InputQuant, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """What a group's contractions read in place of `x`."""
    if quant.format is None and quant.shift is None and quant.scale is None:
        return x
    return call(_applied(), replace(quant, bias={}, sites=()), x, axes)


def handle(place: Place, plan: GroupPlan) -> Handled:
    given = _gather(place, plan)
    _check_finite(given)
    group = place.walk.step.apply(given)
    quant = input_quant(group)
    for member in plan.members:
        path = member.site.path
        if group.weights.get(path) is not given.weights.get(path):
            place.leaves.current[leaf_path(path)] = group.weights[path]
        if member.bias is not None and group.biases[path] is not given.biases[path]:
            place.leaves.current[member.bias.path] = group.biases[path]
    whole = None
    left = quant
    if group.shift is not None or group.scale is not None:
        whole = Transform(group.shift, group.scale)
        rest, error = _fold(place, plan, whole)
        left = replace(quant, shift=rest.shift, scale=rest.scale)
        place.found.inputs.update(rescaled(plan, whole, place.found.inputs))
        group = group.noted(fold_error=error, folded=rest.shift is None and rest.scale is None)
    place.walk.on_group(group)
    idle = left.format is None and left.shift is None and left.scale is None and not left.bias
    return Handled(plan, quant, None if idle else left, whole)


def input_quant(group: Group) -> InputQuant:
    activations = group.spec.activations
    return InputQuant(
        group.shift,
        group.scale,
        group.grid,
        group.output_bias,
        format=activations.format if activations else None,
        granularity=activations.granularity if activations else PerTensor(),
        sites=group.plan.sites if group.plan.kind != "lookup" else (),
    )


def leaf_path(site_path: str) -> str:
    return site_path.partition("#")[0]


def tokens(place: Place, plan: GroupPlan) -> tuple[tuple[int, ...], tuple[jax.Array | None, ...]]:
    """The axes of a group's activation that run over batch and tokens; and which tokens of each microbatch are real."""
    labels = place.labels.get(plan.x, (None,) * len(plan.x_shape))
    masks = place.walk.masks
    if masks is not None and "t" in labels and "b" not in labels:
        raise ValueError(
            f"{plan.name}: which tokens of its activation {plan.x_shape} are padding is lost where its batch axis is "
            "merged with another; leave the site out with a `skip` pattern, or calibrate on batches without padding"
        )
    valid = tuple(None if masks is None else spread_mask(masks[m], labels) for m in place.which)
    return tuple(i for i, name in enumerate(labels) if name), valid


def _gather(place: Place, plan: GroupPlan) -> Group:
    microbatches = range(len(place.envs))
    token_axes, valid = tokens(place, plan)
    x = tuple(place.value(plan.x, m) for m in microbatches) if plan.kind != "lookup" else ()
    weights, biases = {}, {}
    for member in plan.members:
        if member.site.ref is not None:
            leaf = place.leaves.current[leaf_path(member.site.path)]
            weights[member.site.path] = leaf if is_qtensor(leaf) else jnp.asarray(leaf)
        if member.bias is not None:
            biases[member.site.path] = jnp.asarray(place.leaves.current[member.bias.path])
    return Group(
        plan=plan,
        spec=place.walk.spec(plan),
        x=x,
        valid=valid,
        token_axes=token_axes,
        weights=weights,
        biases=biases,
        find_objectives=lambda: objectives(place, plan),
        norm_scale=_norm_scale(place, plan),
        call=place.walk.ahead,
    )


def _norm_scale(place: Place, plan: GroupPlan) -> jax.Array | None:
    """gamma of the norm that feeds the group, as a per-channel array: what undoes it where it is 1."""
    edit = plan.fold.gamma
    if edit is None:
        return None
    leaf = jnp.asarray(place.leaves.current[edit.path])
    return leaf.reshape([plan.x_shape[i] for i in plan.x_axes]) if leaf.size == _channels(plan) else None


def _channels(plan: GroupPlan) -> int:
    return int(np.prod([plan.x_shape[i] for i in plan.x_axes]))


_finite_on_device = jax.jit(lambda a: jnp.isfinite(a).all())


def _finite(a: Any) -> bool:
    """Whether all values are finite; on the host by numpy, which has nothing to compile, if this process has them."""
    on_host = not isinstance(a, jax.Array) or (a.is_fully_addressable and all(d.platform == "cpu" for d in a.devices()))
    return bool(np.isfinite(np.asarray(a)).all() if on_host else _finite_on_device(a))


def _check_finite(group: Group) -> None:
    for path, w in group.weights.items():
        if not is_qtensor(w) and not _finite(w):
            raise ValueError(f"{path}: the weight has NaN or infinite values; the checkpoint is damaged")
    for i, x in enumerate(group.x):
        if group.spec.activations and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{group.plan.name}: the activation it reads has dtype {x.dtype}; cast it to a float dtype in the "
                "function, or leave the site out with a `skip` pattern"
            )
        if not _finite(x):
            raise ValueError(
                f"{group.plan.name}: the activation it reads has NaN or infinite values in batch {i}; "
                "check the inputs, and the compute dtype for overflow"
            )


def _fold(place: Place, plan: GroupPlan, whole: Transform) -> tuple[Transform, float]:
    """Writes a transform into the producer and proves it: the producer, run again, gives the transformed activation.

    Where quantized attention is on the way, all of it stays at run time: the grids of what attention reads were found
    before, for values without it.
    """
    if any(g.start in plan.fold.mixed and place.walk.spec(g).activations for g in place.layout.groups):
        return whole, 0.0
    changed, rest = absorb(plan, place.leaves.current, whole)
    if not changed:
        return rest, 0.0
    segment = producing(place.layout, plan)

    def produce() -> jax.Array:
        return run(segment, [place.value(v, 0) for v in segment.reads])[0]

    before = produce()
    place.leaves.current.update(changed)
    after = produce()
    error = float(_fold_error(plan.x_axes, whole, rest, before, after))
    limit = TOLERANCE.get(str(before.dtype), 1e-3)
    if not error <= limit:
        into = ", ".join(changed)
        raise FoldError(f"{plan.name}: folding into {into} changed the activation by {error:.2g} of its size")
    return rest, error


@partial(jax.jit, static_argnums=0)
def _fold_error(
    axes: tuple[int, ...], whole: Transform, rest: Transform, before: jax.Array, after: jax.Array
) -> jax.Array:
    """The relative difference of x' computed before the fold and after it (with what is left at run time)."""
    want, got = transform(before, whole.shift, whole.scale, axes), transform(after, rest.shift, rest.scale, axes)
    return jnp.abs(want - got).max() / jnp.maximum(jnp.abs(want).max(), jnp.finfo(want.dtype).tiny)
