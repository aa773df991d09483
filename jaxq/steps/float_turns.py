"""LLM-FP4's alternation: the weights' formats and scales given the activation's, then the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import Int
from jaxq.quantizer import Quantizer
from jaxq.steps.float_layer import Layer
from jaxq.steps.float_operands import (
    FloatSearch,
    Input,
    error_of,
    search_input,
    search_weight,
    unclipped,
    widest_of,
)
from jaxq.steps.float_search import Found


class Exponents(Enum):
    """What becomes of the exponent k of a channel that is magnified by 2**k before it is quantized."""

    NONE = "there is none: one exponent bias for the whole activation"
    PRE_SHIFTED = "the weights absorb 2**-k, and are quantized after that"
    POST_SHIFTED = "the weights are quantized as they are, and their codes keep -k beside them"


@dataclass(frozen=True)
class Solution:
    """What the alternation found; `losses` after each turn: the squared error of all outputs (empty where outputs are
    not products of matrices)."""

    weights: tuple[Found, ...]
    input: Input | None
    exponents: Exponents
    losses: np.ndarray


class _Turn(NamedTuple):
    """The weights' grids for an input, and the error of both together."""

    input: Input | None
    weights: tuple[Found, ...]
    loss: jax.Array


def alternate(
    layer: Layer,
    weights: Quantizer | None,
    activations: Quantizer | None,
    how: FloatSearch,
    tried: Sequence[Exponents],
) -> Solution:
    """Searches the weights given the activation, then the activation given the weights, in turns, and keeps the turn of
    least error. What is not to be quantized stays as it is.

    Of several `tried` exponents those are kept with which the first turn's error is the least.
    """
    fmt = None if activations is None else activations.format
    assert not isinstance(fmt, Int)
    widest, readers = widest_of(layer), () if weights is None else tuple(zip(layer.ws, layer.reads, strict=True))

    def turn(given: Input | None) -> _Turn:
        assert weights is not None or not readers
        # Waited for, as two that run at once take twice the budget.
        searches = (search_weight(layer, w, reads, given, weights, fmt, how) for w, reads in readers)
        found = tuple(map(jax.block_until_ready, searches))
        return _Turn(given, found, error_of(layer, found, given, weights, fmt, how))

    def first(exponents: Exponents) -> _Turn:
        if fmt is None:
            return turn(None)
        absorb = jnp.int32(exponents is Exponents.PRE_SHIFTED)
        return turn(unclipped(fmt, widest, exponents is not Exponents.NONE, absorb))

    firsts = [(exponents, first(exponents)) for exponents in tried]
    exponents, best = min(firsts, key=lambda one: float(one[1].loss))
    turns, shifted = [best], exponents is not Exponents.NONE
    while fmt is not None and len(turns) <= how.rounds:
        last = turns[-1]
        assert last.input is not None
        found = search_input(layer, last.weights, last.input, widest, weights, fmt, how, shifted)
        if all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(last.input))):
            break
        turns.append(turn(found))
        if weights is None:
            break
    losses = np.asarray([one.loss for one in turns], np.float32)
    best = turns[int(losses.argmin()) if layer.products else -1]
    return Solution(best.weights, best.input, exponents, losses if layer.products else losses[:0])
