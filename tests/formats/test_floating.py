"""Float formats: the laws, the tables of elements, other implementations' numbers."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxq.formats import (
    AnyFloat,
    Float,
    bias_of_scale,
    decode,
    encode,
    fake_quant,
    grid_from_range,
    scale_of_bias,
)
from jaxq.formats.floating import fits_half, half

GOLDENS = Path(__file__).resolve().parents[2] / "../shared/goldens"
WIDTHS = range(3, 9)
FORMATS = [Float(e, bits - 1 - e) for bits in WIDTHS for e in range(1, bits)]

formats = st.sampled_from(FORMATS)
# Not subnormal: compilers may flush those to 0.
values = st.floats(-(2.0**96), 2.0**96, width=32, allow_subnormal=False)
near_one = st.floats(-8.0, 8.0, width=32, allow_subnormal=False)
# One shape, because each is compiled anew.
matrices = st.sampled_from([values, near_one]).flatmap(lambda v: hnp.arrays(np.float32, (3, 5), elements=v))
scales = hnp.arrays(np.float32, (3, 1), elements=st.floats(2.0**-40, 2.0**40, width=32))


def elements(fmt: Float) -> np.ndarray:
    """The elements from zero on, by REFERENCE's formula with b = B, in float64: index is the code."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    b = 2 ** (e - 1) - 1
    subnormal = [k / 2**m * 2.0 ** (1 - b) for k in range(2**m)]
    normal = [(1 + k / 2**m) * 2.0 ** (p - b) for p in range(1, 2**e) for k in range(2**m)]
    return np.array((subnormal + normal)[: 2 ** (e + m) - fmt.reserved])


def nearest(fmt: Float, ratio: np.ndarray) -> np.ndarray:
    """The code of the nearest element by brute force: ties to the even code, without mantissa bits upwards."""
    table = elements(fmt)
    size = np.minimum(np.abs(ratio.astype(np.float64)), table[-1])
    above = np.maximum(np.searchsorted(table, size), 1)
    middle = (table[above - 1] + table[above]) / 2  # exact in float64
    tie_goes_up = (above > 1) if fmt.mantissa_bits == 0 else (above % 2 == 0)
    up = (size > middle) | ((size == middle) & tie_goes_up)
    return np.where(up, above, above - 1) + np.signbit(ratio) * 2 ** (fmt.bits - 1)


def assert_same_bits(a, b) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def simulate(fmt, x, scale, mantissa=None):
    return decode(fmt, encode(fmt, x, scale, None, mantissa), scale, None, mantissa)


def quant(fmt, x, scale, mantissa=None):
    return fake_quant(fmt, x, scale, None, mantissa)


ONE = jnp.ones((1, 1))
jitted = {f: jax.jit(f, static_argnums=0) for f in (simulate, quant, encode, decode)}


# The elements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_code_is_the_formulas_element_and_survives_encoding(fmt):
    table = elements(fmt)
    want = np.concatenate([table, -table]).astype(np.float32)[None]
    codes = jnp.arange(2**fmt.bits, dtype=jnp.uint8)[None]
    assert fmt.largest == table[-1]
    mantissa = jnp.full((1, 1), fmt.mantissa_bits, jnp.int8)
    for kind, m in ((fmt, None), (AnyFloat(fmt.bits), mantissa)):
        found = decode(kind, codes, ONE, None, m)
        assert_same_bits(found, want)  # the negative zero too
        again = encode(kind, found, ONE, None, m)
        assert again.dtype == kind.code_dtype == np.uint8
        np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("fmt", [Float(2, 1), Float(4, 3, 1), Float(5, 2, 4), Float(1, 6), Float(3, 0)], ids=str)
def test_bits_of_float16(fmt):
    assert fits_half(fmt) and not fits_half(Float(5, 2)) and not fits_half(Float(6, 1))
    positive = np.arange(len(elements(fmt)), dtype=np.uint8)
    codes = jnp.asarray([[*positive, *positive + 2 ** (fmt.bits - 1)]], jnp.uint8)
    want = decode(fmt, codes, ONE * 2.0 ** (fmt.bias - 15), None, None)
    assert_same_bits(jax.jit(half, static_argnums=0)(fmt, codes), want)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_of_formats_mixed_in_one_array_survives_at_any_scale(bits):
    splits = [f for f in FORMATS if f.bits == bits]
    mantissa = jnp.asarray([[f.mantissa_bits] for f in splits], jnp.int8)
    scale = jnp.asarray(np.random.default_rng(0).uniform(1e-4, 1e4, mantissa.shape), jnp.float32)
    codes = jnp.broadcast_to(jnp.arange(2**bits, dtype=jnp.uint8)[None], (len(splits), 2**bits))
    every = jitted[decode](AnyFloat(bits), codes, scale, None, mantissa)
    np.testing.assert_array_equal(jitted[encode](AnyFloat(bits), every, scale, None, mantissa), codes)
    assert_same_bits(jitted[quant](AnyFloat(bits), every, scale, mantissa), every)
    assert_same_bits(jnp.stack([decode(f, c, s) for f, c, s in zip(splits, codes, scale)]), every)


MIRRORS = [
    (Float(2, 1), ml_dtypes.float4_e2m1fn),
    (Float(2, 3), ml_dtypes.float6_e2m3fn),
    (Float(3, 2), ml_dtypes.float6_e3m2fn),
    (Float(4, 3, reserved=1), ml_dtypes.float8_e4m3fn),
    (Float(5, 2, reserved=4), ml_dtypes.float8_e5m2),
    (Float(4, 3, reserved=8), ml_dtypes.float8_e4m3),
    (Float(3, 4, reserved=16), ml_dtypes.float8_e3m4),
]


@pytest.mark.parametrize(("fmt", "dtype"), MIRRORS, ids=lambda p: getattr(p, "__name__", ""))
def test_codes_and_rounding_are_those_of_ml_dtypes(fmt, dtype):
    table = elements(fmt)
    codes = np.concatenate([np.arange(len(table)), np.arange(len(table)) + 2 ** (fmt.bits - 1)]).astype(np.uint8)
    assert fmt.largest == float(ml_dtypes.finfo(dtype).max)
    assert_same_bits(decode(fmt, jnp.asarray(codes)[None], ONE), codes.view(dtype).astype(np.float32)[None])
    steps = np.diff(table).min() * np.linspace(-40, 40, 1281)  # with all ties among the small elements
    x = np.concatenate([steps, np.linspace(-fmt.largest, fmt.largest, 4001)]).astype(np.float32)
    x = x[np.abs(x) <= fmt.largest]
    np.testing.assert_array_equal(encode(fmt, jnp.asarray(x)[None], ONE)[0], x.astype(dtype).view(np.uint8))


def test_splits_and_the_usual_format():
    assert AnyFloat(4).splits == (Float(3, 0), Float(2, 1), Float(1, 2))  # LLM-FP4's order
    assert AnyFloat(8).splits == tuple(Float(e, 7 - e) for e in (5, 4, 3, 2, 1))
    assert Float(2, 1).splits == (Float(2, 1),)
    x = jnp.linspace(-9, 9, 301)[None]
    for bits, usual in ((4, Float(2, 1)), (6, Float(3, 2)), (8, Float(4, 3))):
        assert AnyFloat(bits).usual == usual
        assert_same_bits(fake_quant(AnyFloat(bits), x, ONE), fake_quant(usual, x, ONE))
        low, high = -jnp.ones((1, 1)), jnp.full((1, 1), 5.0)
        assert (
            grid_from_range(AnyFloat(bits), low, high) == grid_from_range(usual, low, high) == (5 / usual.largest, None)
        )


# Laws ---------------------------------------------------------------------------------------------------------------


@given(formats, matrices, scales)
def test_decoded_codes_are_the_fake_quantized_values_bit_for_bit(fmt, x, scale):
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    eager = quant(fmt, x, scale)
    assert_same_bits(simulate(fmt, x, scale), eager)
    assert_same_bits(jitted[simulate](fmt, x, scale), eager)
    assert_same_bits(jitted[quant](fmt, x, scale), eager)
    mantissa = jnp.full((3, 1), fmt.mantissa_bits, jnp.int8)
    assert_same_bits(jitted[quant](AnyFloat(fmt.bits), x, scale, mantissa), eager)


@given(st.sampled_from(WIDTHS), matrices, scales, st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_the_same_with_formats_mixed_in_one_array(bits, x, scale, mantissas):
    mantissa = jnp.asarray([[min(m, bits - 2)] for m in mantissas], jnp.int8)
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    eager = quant(AnyFloat(bits), x, scale, mantissa)
    for f in (simulate, jitted[simulate], jitted[quant]):
        assert_same_bits(f(AnyFloat(bits), x, scale, mantissa), eager)
    rows = [quant(Float(bits - 1 - int(m[0]), int(m[0])), *r) for m, *r in zip(mantissa, x[:, None], scale[:, None])]
    assert_same_bits(jnp.concatenate(rows), eager)


@given(formats, matrices, scales)
def test_codes_are_those_of_the_nearest_elements(fmt, x, scale):
    with np.errstate(over="ignore"):
        ratio = x / scale
    np.testing.assert_array_equal(encode(fmt, jnp.asarray(x), jnp.asarray(scale)), nearest(fmt, ratio))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_ties_go_to_the_even_code(fmt):
    table = elements(fmt)
    ties = np.concatenate([(table[1:] + table[:-1]) / 2, table]).astype(np.float32)
    ties = np.resize(ties, 255)  # one shape for all, because each is compiled anew
    for x in (ties, -ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))):
        np.testing.assert_array_equal(encode(fmt, jnp.asarray(x)[None], ONE)[0], nearest(fmt, x))


@given(formats, matrices, scales)
def test_fake_quant_is_monotone_and_idempotent(fmt, x, scale):
    flat = jnp.asarray(np.sort(x.reshape(1, -1)))
    once = fake_quant(fmt, flat, jnp.asarray(scale[:1]))
    assert (np.diff(np.asarray(once)) >= 0).all()
    assert_same_bits(fake_quant(fmt, once, jnp.asarray(scale[:1])), once)


@given(formats, hnp.arrays(np.float32, (3, 5), elements=near_one), scales, st.integers(-40, 40))
def test_a_power_of_two_commutes(fmt, x, scale, k):
    p = jnp.float32(2.0**k)
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    assert_same_bits(fake_quant(fmt, x * p, scale * p), fake_quant(fmt, x, scale) * p)


def test_a_scale_and_its_repetition_give_the_same_codes_in_every_context():
    """On exact ties, where multiplying by a reciprocal (XLA's division by a broadcast scalar) goes astray."""
    fmt = Float(4, 3)
    ties = (elements(fmt)[1:] + elements(fmt)[:-1]) / 2
    expected = nearest(fmt, ties)[None]
    astray = 0
    for value in (3.0, 7.0, 41.0, 47.0, 49.0, 55.0, 63.0):  # ties * value is exact
        x = jnp.asarray(ties * value, jnp.float32)[None]
        astray += (nearest(fmt, np.asarray(x) * (1 / np.float32(value))) != expected).sum()
        for scale in (jnp.full((1, 1), value), jnp.asarray(np.full(x.shape, value, np.float32))):
            np.testing.assert_array_equal(encode(fmt, x, scale), expected)
            np.testing.assert_array_equal(jitted[encode](fmt, x, scale), expected)
        constant = jax.jit(lambda x, scale=value: encode(fmt, x, jnp.full((1, 1), scale)))
        np.testing.assert_array_equal(constant(x), expected)
    assert astray > 10


def test_what_lies_outside_is_clipped_and_reserved_codes_are_never_made():
    x = jnp.asarray([[-jnp.inf, -1e30, -1.0, 1.0, 1e30, jnp.inf]])
    for fmt in [*FORMATS, *(fmt for fmt, _ in MIRRORS)]:
        found = np.asarray(fake_quant(fmt, x, jnp.full((1, 1), 2.0)))
        np.testing.assert_array_equal(found[0, [0, 1, 4, 5]], 2 * fmt.largest * np.array([-1, -1, 1, 1]))
        top = encode(fmt, x, ONE)[0, 5]
        assert top == 2 ** (fmt.bits - 1) - 1 - fmt.reserved


def test_nan_stays_and_other_float_types_are_computed_in_float32():
    x = jnp.asarray([[jnp.nan, 1.0]])
    for fmt in FORMATS:
        assert np.isnan(fake_quant(fmt, x, ONE))[0].tolist() == [True, False]
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.linspace(-3, 3, 64)[None].astype(dtype)
        scale, _ = grid_from_range(Float(3, 2), x.min(1, keepdims=True), x.max(1, keepdims=True))
        out = fake_quant(Float(3, 2), x, scale)
        assert scale.dtype == jnp.float32 and out.dtype == dtype
        np.testing.assert_array_equal(out, simulate(Float(3, 2), x, scale).astype(dtype))


# Ranges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [*FORMATS, AnyFloat(4), AnyFloat(8)], ids=str)
def test_extreme_ranges_are_defined_and_the_ends_are_elements(fmt):
    """Zero, constant, huge, and so small that float32 itself would run out of normal numbers."""
    width = jnp.asarray([[0.0], [5.0], [-3.0], [2.0**127], [1e-30], [2.0**-126], [1e-40]])
    scale, zero = grid_from_range(fmt, width, width)
    assert zero is None and scale[0, 0] == 1
    out = np.asarray(fake_quant(fmt, width, scale))
    assert np.isfinite(out).all() and np.isfinite(scale).all()
    np.testing.assert_allclose(out[:4], width[:4], rtol=1e-6)
    smallest_step = np.asarray(decode(fmt, jnp.ones((7, 1), jnp.uint8), scale))
    assert (smallest_step >= 2.0**-126).all()
    assert (np.abs(out - width)[4:] <= np.maximum(np.abs(width)[4:] / 3, smallest_step[4:])).all()


def test_ranges_of_formats_mixed_in_one_array():
    splits = [f for f in FORMATS if f.bits == 6]
    mantissa = jnp.asarray([[f.mantissa_bits] for f in splits], jnp.int8)
    low, high = (jnp.asarray(np.random.default_rng(s).normal(size=mantissa.shape), jnp.float32) for s in (0, 1))
    scale, _ = grid_from_range(AnyFloat(6), low, high, mantissa)
    one_by_one = [grid_from_range(f, a, b)[0] for f, a, b in zip(splits, low, high)]
    assert_same_bits(scale, jnp.stack(one_by_one))


# LLM-FP4's exponent bias --------------------------------------------------------------------------------------------


def test_an_integer_bias_is_a_power_of_two_and_both_ways_are_inverse():
    for fmt in FORMATS:
        bias = jnp.arange(-60.0, 60.0)
        scale = scale_of_bias(fmt, bias)
        np.testing.assert_array_equal(scale, 2.0 ** (fmt.bias - np.arange(-60.0, 60.0)))
        np.testing.assert_array_equal(bias_of_scale(fmt, scale), bias)
    real = jnp.asarray(np.random.default_rng(0).uniform(-30, 30, 500), jnp.float32)
    np.testing.assert_allclose(bias_of_scale(Float(2, 1), scale_of_bias(Float(2, 1), real)), real, atol=4e-6)
    np.testing.assert_allclose(scale_of_bias(Float(2, 1), real), 2.0 ** (1 - np.asarray(real, np.float64)), rtol=4e-6)


def test_a_bias_beyond_float32_gives_a_normal_scale():
    scale = scale_of_bias(Float(2, 1), jnp.asarray([1e9, 127.0, -126.0, -1e9]))
    np.testing.assert_array_equal(scale[:3], [2.0**-126, 2.0**-126, 2.0**127])
    assert 2.0**127 <= scale[3] < np.inf
    np.testing.assert_array_equal(bias_of_scale(Float(2, 1), scale[:3]), [127, 127, -126])
    assert bias_of_scale(Float(2, 1), jnp.asarray([0.5], jnp.bfloat16)) == 2


# Gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Float(2, 1), Float(3, 0), Float(1, 2), Float(4, 3, reserved=1), AnyFloat(6)], ids=str)
def test_gradients_pass_straight_through(kind):
    x = jnp.linspace(-3, 3, 101)[None]
    mantissa = jnp.full((1, 1), 3, jnp.int8) if isinstance(kind, AnyFloat) else None
    scale, _ = grid_from_range(kind, -jnp.ones((1, 1)), jnp.ones((1, 1)), mantissa)

    def total(x, scale, weights):
        return (quant(kind, x, scale, mantissa) * weights).sum()

    inside = np.abs(np.asarray(x)) <= 1
    of_x = jax.jit(jax.grad(total))(x, scale, jnp.ones_like(x))
    np.testing.assert_allclose(of_x, inside, rtol=1e-6)
    # With respect to the scale: the element minus x / scale inside, the largest element outside (LSQ, eq. 3).
    of_scale = jax.vmap(lambda w: jax.grad(total, argnums=1)(x, scale, w[None])[0, 0])(jnp.eye(x.size))
    element, ratio = np.asarray(quant(kind, x, scale, mantissa) / scale), np.asarray(x / scale)
    np.testing.assert_allclose(of_scale, np.where(inside, element - ratio, element)[0], rtol=1e-4, atol=1e-5)


def test_a_range_can_be_learned():
    def top(high):
        return fake_quant(Float(2, 1), jnp.full((1, 1), 50.0), *grid_from_range(Float(2, 1), -high, high)).sum()

    np.testing.assert_allclose(jax.grad(top)(jnp.full((1, 1), 2.0)), 1, rtol=1e-6)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "exponent_bits is an integer from 1"),
        ((-1, 4), "exponent_bits is an integer from 1"),
        ((2, -1), "mantissa_bits and reserved from 0"),
        ((2, 1, -1), "mantissa_bits and reserved from 0"),
        ((True, 2), "exponent_bits is an integer"),
        ((2.0, 1), "exponent_bits is an integer"),
        (("2", 1), "exponent_bits is an integer"),
        ((5, 3), "9 bits with the sign; possible are 3 to 8"),
        ((1, 0), "2 bits with the sign; possible are 3 to 8"),
        ((2, 1, 5), "more than half of the 8 codes of each sign are reserved"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Float(*arguments)


@pytest.mark.parametrize("bits", [2, 9, 0, -4, 4.0, "4", True])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(ValueError, match="from 3 to 8"):
        AnyFloat(bits)


def test_integers_are_not_quantized_again():
    with pytest.raises(TypeError, match="uint8"):
        encode(Float(2, 1), jnp.zeros((2, 2), jnp.uint8), ONE)


# The published code's numbers ---------------------------------------------------------------------------------------


def golden(name: str) -> dict[str, np.ndarray]:
    file = GOLDENS / name
    if not file.exists():
        pytest.skip(f"the golden file shared/goldens/{name} is not here")
    return dict(np.load(file))


def format_of(key: str) -> Float:
    e, m = re.match(r"E(\d)M(\d)", key).groups()  # type: ignore[union-attr]
    return Float(int(e), int(m))


def test_values_are_those_of_the_published_quantizer_on_its_grid():
    """Ties may go the other way by one code: the published one divides by another rounding of the same scale."""
    found = golden("fpq_fakequant_grid.npz")
    keys = [key.removesuffix("__q_search") for key in found if key.endswith("__q_search")]
    assert len(keys) == 63
    differ = total = 0
    for bits in (4, 6, 8):  # all formats of a width as one row
        mine = [key for key in keys if format_of(key).bits == bits]
        x, want = (np.concatenate([found[f"{key}__{name}"] for key in mine])[None] for name in ("x", "q_search"))
        counts = [found[f"{key}__x"].size for key in mine]
        steps = [scale_of_bias(format_of(key), jnp.float32(key.partition("__b")[2])) for key in mine]
        tops = [found[f"{key}__maxval_search"] for key in mine]
        np.testing.assert_allclose([s * format_of(key).largest for s, key in zip(steps, mine)], tops, rtol=1e-5)
        scale = jnp.asarray(np.repeat(steps, counts))[None]
        mantissa = jnp.asarray(np.repeat([format_of(key).mantissa_bits for key in mine], counts))[None]
        got = np.asarray(quant(AnyFloat(bits), jnp.asarray(x), scale, mantissa))
        off = ~np.isclose(got, want, rtol=1e-5, atol=0)
        codes = (encode(AnyFloat(bits), jnp.asarray(a), scale, None, mantissa) for a in (got, want))
        ours, theirs = (np.asarray(c).astype(int) for c in codes)
        assert (np.abs(ours - theirs)[off] == 1).all()
        differ, total = differ + off.sum(), total + off.size
    assert differ <= 0.002 * total, (differ, total)


def test_a_bias_a_channel_is_a_power_of_two_before_and_after():
    """LLM-FP4's pre-shifted bias r + k_j (sec. 4.2): scaling channel j by 2**k_j, one scale, and back."""
    found = golden("fpq_fakequant_preshift.npz")
    x, keys = jnp.asarray(found["x"]), [key.removesuffix("__q") for key in found if key.endswith("__q")]
    assert len(keys) == 45
    differ = 0
    for key in keys:
        fmt, k = format_of(key), found[f"{key}__int_offset"]
        assert (k == np.rint(k)).all() and (k >= 0).all()
        shift = jnp.asarray(2.0**k, jnp.float32)[None]
        scale = scale_of_bias(fmt, jnp.asarray(found[f"{key}__tensor_bias"])[None])
        got = fake_quant(fmt, x * shift, scale) / shift
        assert_same_bits(got, fake_quant(fmt, x, scale / shift))
        differ += (~np.isclose(got, found[f"{key}__q"], rtol=1e-5, atol=0)).sum()
    assert differ <= 1e-4 * len(keys) * x.size, differ
