"""Quantizers: grids over a weight's axes, in the layout of its leaf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxq
from jaxq.formats import fake_quant, grid_from_range
from jaxq.qtensor import PerToken
from jaxq.quantizer import fake_quantize_weight, quantize_weight, weight_grid
from tests.zoo.specimen import normal

# Few shapes: each is a compilation.
SHAPES = st.sampled_from(
    [((5,), (0,)), ((4, 3), (0,)), ((3, 4), (1,)), ((2, 3, 4), (0, 1)), ((4, 2, 3), (0,)), ((2, 3, 1, 4), (1, 3))]
)
FORMATS = st.builds(jaxq.Int, st.integers(2, 8), st.booleans())
half = settings(max_examples=settings.default.max_examples // 2)  # as nearly every example compiles


@half
@given(SHAPES, FORMATS)
def test_one_grid_for_each_output_channel(shape_axes, fmt):
    shape, axes = shape_axes
    w = normal(sum(shape), *shape)
    grid = weight_grid(w, jaxq.per_channel(fmt), axes)
    assert grid.scale.shape == tuple(1 if i in axes else n for i, n in enumerate(shape))
    scale, zero = grid_from_range(fmt, w.min(axes, keepdims=True), w.max(axes, keepdims=True))
    np.testing.assert_array_equal(grid.scale, scale)
    if zero is None:
        assert grid.zero is None
    else:
        np.testing.assert_array_equal(grid.zero, zero)


@half
@given(SHAPES, FORMATS)
def test_one_grid_for_the_tensor(shape_axes, fmt):
    shape, axes = shape_axes
    w = normal(sum(shape), *shape)
    grid = weight_grid(w, jaxq.per_tensor(fmt), axes)
    assert grid.scale.shape == (1,) * len(shape)
    np.testing.assert_array_equal(grid.scale.ravel()[0], grid_from_range(fmt, w.min(), w.max())[0])


@pytest.mark.parametrize(
    ("shape", "axes"), [((8, 3), (0,)), ((3, 8), (1,)), ((2, 8, 3), (0, 1)), ((8, 2, 3), (0,)), ((4, 8), (0, 1))]
)
def test_one_grid_for_each_run_of_channels(shape, axes):
    """Runs lie along the last summed axis; each index of the others has its own."""
    w, fmt = normal(0, *shape), jaxq.Int(4)
    grid = weight_grid(w, jaxq.per_group(fmt, 4), axes)
    last = axes[-1]
    assert grid.scale.shape == tuple(n // 4 if i == last else n for i, n in enumerate(shape))
    runs = w.reshape(*shape[:last], shape[last] // 4, 4, *shape[last + 1 :])
    np.testing.assert_array_equal(grid.scale, grid_from_range(fmt, runs.min(last + 1), runs.max(last + 1))[0])


@half
@given(SHAPES, FORMATS, st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_codes_stand_for_the_fake_quantized_weight(shape_axes, fmt, dtype):
    """Law 2 for weights, whatever the layout; and what a search tries is what is stored in the end."""
    shape, axes = shape_axes
    w = normal(sum(shape), *shape, dtype=dtype)
    q = quantize_weight(w, jaxq.per_channel(fmt), axes)
    assert q.shape == shape and q.ndim == len(shape) and q.dtype == dtype and q.codes.dtype == fmt.code_dtype
    grid = q.grid.over(shape)
    want = fake_quant(fmt, w, grid.scale, grid.zero)
    np.testing.assert_array_equal(q.dequantize(), want)
    np.testing.assert_array_equal(fake_quantize_weight(w, jaxq.per_channel(fmt), axes), want)
    step = np.asarray(jnp.broadcast_to(grid.scale, shape))
    slack = 0.5 * step + (np.abs(np.asarray(w, np.float32)) / 128 if dtype == jnp.bfloat16 else 1e-6)
    zero_slack = step if grid.zero is not None else 0  # a rounded zero point moves the ends by up to half a step
    assert (np.abs(np.asarray(w, np.float32) - np.asarray(want, np.float32)) <= slack + zero_slack).all()


def test_a_channel_of_zeros_has_scale_one():
    w = normal(0, 8, 3).at[:, 1].set(0)
    q = quantize_weight(w, jaxq.per_channel(jaxq.Int(8)), (0,))
    assert float(q.grid.scale[0, 1]) == 1.0
    np.testing.assert_array_equal(q.dequantize()[:, 1], 0)


def test_token_granularity_is_not_for_weights():
    with pytest.raises(ValueError, match="for activations"):
        weight_grid(normal(0, 8, 3), jaxq.Quantizer(jaxq.Int(8), PerToken()), (0,))


def test_stacked_codes_are_the_layers_codes():
    w = normal(0, 3, 8, 5)
    layers = [quantize_weight(a, jaxq.per_group(jaxq.Int(4), 4), (0,)) for a in w]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    assert stacked.shape == (3, 8, 5)
    np.testing.assert_array_equal(stacked.dequantize(), jnp.stack([q.dequantize() for q in layers]))
    np.testing.assert_array_equal(stacked.dequantize()[1], layers[1].dequantize())
