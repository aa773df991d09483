"""Quotients as GPUs find them: what the arithmetic gives, which is IEEE's everywhere, and what is compiled of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jaxq.formats import Float, Int, encode, fake_quant
from jaxq.formats.division import _divide_by_reciprocal, _ratio_by_reciprocal
from tests.kernels.ahead import rows_of
from tests.kernels.test_hopper_matmul import compiles

COUNT = 1 << 18
GPU = AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"))
both = pytest.mark.parametrize("quotient", [_divide_by_reciprocal, _ratio_by_reciprocal])


def as_on_gpu(f, *args):
    """What is traced for a GPU, run here."""
    with use_abstract_mesh(GPU):
        traced = jax.make_jaxpr(f)(*args)
    return jaxpr_as_fun(traced)(*args)[0]


@both
def test_quotients_of_few_bits_are_exact(quotient):
    draw = np.random.default_rng(0)
    steps = draw.integers(-(2**10), 2**10, COUNT) / 2
    b = np.ldexp(draw.integers(2**12, 2**13, COUNT) * 2.0 + 1, draw.integers(-60, 60, COUNT)).astype(np.float32)
    a = (steps * b.astype(float)).astype(np.float32)
    assert np.array_equal(a, steps * b.astype(float)), "exact"
    assert np.array_equal(quotient(jnp.asarray(a), jnp.asarray(b)), steps)


@pytest.mark.parametrize(("quotient", "wrong"), [(_divide_by_reciprocal, 1e-5), (_ratio_by_reciprocal, 1e-3)])
def test_the_others_are_the_nearest_or_rarely_its_neighbour(quotient, wrong):
    draw = np.random.default_rng(1)
    a, b = np.ldexp(1 + draw.random((2, COUNT)), draw.integers(-40, 40, (2, COUNT))).astype(np.float32)
    apart = np.abs(np.asarray(quotient(jnp.asarray(a), jnp.asarray(b))).view(np.int32) - (a / b).view(np.int32))
    assert apart.max() <= 1 and apart.mean() <= wrong


@both
def test_what_is_not_finite_and_zeros(quotient):
    a = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 3e38, -3e38], np.float32)[:, None]
    b = np.array([1, 0.3, 0, np.inf, 5e30, 1e-30], np.float32)[None]
    with np.errstate(all="ignore"):
        want = a / b
    found = np.asarray(quotient(jnp.asarray(a), jnp.asarray(b)))
    np.testing.assert_allclose(found, want, rtol=2e-7)
    assert np.array_equal(np.signbit(found)[~np.isnan(want)], np.signbit(want)[~np.isnan(want)])


def test_in_bfloat16_the_reciprocal_alone_rounds_right():
    draw = np.random.default_rng(2)
    a, b = jnp.asarray(1 + draw.random((2, COUNT)), jnp.bfloat16)
    want = (np.asarray(a, float) / np.asarray(b, float)).astype(a.dtype)  # float64 rounds no tie of bfloat16's away
    assert np.array_equal(_divide_by_reciprocal(a, b), want)


def test_gradients_are_those_of_a_quotient():
    a, b = jnp.asarray([[3.0, -5.0]]), jnp.asarray([[7.0]])
    want = jax.jacobian(lambda *x: x[0] / x[1], (0, 1))(a, b)
    found = jax.jacobian(_divide_by_reciprocal, (0, 1))(a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, want)


@pytest.mark.parametrize("fmt", [Int(8), Int(4, symmetric=False), Float(2, 1), Float(4, 3)], ids=str)
def test_codes_and_values_for_a_gpu_are_the_same(fmt):
    draw = np.random.default_rng(3)
    steps = np.ldexp(draw.integers(2**12, 2**13, (512, 1)) * 1.0, draw.integers(-40, 20, (512, 1)))
    scale = jnp.asarray(steps, jnp.float32)
    x = scale * jnp.asarray(draw.integers(-1024, 1024, (512, 64)) / 8, jnp.float32)  # ties and codes, among others
    zero = () if fmt.symmetric else (jnp.full((1, 1), 3.0),)
    for f in (encode, fake_quant):
        assert np.array_equal(as_on_gpu(partial(f, fmt), x, scale, *zero), f(fmt, x, scale, *zero))


@pytest.mark.slow
@compiles
def test_compiled_for_a_gpu_no_number_is_divided_and_no_operation_is_left_out():
    rows = rows_of("gpu_quotients.py")
    assert {row["scales"] for row in rows} == {"tensor", "token", "channel", "constant"}
    for row in rows:
        assert row["divisions"] == row["fused"] == 0, row
        values, floats = row["function"] == "fake_quant", row["format"] != "int8"
        assert row["products"] == 4 + (values or floats), row
        # Rounding takes two, but in floats' codes; integers' codes are narrowed by one more.
        rounding = 2 * (values or not floats) + (not values and not floats)
        assert 3 <= row["sums"] - rounding <= 5, row
