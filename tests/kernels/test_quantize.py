"""Activations quantized row by row: the kernel in interpret mode, and what `execute` simulates."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq.kernels.quantize as module
from jaxq.contraction import apply_input
from jaxq.formats import Float, Int
from jaxq.kernels.layout import pack_codes
from jaxq.kernels.packed_matmul import Operands, packed_matmul
from jaxq.kernels.quantize import plain_quantize_rows, quantize_rows, row_block
from jaxq.kernels.tpu import weight_carrier
from jaxq.qtensor import InputQuant, PerToken
from jaxq.quantizer import per_channel, quantize_weight

FORMATS = (Int(8), Int(8, symmetric=False), Int(4), Float(2, 1), Float(1, 2), Float(3, 0))


def drawn(m: int, k: int, dtype: type) -> tuple[jax.Array, jax.Array, jax.Array]:
    draw = np.random.default_rng(m)
    x = draw.normal(size=(m, k)) * np.exp(draw.normal(size=k))
    x[0] = 0  # a row without range
    return jnp.asarray(x, dtype), jnp.asarray(draw.normal(size=k), dtype), jnp.asarray(2 ** draw.normal(size=k), dtype)


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_are_those_that_execute_simulates(fmt, dtype, transformed):
    x, shift, scale = drawn(17, 200, dtype)
    if not transformed:
        shift = scale = None
    shift_row, scale_row = (None if a is None else a[None] for a in (shift, scale))
    found = quantize_rows(x, shift_row, scale_row, fmt=fmt, interpret=True)
    plain = plain_quantize_rows(x, shift_row, scale_row, fmt=fmt)
    for one, other in zip(found, plain):
        assert one.dtype == other.dtype and np.array_equal(np.asarray(one), np.asarray(other))
    simulated = apply_input(InputQuant(shift=shift, scale=scale, format=fmt, granularity=PerToken()), x, (1,))
    steps = found.codes.astype(jnp.float32) - found.zero.astype(jnp.float32)
    assert np.array_equal(np.asarray((steps * found.scale).astype(dtype)), np.asarray(simulated))
    np.testing.assert_array_equal(np.asarray(found.sums, float), np.asarray(steps, float).sum(1, keepdims=True))


def test_several_blocks_with_a_ragged_end(monkeypatch):
    monkeypatch.setattr(module, "X_BYTES", 1 << 14)
    assert row_block(70, 128) == 32
    x, *_ = drawn(70, 128, jnp.bfloat16)
    found, plain = (f(x, None, None, fmt=Int(8)) for f in (partial(quantize_rows, interpret=True), plain_quantize_rows))
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(found, plain))


def test_elements_fit_the_machine_that_multiplies_e4m3():
    x, *_ = drawn(3, 256, jnp.bfloat16)
    narrow = quantize_rows(x, None, None, fmt=Float(2, 1), dtype=jnp.float8_e4m3fn, interpret=True)
    wide = quantize_rows(x, None, None, fmt=Float(2, 1), interpret=True)
    assert np.array_equal(np.asarray(narrow.codes.astype(jnp.bfloat16)), np.asarray(wide.codes))


@pytest.mark.parametrize(
    ("activations", "weights"),
    [(Int(8), Int(4)), (Int(8, symmetric=False), Int(4, symmetric=False)), (Float(2, 1), Float(1, 2))],
    ids=str,
)
def test_rows_and_packed_weights_multiply_to_what_execute_simulates(activations, weights):
    k, n = 256, 130
    x, *_ = drawn(17, k, jnp.float32)
    w = jax.random.normal(jax.random.key(0), (k, n))
    leaf = quantize_weight(w, per_channel(weights), (0,))
    rows = quantize_rows(x, None, None, fmt=activations, interpret=True)
    carrier = weight_carrier(weights, rows.codes.dtype, "TPU v6 lite")
    corrections = {}
    if leaf.grid.zero is not None:
        zero = leaf.grid.zero.astype(jnp.int32) + carrier.offset
        columns = (leaf.codes.astype(jnp.int32) + carrier.offset).sum(0, keepdims=True)
        corrections = {"left": jnp.stack([rows.zero, rows.sums]), "right": jnp.stack([columns, zero])}
    (packed,) = pack_codes(jax.lax.bitcast_convert_type(leaf.codes, jnp.uint8) & 15, 4)
    operands = Operands(rows.codes, packed, leaf.grid.scale, rows.scale, **corrections)
    found = packed_matmul(operands, carrier, interpret=True)
    simulated = apply_input(InputQuant(format=activations, granularity=PerToken()), x, (1,))
    exact = np.asarray(simulated, float) @ np.asarray(leaf.dequantize(), float)
    np.testing.assert_allclose(np.asarray(found), exact, rtol=1e-5, atol=1e-5)
