"""From a recipe file to steps, and to a calibration with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxq.calibrate import Batch, calibrate
from jaxq.clipping import Clipping, search_percentile
from jaxq.formats import AnyFloat, Float, Format, Int
from jaxq.observers import (
    Observer,
    average_min_max,
    average_mse,
    average_quantile,
    ema_min_max,
    ema_quantile,
    lsq_plus,
    min_max,
    mse,
    token_quantile,
)
from jaxq.qtensor import Quantized
from jaxq.quantizer import Quantizer, per_channel, per_group, per_tensor, per_token
from jaxq.recipes.file import HEAD_NAMES, FloatMethod, Method, OSPlus, RecipeFile, SmoothQuant
from jaxq.recipes.numbers import Activations, Embeddings, Numbers, TokenQuantile, Weights
from jaxq.search import coarse_to_fine, exhaustive
from jaxq.steps import (
    FloatSearch,
    Group,
    Step,
    chain,
    channel_scale,
    channel_shift,
    cosine,
    diagonal_hessian,
    fed_by_norm,
    foldable,
    fpq_baseline,
    gamma_migration,
    llm_fp4,
    nothing,
    os_plus,
    output_error,
    post_shifted_fp4,
    pre_shifted_fp4,
    quantize,
    skip,
    smooth_quant,
)

SEARCHES = {"exhaustive": exhaustive(), "fast": coarse_to_fine()}
FLOAT_SEARCHES = {"exhaustive": exhaustive(), "fast": FloatSearch().method}
METRICS = {"output_error": output_error, "cosine": cosine, "diagonal_hessian": diagonal_hessian}
FLOAT_METHODS = {
    "llm_fp4": llm_fp4,
    "pre_shifted_fp4": pre_shifted_fp4,
    "post_shifted_fp4": post_shifted_fp4,
    "fpq_baseline": fpq_baseline,
}
PLAIN_METHODS = {"gamma_migration": gamma_migration, "channel_shift": channel_shift, "none": nothing}
GROUPS = {"norms": fed_by_norm, "foldable": foldable}
PLAIN_OBSERVERS = {
    "min_max": min_max,
    "average_min_max": average_min_max,
    "mse": mse,
    "average_mse": average_mse,
    "lsq_plus": lsq_plus,
}


def to_step(recipe: RecipeFile, percentile: float = 1.0) -> Step:
    """The recipe's methods and, where the last does not quantize, `quantize` after them; everywhere but at the sites it
    skips.

    Args:
      percentile: stands in where the recipe says `percentile: search`; `calibrate_recipe` does search it.

    A `skip` pattern that matches nothing is an error in `calibrate`, but for the two default ones: a model has either
    a head of its own or one tied to its embedding.
    """
    *before, last = recipe.method
    searched = isinstance(last, FloatMethod)
    numbers = {
        name: _quantizer(getattr(recipe, name), percentile, searched)
        for name in ("weights", "activations", "attention", "embeddings")
    }
    if isinstance(last, FloatMethod):
        final = FLOAT_METHODS[last.name](**numbers, search=_float_search(last))
    else:
        final = chain(_method(last), quantize(**numbers))
    step = skip(recipe.skip, chain(*map(_method, before), final))
    return step._replace(patterns=tuple(p for p in recipe.skip if p not in HEAD_NAMES))


def calibrate_recipe(
    forward: Callable,
    params: Any,
    batches: Sequence[Batch],
    recipe: RecipeFile,
    *,
    masks: Sequence[Any] | None = None,
    on_group: Callable[[Group], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[Quantized, Clipping | None]:
    """`calibrate` as a recipe file says; where it says `percentile: search`, also what that search found.

    Arguments and errors are those of `calibrate` and, with `percentile: search`, of `search_percentile`.
    """
    propagate = recipe.calibration.propagate
    if not searches_percentile(recipe):
        step = to_step(recipe)
        quantized = calibrate(
            forward, params, batches, step, masks=masks, propagate=propagate, on_group=on_group, checkpoint=checkpoint
        )
        return quantized, None
    bits = min(numbers.bits for numbers in (recipe.activations, recipe.attention) if numbers is not None)
    clipping = search_percentile(
        forward,
        params,
        batches,
        lambda percentile: to_step(recipe, percentile),
        [1 - 0.005 * i for i in range(10 if bits == 8 else 20)],
        masks=masks,
        propagate=propagate,
        on_group=on_group,
        checkpoint=checkpoint,
    )
    return clipping.quantized, clipping


def searches_percentile(recipe: RecipeFile) -> bool:
    observers = [n.observer for n in (recipe.activations, recipe.attention) if n is not None]
    return any(isinstance(o, TokenQuantile) and o.percentile == "search" for o in observers)


def _method(method: Method) -> Step:
    if isinstance(method, OSPlus):
        where = GROUPS[method.groups]
        scale = channel_scale(
            method.lower, method.candidates, SEARCHES[method.search], where=where, batches=method.batches
        )
        return os_plus(channel_shift() if method.shift else nothing(), scale)
    if isinstance(method, SmoothQuant):
        return smooth_quant(method.alpha, where=GROUPS[method.groups])
    return PLAIN_METHODS[method.name]()


def _float_search(method: FloatMethod) -> FloatSearch:
    return FloatSearch(
        rounds=method.rounds,
        clips=method.clip_values(),
        method=FLOAT_SEARCHES[method.search],
        metric=METRICS[method.metric],
        tokens=method.tokens,
    )


def _quantizer(
    numbers: Weights | Activations | Embeddings | None, percentile: float, searched: bool
) -> Quantizer | None:
    """`searched`: the method finds formats and ranges, so there is nothing to observe."""
    if numbers is None:
        return None
    fmt = _format(numbers, searched)
    if isinstance(numbers, Embeddings):
        return per_channel(fmt, None if searched else _observer(numbers.observer, percentile))
    dynamic = isinstance(numbers, Activations) and numbers.granularity != "tensor"
    observer = None if searched or dynamic else _observer(numbers.observer, percentile)
    if numbers.granularity == "token":
        return per_token(fmt)
    if numbers.granularity == "group":
        return per_group(fmt, _size(numbers), observer)
    return (per_tensor if numbers.granularity == "tensor" else per_channel)(fmt, observer)


def _format(numbers: Numbers, searched: bool) -> Format:
    if numbers.format == "int":
        return Int(numbers.bits, numbers.symmetric)
    if numbers.exponent_bits is not None:
        return Float(numbers.exponent_bits, numbers.bits - 1 - numbers.exponent_bits)
    return AnyFloat(numbers.bits) if searched else AnyFloat(numbers.bits).usual


def _size(numbers: Weights | Activations) -> int:
    assert numbers.group_size is not None  # RecipeFile gives both or neither
    return numbers.group_size


def _observer(observer: Any, percentile: float) -> Observer:
    if isinstance(observer, TokenQuantile):
        return token_quantile(percentile if observer.percentile == "search" else observer.percentile)
    if observer.name == "ema_min_max":
        return ema_min_max(observer.decay)
    if observer.name == "average_quantile":
        return average_quantile(observer.fraction)
    if observer.name == "ema_quantile":
        return ema_quantile(observer.fraction, observer.decay)
    return PLAIN_OBSERVERS[observer.name]()
