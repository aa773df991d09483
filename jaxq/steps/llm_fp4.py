"""LLM-FP4 (arXiv:2310.16836): weights and activations as floats of few bits, their formats and clip ranges searched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import AnyFloat, Float
from jaxq.formats.floating import power_of_two
from jaxq.program.groups import GroupPlan
from jaxq.qtensor import Grid, PerChannel, PerGroup, PerTensor, QTensor, is_qtensor, quantize_array
from jaxq.quantizer import Quantizer, in_leaf
from jaxq.search import Search, coarse_to_fine
from jaxq.steps.float_layer import Input, Settings, alternate, input_of, layer_of, own_error
from jaxq.steps.float_search import Candidates, Found, log_clips
from jaxq.steps.group import Group, Spec, Step, encoded, transformed, weight_spread
from jaxq.steps.output_error import Metric, output_error

Numbers = int | Float | AnyFloat | Quantizer | None


@dataclass(frozen=True)
class FloatSearch:
    """How formats and clip ranges are searched.

    Attributes:
      rounds: how often weights and activations take turns, at most; they stop when nothing changes any more.
      clips: the clip values that are tried.
      method: `exhaustive()` or `coarse_to_fine()`.
      metric: `output_error`, `cosine` or `diagonal_hessian`.
      tokens: how many tokens, evenly spaced, the activations' search looks at (their ranges and the weights' search see
        all of them); None is all.
      budget: bytes that it may take beside the layer's own arrays.
    """

    rounds: int = 3
    clips: Candidates = log_clips()
    method: Search = coarse_to_fine(stride=8, keep=4)
    metric: Metric = output_error
    tokens: int | None = 512
    budget: int = 2**30


def llm_fp4(
    weights: Numbers = 4,
    activations: Numbers = 4,
    embeddings: Numbers = None,
    attention: Numbers = None,
    search: FloatSearch = FloatSearch(),
) -> Step:
    """FPQ: the joint search, with pre-shifted exponent biases (LLM-FP4, section 4).

    Each channel of an activation has an exponent bias of its own, of which an integer k in [0, 2**E - 1] remains beside
    the tensor's: the channel is magnified by 2**k before it is quantized, and the weights that read it absorb 2**-k
    *before* they are quantized. It is an equivalent transform that is exact in floating point, and folds like any.

    Args:
      weights: of contractions with a parameter: how many bits, with the format searched; a `Float`, with the clip range
        searched; or a `Quantizer` of such a format, for grids per tensor or group instead of per output channel. None:
        full precision.
      activations: what those contractions read, likewise, with one static grid for the tensor.
      embeddings: tables that are looked up, one grid a row.
      attention: both operands of contractions of two activations. None, as in the paper: full precision.
      search: how.
    """
    return _step(weights, activations, embeddings, attention, _settings(search, magnify=True, absorb=True))


def post_shifted_fp4(
    weights: Numbers = 4,
    activations: Numbers = 4,
    embeddings: Numbers = None,
    attention: Numbers = None,
    search: FloatSearch = FloatSearch(),
) -> Step:
    """As `llm_fp4`, but the weights are quantized as they are and their codes keep the exponent -k beside them, one for
    each input channel. It is what the published code simulates. Arguments as for `llm_fp4`."""
    return _step(weights, activations, embeddings, attention, _settings(search, magnify=True, absorb=False))


def fpq_baseline(
    weights: Numbers = 4,
    activations: Numbers = 4,
    embeddings: Numbers = None,
    attention: Numbers = None,
    search: FloatSearch = FloatSearch(),
) -> Step:
    """The joint search alone (LLM-FP4, section 4.1): one exponent bias for the whole activation. Arguments as for
    `llm_fp4`."""
    return _step(weights, activations, embeddings, attention, _settings(search, magnify=False, absorb=False))


def _settings(search: FloatSearch, magnify: bool, absorb: bool) -> Settings:
    if search.rounds < 1:
        raise ValueError(f"FloatSearch: rounds is {search.rounds}; at least one is needed")
    return Settings(
        search.clips, search.method, search.metric, search.budget, search.rounds, search.tokens, magnify, absorb
    )


def _step(weights: Numbers, activations: Numbers, embeddings: Numbers, attention: Numbers, how: Settings) -> Step:
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
            return _table(group, how)
        if group.plan.kind == "attention":
            return _operand(group, how)
        return _contraction(group, how)

    return Step(plan, apply)


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


def _contraction(group: Group, how: Settings) -> Group:
    """A group of contractions with parameters."""
    w, x = group.spec.weights, group.spec.activations
    free = [m for m in group.plan.members if not is_qtensor(group.weights[m.site.path])]
    if (w is None and x is None) or not free:
        return group
    layer = layer_of(group, free)
    found = alternate(layer, w, x, replace(how, magnify=how.magnify and x is not None and group.can_scale()))
    exponents = found.input.exponents if found.input is not None else None
    moved = group.noted(losses=found.losses)
    if exponents is not None and np.asarray(exponents).any():
        moved = transformed(moved, scale=power_of_two(-exponents).reshape(group.channels))
    if found.input is not None and x is not None:
        ndim = group.x[0].ndim
        moved = replace(moved, grid=_grid(x, found.input.scale.reshape((1,) * ndim), found.input.mantissa, ndim))
    if w is None:
        return moved
    codes = {}
    for member, own in zip(free, found.weights, strict=True):
        path, axes = member.site.path, member.site.leaf_axes
        leaf = moved.weights[path] if how.absorb else group.weights[path]
        codes[path] = _coded(leaf, w, own, axes)
        if exponents is not None and not how.absorb and np.asarray(exponents).any():
            spread = weight_spread(member, -exponents.reshape(group.channels))
            codes[path] = replace(codes[path], exponents=spread.astype(jnp.int8))
    return encoded(moved, codes)


@partial(jax.jit, static_argnums=(1, 3))
def _coded(leaf: jax.Array, quantizer: Quantizer, found: Found, axes: tuple[int, ...]) -> QTensor:
    scale = in_leaf(found.scale.transpose(1, 0, 2).ravel(), leaf.shape, quantizer.granularity, axes)
    return quantize_array(leaf, quantizer.format, _grid(quantizer, scale, found.mantissa, leaf.ndim))


def _grid(quantizer: Quantizer, scale: jax.Array, mantissa: jax.Array, ndim: int) -> Grid:
    searched = isinstance(quantizer.format, AnyFloat)
    return Grid(scale, mantissa=mantissa.astype(jnp.int8).reshape((1,) * ndim) if searched else None)


def _table(group: Group, how: Settings) -> Group:
    """A table: the squared error of its rows, one format for all of them."""
    quantizer = group.spec.weights
    codes = {}
    for member in group.plan.members if quantizer is not None else ():
        leaf = group.weights[member.site.path]
        if quantizer is not None and not is_qtensor(leaf):
            found = own_error(leaf, quantizer, member.site.leaf_axes, how)
            codes[member.site.path] = _coded(leaf, quantizer, found, member.site.leaf_axes)
    return encoded(group, codes)


def _operand(group: Group, how: Settings) -> Group:
    """An operand of attention: the squared error of the operand itself."""
    quantizer = group.spec.activations
    if quantizer is None:
        return group
    found = alternate(input_of(group), None, quantizer, replace(how, magnify=False)).input
    assert isinstance(found, Input)
    ndim = group.x[0].ndim
    return replace(group, grid=_grid(quantizer, found.scale.reshape((1,) * ndim), found.mantissa, ndim))
