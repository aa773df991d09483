"""Every model of the zoo: all its weights found and named, run unchanged, quantized, differentiated."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.program.groups import skipped_in
from jaxq.program.trace import trace
from tests.zoo.bare import BARE
from tests.zoo.control import CONTROL
from tests.zoo.flax_models import FLAX
from tests.zoo.specimen import Specimen
from tests.zoo.trees import TREES

ZOO = {make.__name__: make for make in [*BARE, *CONTROL, *TREES, *FLAX]}
# Each has a faster relative in the zoo.
SLOW = {
    "nnx_scan",
    "conv2d_nhwc",
    "scan_second_axis",
    "nnx_transformer",
    "nnx_params_only",
    "linen_block",
    "linen_remat",
    "linen_scan",
    "linen_remat_scan",
    "scan_blocks",
    "scan_converted",
}
# Once these are found they are run, quantized and differentiated as others of the zoo.
ALIKE = {
    *("einsum_heads_out", "einsum_transposed_output", "embedding_indexing", "conv1d", "conv2d_nchw", "vmapped_batch"),
    *("accumulate_in_float32", "lora", "jitted_helper_twice", "nested_jit_with_static", "closed_over"),
    *("scan_twice", "scan_shared", "scan_of_checkpoint", "scan_reshaped", "picked_statically", "fori_static"),
    *("conditional_shared", "lists_and_tuples", "frozen_dict", "unused_and_returned"),
}


def with_slow(slow: set[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in ZOO]


NAMES, UNLIKE = with_slow(SLOW), with_slow(SLOW | ALIKE)


@pytest.fixture(autouse=True)
def allow_promotion():
    """Flax itself broadcasts and promotes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@cache
def specimen(name: str) -> Specimen:
    return ZOO[name]()


def all_sites(s: Specimen) -> set[str]:
    layout = trace(s.forward, s.params, *s.inputs).layout
    return {site for part in layout.all() for group in part.groups for site in group.sites}


def same_bits(a: Any, b: Any) -> bool:
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b))


def distance(a: Any, b: Any) -> float:
    """Relative, over all floating outputs; by numpy, which has nothing to compile for each shape."""
    pairs = [(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)) if jnp.issubdtype(x.dtype, jnp.floating)]
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    error = sum(np.square(x - y).sum() for x, y in pairs)
    return float(error / sum(np.square(y).sum() for _, y in pairs)) ** 0.5


def calibrated(s: Specimen, bits: int) -> jaxq.Quantized:
    fmt = jaxq.Int(bits)
    batches = s.batches or (s.inputs,)
    return jaxq.calibrate(s.forward, s.params, batches, jaxq.quantize(fmt, fmt, attention=fmt, embeddings=fmt))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_found_and_named(name):
    s = specimen(name)
    program = trace(s.forward, s.params, *s.inputs)
    assert all_sites(s) == s.sites
    rows = {row.path: row.reason for row in skipped_in(program.layout)}
    assert set(rows) == set(s.skipped)
    assert all(part in rows[path] for path, part in s.skipped.items()), rows


@pytest.mark.parametrize("name", UNLIKE)
def test_unquantized_execution_is_bit_identical(name):
    s = specimen(name)
    run: Callable = jaxq.execute(s.forward)
    got, want = run(s.params, *s.inputs), s.forward(s.params, *s.inputs)
    assert same_bits(got, want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert same_bits(jax.jit(run)(s.params, *s.inputs), jax.jit(s.forward)(s.params, *s.inputs))


@pytest.mark.parametrize("name", UNLIKE)
def test_quantized_is_close_and_coarser_is_worse(name):
    s = specimen(name)
    run = jax.jit(jaxq.execute(s.forward))
    batches, errors = s.batches or (s.inputs,), {}
    wants = [jax.jit(s.forward)(s.params, *b) for b in batches]
    for bits in (8, 3):
        q = calibrated(s, bits)
        quantized = [leaf for leaf in jax.tree.leaves(q.params, is_leaf=is_q) if is_q(leaf)]
        assert len(quantized) == len({p.partition("#")[0] for p in s.sites if "/dot" not in p})
        errors[bits] = max(distance(run(q, *b), want) for b, want in zip(batches, wants))
    assert 1e-4 < errors[8] < s.bound
    assert errors[3] > 4 * errors[8]


@pytest.mark.parametrize("name", UNLIKE)
def test_gradients_are_those_of_the_function(name):
    s = specimen(name)
    if not s.differentiable:
        pytest.skip("the parameters hold integers or keys")

    def loss(f):
        def of(params):
            outs = [
                x for x in jax.tree.leaves(f(params, *s.inputs)) if jnp.issubdtype(jnp.result_type(x), jnp.floating)
            ]
            return sum(jnp.square(x.astype(jnp.float32)).sum() for x in outs)

        return of

    want, got = (jax.jit(jax.grad(loss(f)))(s.params) for f in (s.forward, jaxq.execute(s.forward)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), got, want)


def is_q(leaf: Any) -> bool:
    return isinstance(leaf, jaxq.QTensor)
