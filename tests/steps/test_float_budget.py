"""LLM-FP4's search of a layer takes what its budget allows, or what it cannot do without: compiled, nothing is run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxq
from jaxq.formats import AnyFloat
from jaxq.quantizer import Quantizer
from jaxq.steps.float_layer import Layer
from jaxq.steps.float_operands import Input, error_of, search_input, search_weight
from jaxq.steps.output_error import cosine

FMT, MIB = AnyFloat(4), 2**20
CHANNEL, TENSOR, GROUP = jaxq.per_channel(FMT), jaxq.per_tensor(FMT), jaxq.per_group(FMT, 32)
DEFAULT = jaxq.FloatSearch()
EXHAUSTIVE = jaxq.FloatSearch(method=jaxq.exhaustive(), metric=cosine, tokens=None)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def taken(layer: Layer, quantizer: Quantizer, how: jaxq.FloatSearch) -> dict[str, int]:
    """The bytes beside their arguments that the compiled functions of a search take, outputs included."""
    channels = layer.x.shape[2]
    given = Input(floats(1, 1, 1), integers(1, 1, 1), integers(channels), integers())
    found, used = [], {}

    def add(name: str, jitted, *args) -> None:
        size = jitted.lower(*args).compile().memory_analysis()
        used[name] = size.temp_size_in_bytes + size.output_size_in_bytes

    for i, (w, reads) in enumerate(zip(layer.ws, layer.reads, strict=True)):
        args = layer, w, reads, given, quantizer, FMT, how
        found.append(search_weight.eval_shape(*args))
        if i == 0 or w.shape != layer.ws[0].shape:
            add(f"search_weight {i}", search_weight, *args)
    add("search_input", search_input, layer, tuple(found), given, floats(channels), quantizer, FMT, how, True)
    add("error_of", error_of, layer, tuple(found), given, quantizer, FMT, how)
    return used


WIDE, NARROW, SQUARE, SMALL = (1024, (2752,)), (2752, (1024,)), (1024, (1024,)), (256, (256,))
SEVERAL, SEVERAL_NARROW = (1024, (1024, 256, 256)), (1024, (256, 128))
SOME = [
    (SEVERAL, 2048, CHANNEL, DEFAULT),
]
OTHERS = [
    (NARROW, 512, GROUP, DEFAULT),
    (WIDE, 1024, CHANNEL, DEFAULT),
    (NARROW, 3072, CHANNEL, DEFAULT),
    (WIDE, 64, CHANNEL, DEFAULT),
    (WIDE, 2048, GROUP, DEFAULT),
    (WIDE, 2048, TENSOR, EXHAUSTIVE),
    (WIDE, 2048, CHANNEL, EXHAUSTIVE),
    (NARROW, 2048, GROUP, EXHAUSTIVE),
    (NARROW, 2048, TENSOR, DEFAULT),
    (SQUARE, 2048, CHANNEL, DEFAULT),
    (SMALL, 4096, CHANNEL, DEFAULT),
    (SEVERAL_NARROW, 2048, GROUP, DEFAULT),
]
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(("shapes", "tokens", "quantizer", "how"), [*SOME, *(slow(*case) for case in OTHERS)])
@pytest.mark.parametrize(
    "budget", [slow(64 * MIB, id="64MiB"), pytest.param(16 * MIB, id="16MiB"), slow(0, id="least")]
)
@pytest.mark.parametrize("products", [True, slow(False)])
def test_a_budget_holds(
    shapes: tuple, tokens: int, quantizer: Quantizer, how: jaxq.FloatSearch, budget: int, products: bool
) -> None:
    """Several weights read their input in orders of their own."""
    channels, outputs = shapes
    ws = tuple(floats(out, channels) for out in outputs)
    reads = tuple(integers(channels) if len(ws) > 1 else None for _ in ws)
    layer = Layer(floats(8, tokens // 8, channels), floats(8, tokens // 8), ws, reads, products=products)
    out = sum(outputs)
    least = 4 * (channels * min(channels, out) + 512 * (channels + out))
    used = taken(layer, quantizer, replace(how, budget=budget))
    assert max(used.values()) <= max(budget, least), {name: size / MIB for name, size in used.items()}
