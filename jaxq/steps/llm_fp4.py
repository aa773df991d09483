"""LLM-FP4 (arXiv:2310.16836): weights and activations as floats of few bits, their formats and clip ranges searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import AnyFloat, Float
from jaxq.formats.floating import power_of_two
from jaxq.program.groups import GroupPlan
from jaxq.qtensor import Grid, PerChannel, PerGroup, PerTensor, QTensor, is_qtensor, quantize_array
from jaxq.quantizer import Quantizer, in_leaf
from jaxq.steps.float_layer import input_of, layer_of
from jaxq.steps.float_operands import FloatSearch, Input, own_error
from jaxq.steps.float_search import Found
from jaxq.steps.float_turns import Exponents, alternate
from jaxq.steps.group import Group, Spec, Step, encoded, transformed, weight_spread

Numbers = int | Float | AnyFloat | Quantizer | None


def llm_fp4(
    weights: Numbers = 4,
    activations: Numbers = 4,
    embeddings: Numbers = None,
    attention: Numbers = None,
    search: FloatSearch = FloatSearch(),
    exponents: Sequence[Exponents] = (Exponents.PRE_SHIFTED, Exponents.POST_SHIFTED),
) -> Step:
    """FPQ: the joint search, with exponent biases shifted from the activations to the weights (LLM-FP4, section 4).

    Each channel of an activation has an exponent bias of its own, of which an integer k in [0, 2**E - 1] remains beside
    the tensor's: the channel is magnified by 2**k before it is quantized, and the weights that read it take 2**-k. It
    is an equivalent transform that is exact in floating point, and folds like any.

    In the paper the weights absorb 2**-k *before* they are quantized: pre-shifted. Where a few channels are loud their
    weights then dominate each row's range. What the published code simulates has no such problem: weights quantized as
    they are, whose codes keep the exponent -k beside them, one for each input channel: post-shifted. Neither is better
    everywhere, so that each group has the one with which its outputs' error is less.

    Args:
      weights: of contractions with a parameter: how many bits, with the format searched; a `Float`, with the clip range
        searched; or a `Quantizer` of such a format, for grids per tensor or group instead of per output channel. None:
        full precision.
      activations: what those contractions read, likewise, with one static grid for the tensor.
      embeddings: tables that are looked up, one grid a row.
      attention: both operands of contractions of two activations. None, as in the paper: full precision.
      search: how.
      exponents: what is tried, one or several; where no error of the outputs can be told (convolutions, experts) the
        first. `pre_shifted_fp4`, `post_shifted_fp4` and `fpq_baseline` are this step with one of each kind.

    Raises:
      ValueError: no exponents, a format that is no float, or a granularity that is not searched.
    """
    if not exponents:
        raise ValueError("llm_fp4: no exponents to try; give at least one, Exponents.NONE for no exponents")
    usual = _described("weights", weights, PerChannel()), _described("activations", activations, PerTensor())
    by_kind = {
        "attention": (None, _described("attention", attention, PerTensor())),
        "lookup": (_described("embeddings", embeddings, PerChannel()), None),
    }

    def plan(group: GroupPlan, spec: Spec) -> Spec:
        w, x = by_kind.get(group.kind, usual)
        return replace(spec, weights=w, activations=x, touched=spec.touched or bool(w or x))

    def apply(group: Group) -> Group:
        if group.plan.kind == "lookup":
            return _table(group, search)
        if group.plan.kind == "attention":
            return _operand(group, search)
        return _contraction(group, search, exponents)

    return Step(plan, apply)


# The paper's, the published code's, and the paper's baseline (section 4.1): one exponent bias for the whole activation.
pre_shifted_fp4 = partial(llm_fp4, exponents=(Exponents.PRE_SHIFTED,))
post_shifted_fp4 = partial(llm_fp4, exponents=(Exponents.POST_SHIFTED,))
fpq_baseline = partial(llm_fp4, exponents=(Exponents.NONE,))


def _described(name: str, what: Numbers, granularity: PerChannel | PerTensor) -> Quantizer | None:
    if what is None:
        return None
    fmt = AnyFloat(what) if isinstance(what, int) else what
    quantizer = fmt if isinstance(fmt, Quantizer) else Quantizer(fmt, granularity)
    if not isinstance(quantizer.format, Float | AnyFloat):
        raise ValueError(f"{name}: {quantizer.format} is no float format; use `quantize` for integers")
    allowed = (PerTensor,) if isinstance(granularity, PerTensor) else (PerTensor, PerChannel, PerGroup)
    if not isinstance(quantizer.granularity, allowed):
        names = ", ".join(cls.__name__ for cls in allowed)
        raise ValueError(f"{name}: {quantizer.granularity} is not searched; possible here: {names}")
    if isinstance(quantizer.granularity, PerGroup) and quantizer.granularity.scales != "real":
        raise ValueError(f"{name}: scales that are {quantizer.granularity.scales} are not searched; use `quantize`")
    return quantizer


def _contraction(group: Group, how: FloatSearch, tried: Sequence[Exponents]) -> Group:
    """A group of contractions with parameters."""
    w, x = group.spec.weights, group.spec.activations
    free = [m for m in group.plan.members if not is_qtensor(group.weights[m.site.path])]
    if w is None and x is None:
        return group
    if not free:  # other sites have encoded them all, and the input alone is left to search
        return _operand(group, how)
    able = x is not None and group.can_scale()
    found = alternate(layer_of(group, free), w, x, how, tried if able else (Exponents.NONE,))
    done = _with_input(group.noted(losses=found.losses), found.input)
    if w is None:
        return done
    kept = found.exponents is Exponents.POST_SHIFTED and done.scale is not group.scale
    codes = {}
    for member, own in zip(free, found.weights, strict=True):
        path, axes = member.site.path, member.site.leaf_axes
        codes[path] = _coded((group if kept else done).weights[path], w, own, axes)
        if kept:
            assert found.input is not None
            spread = weight_spread(member, -found.input.exponents.reshape(group.channels))
            codes[path] = replace(codes[path], exponents=spread.astype(jnp.int8))
    return encoded(done, codes)


def _with_input(group: Group, found: Input | None) -> Group:
    """The group with its channels magnified, and the grid of what they are then."""
    quantizer = group.spec.activations
    if found is None or quantizer is None:
        return group
    if np.asarray(found.exponents).any():
        group = transformed(group, scale=power_of_two(-found.exponents).reshape(group.channels))
    ndim = group.x[0].ndim
    return replace(group, grid=_grid(quantizer, found.scale.reshape((1,) * ndim), found.mantissa, ndim))


@partial(jax.jit, static_argnums=(1, 3))
def _coded(leaf: jax.Array, quantizer: Quantizer, found: Found, axes: tuple[int, ...]) -> QTensor:
    scale = in_leaf(found.scale.ravel(), leaf.shape, quantizer.granularity, axes)
    return quantize_array(leaf, quantizer.format, _grid(quantizer, scale, found.mantissa, leaf.ndim))


def _grid(quantizer: Quantizer, scale: jax.Array, mantissa: jax.Array, ndim: int) -> Grid:
    searched = isinstance(quantizer.format, AnyFloat)
    return Grid(scale, mantissa=mantissa.astype(jnp.int8).reshape((1,) * ndim) if searched else None)


def _table(group: Group, how: FloatSearch) -> Group:
    """A table: the squared error of its rows, one format for all of them."""
    quantizer = group.spec.weights
    codes = {}
    for member in group.plan.members if quantizer is not None else ():
        leaf = group.weights[member.site.path]
        if quantizer is not None and not is_qtensor(leaf):
            found = own_error(leaf, quantizer, member.site.leaf_axes, how)
            codes[member.site.path] = _coded(leaf, quantizer, found, member.site.leaf_axes)
    return encoded(group, codes)


def _operand(group: Group, how: FloatSearch) -> Group:
    """An operand of attention, or an input that is all there is to search: its own squared error."""
    quantizer = group.spec.activations
    if quantizer is None:
        return group
    return _with_input(group, alternate(input_of(group), None, quantizer, how, (Exponents.NONE,)).input)
