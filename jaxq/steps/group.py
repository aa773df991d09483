"""A group during calibration: what a step receives and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.contraction import along, transform
from jaxq.program.groups import GroupPlan, Member
from jaxq.program.views import look, pull
from jaxq.qtensor import Grid, QTensor, is_qtensor
from jaxq.quantizer import Quantizer
from jaxq.steps.objective import Numbers, Objective, Objectives

Call = Callable[..., Any]  # call(f, *args) is f(*args), of a jitted function


@dataclass(frozen=True)
class Spec:
    """What a recipe wants of one group, known before anything is run: earlier steps search against it."""

    weights: Quantizer | None = None
    activations: Quantizer | None = None
    touched: bool = False


@dataclass(frozen=True)
class Group:
    """One group with its real numbers.

    Attributes:
      plan: what the program says of it: its name, sites, channel axes, where a transform can be folded.
      spec: how its weights and its input will be quantized.
      x: the activation of each microbatch, in the program's layout, as transformed so far.
      valid: for each microbatch a bool array that broadcasts against `x` (False: padding), or None.
      token_axes: the axes of `x` that run over batch and tokens.
      weights, biases: by site path, in the layout of the parameter tree, as transformed so far.
      shift, scale: the equivalent transform so far, of the shape of x's channel axes; x = (x_0 - shift) / scale.
      output_bias: what sites without a bias must add at run time, in the layout of their output.
      grid: the static grid of the input, once found.
      find_objectives: cuts the pieces of program in which a search can measure its error, see `objectives`.
      norm_scale: the scale parameter of the norm that feeds the group, of the shape of x's channel axes, if any.
      log: what steps want to report (arrays and numbers), by name.
      call: calls jitted functions; in a rehearsal, where arrays are shapes, it begins to compile them instead.
    """

    plan: GroupPlan
    spec: Spec
    x: tuple[jax.Array, ...]
    valid: tuple[jax.Array | None, ...]
    token_axes: tuple[int, ...]
    weights: dict[str, Any]
    biases: dict[str, jax.Array]
    find_objectives: Callable[[], Objectives | None]
    norm_scale: jax.Array | None = None
    shift: jax.Array | None = None
    scale: jax.Array | None = None
    output_bias: dict[str, jax.Array] = field(default_factory=dict)
    grid: Grid | None = None
    log: dict[str, Any] = field(default_factory=dict)
    call: Call = lambda f, *args: f(*args)

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.x[0].shape[i] for i in self.plan.x_axes)

    @property
    def of_pairs(self) -> bool:
        """Whether `x` has numbers for pairs of tokens, as attention's probabilities are: they are no token's features.
        Known where the program's inputs are tokens."""
        return len(self.token_axes) > 2

    @property
    def objectives(self) -> Objectives | None:
        """The pieces of program in which a search can measure its error, while the walk is at this group; None for
        look-ups and attention's operands."""
        return self.find_objectives()

    def can_scale(self) -> bool:
        """Whether all consumers are weights of this group alone, still in full precision."""
        fits = all(m.site.operands.w_axes for m in self.plan.members)
        linear = self.plan.kind in ("linear", "conv", "ragged")
        return linear and fits and not self.plan.shared and not any(map(is_qtensor, self.weights.values()))

    def can_shift(self) -> bool:
        """Whether, besides, every consumer has a bias to take the shift."""
        return self.plan.kind == "linear" and self.can_scale() and all(m.bias for m in self.plan.members)

    def noted(self, **log: Any) -> Group:
        return replace(self, log={**self.log, **log})


class Step(NamedTuple):
    """The unit of composition, as optax's (init, update) pair.

    `plan(group_plan, spec) -> spec` says how a group will be quantized, before the walk; `apply(group) -> group` does
    what the step does. `patterns` are the site-path rules inside it: `calibrate` refuses those that match nothing.
    `rehearse` is `apply` on a group of shapes, where it calls nothing but jitted functions, by `group.call`; else None.
    """

    plan: Callable[[GroupPlan, Spec], Spec]
    apply: Callable[[Group], Group]
    patterns: tuple[str, ...] = ()
    rehearse: Callable[[Group], Group | None] = lambda _: None


def weight_spread(member: Member, s: jax.Array) -> jax.Array:
    """A per-channel array in the layout of the member's weight leaf."""
    site = member.site
    assert site.ref is not None
    return pull(tuple(reversed(site.ref.views)), along(s, site.operands.w_axes, len(site.shapes[site.operands.w])))


def shift_through(member: Member, z: jax.Array, w: jax.Array) -> jax.Array:
    """z W of a weight leaf: what a shift of the input takes from the output, in the output's layout (OS+, eq. 4)."""
    site = member.site
    assert site.ref is not None
    seen = look(site.ref.views, w).astype(jnp.float32)
    lost = jnp.tensordot(z.astype(jnp.float32), seen, (tuple(range(z.ndim)), site.operands.w_axes))
    columns = [i for i in site.operands.columns if i is not None]
    return along(lost, columns, len(site.shapes[2]))


def through(
    member: Member, w: jax.Array, b: jax.Array | None, shift: jax.Array | None, scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """W' = diag(s) W and b' = b + z W of one consumer's leaves; where it has no bias, b is None and z W comes third, in
    the output's layout: what is left to add at run time."""
    lost = None if shift is None else shift_through(member, shift, w)
    if lost is not None and member.bias is not None and b is not None:
        b, lost = b + pull(member.bias.pulls, lost).astype(b.dtype), None
    return w if scale is None else w * weight_spread(member, scale).astype(w.dtype), b, lost


def transformed(group: Group, shift: jax.Array | None = None, scale: jax.Array | None = None) -> Group:
    """The equivalent group with x' = (x - z) / s, W' = diag(s) W, b' = b + z W; transforms compose."""
    weights, biases, output_bias = dict(group.weights), dict(group.biases), dict(group.output_bias)
    for member in group.plan.members:
        path = member.site.path
        weights[path], b, lost = through(member, weights[path], biases.get(path), shift, scale)
        if b is not None:
            biases[path] = b
        if lost is not None:
            output_bias[path] = lost + output_bias[path] if path in output_bias else lost
    x = tuple(_transform(x, shift, scale, group.plan.x_axes) for x in group.x)
    total_shift, total_scale = _compose((group.shift, group.scale), shift, scale)
    return replace(
        group, x=x, weights=weights, biases=biases, output_bias=output_bias, shift=total_shift, scale=total_scale
    )


_transform = partial(jax.jit, static_argnums=3)(transform)


def _compose(first: tuple, shift: jax.Array | None, scale: jax.Array | None) -> tuple:
    """((x - z1) / s1 - z) / s = (x - (z1 + s1 z)) / (s1 s)."""
    shift1, scale1 = first
    if shift is not None:
        moved = shift if scale1 is None else scale1 * shift
        shift1 = moved if shift1 is None else shift1 + moved
    if scale is not None:
        scale1 = scale if scale1 is None else scale1 * scale
    return shift1, scale1


@partial(jax.jit, static_argnums=2)
def _channel_range(x: jax.Array, valid: jax.Array | None, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    others = tuple(i for i in range(x.ndim) if i not in axes)
    x = x.astype(jnp.float32)
    low = x if valid is None else jnp.where(valid, x, jnp.inf)
    high = x if valid is None else jnp.where(valid, x, -jnp.inf)
    order = [sorted(axes).index(a) for a in axes]
    return low.min(others).transpose(order), high.max(others).transpose(order)


def channel_range(group: Group) -> tuple[jax.Array, jax.Array]:
    """Each channel's (min, max) over all real tokens of all microbatches."""
    ranges = [_channel_range(x, valid, group.plan.x_axes) for x, valid in zip(group.x, group.valid)]
    lows, highs = zip(*ranges)
    return jnp.stack(lows).min(0), jnp.stack(highs).max(0)


@partial(jax.jit, static_argnums=(2, 3))
def tokens_of(
    x: jax.Array, valid: jax.Array | None, token_axes: tuple[int, ...], x_axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """An activation as [1, tokens, features], the channels last in the order of `x_axes`; and which tokens are real.
    Where no axes run over tokens, all but the channels do."""
    axes = token_axes or tuple(i for i in range(x.ndim) if i not in x_axes)
    rest = [i for i in range(x.ndim) if i not in (*axes, *x_axes)] + [i for i in x_axes if i not in axes]
    count = 1
    for i in axes:
        count *= x.shape[i]
    tokens = x.transpose([*axes, *rest]).reshape(1, count, -1).astype(jnp.float32)
    if valid is None:
        return tokens, None
    shape = [x.shape[i] if i in axes else 1 for i in range(x.ndim)]
    return tokens, jnp.broadcast_to(valid, shape).transpose([*axes, *rest]).reshape(count)


def first_batches(group: Group, count: int | None) -> Group:
    """The group with its first microbatches only."""
    return group if count is None else replace(group, x=group.x[:count], valid=group.valid[:count])


def numbers_of(group: Group, objective: Objective, m: int) -> Numbers:
    """What an objective is replayed on, for one microbatch, with the group as transformed so far."""
    paths = [member.site.path for member in group.plan.members]
    return Numbers(
        group.x[m],
        tuple(group.weights[p] for p in paths),
        tuple(group.biases.get(p) for p in paths),
        tuple(group.output_bias.get(p) for p in paths),
        objective.others[m],
    )


def weight_range(group: Group) -> jax.Array:
    """max |W_c| over all consumers, of the shape of x's channel axes."""
    found = []
    for member in group.plan.members:
        site = member.site
        assert site.ref is not None
        seen = jnp.abs(look(site.ref.views, group.weights[site.path]).astype(jnp.float32))
        axes = site.operands.w_axes
        most = seen.max(tuple(i for i in range(seen.ndim) if i not in axes))
        found.append(most.transpose([sorted(axes).index(a) for a in axes]))
    return jnp.stack(found).max(0)


def encoded(group: Group, weights: dict[str, QTensor]) -> Group:
    return replace(group, weights={**group.weights, **weights})
