"""Integer formats: the laws that everything else leans on, and the published code's numbers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxq.formats import SMALLEST_SCALE, Int, decode, encode, fake_quant, grid_from_range, integer

GOLDEN = Path(__file__).resolve().parents[2] / "../shared/goldens/fakequant_int.npz"
FORMATS = [Int(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]

formats = st.sampled_from(FORMATS)
# Not subnormal: compilers may flush those to 0.
values = st.floats(-(2.0**96), 2.0**96, width=32, allow_subnormal=False)
# Few shapes, because each is compiled anew.
matrices = st.sampled_from([(1, 1), (3, 5)]).flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=values))


def grid_of(fmt: Int, x: np.ndarray | jax.Array, axis: int | tuple[int, int] = 1):
    x = jnp.asarray(x)
    return grid_from_range(fmt, x.min(axis, keepdims=True), x.max(axis, keepdims=True))


def assert_same_bits(a: jax.Array, b: jax.Array) -> None:
    np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def simulate(fmt, x, scale, zero):
    return decode(fmt, encode(fmt, x, scale, zero), scale, zero)


# Laws ---------------------------------------------------------------------------------------------------------------


@given(formats, matrices, st.sampled_from([0, 1, (0, 1)]))
def test_decoded_codes_are_the_fake_quantized_values_bit_for_bit(fmt, x, axis):
    x = jnp.asarray(x)
    scale, zero = grid_of(fmt, x * 0.75, axis)  # so that some values are clipped
    eager = fake_quant(fmt, x, scale, zero)
    assert_same_bits(simulate(fmt, x, scale, zero), eager)
    assert_same_bits(jax.jit(simulate, static_argnums=0)(fmt, x, scale, zero), eager)
    assert_same_bits(jax.jit(fake_quant, static_argnums=0)(fmt, x, scale, zero), eager)


@pytest.mark.parametrize(
    ("fmt", "jit"),
    # Compiled all of them; one operation after the other those whose codes have all kinds of spare bits: 2, 4 and 8.
    [
        *((fmt, True) for fmt in FORMATS),
        *(
            (fmt, False) if fmt.bits in (2, 4, 8) else pytest.param(fmt, False, marks=pytest.mark.slow)
            for fmt in FORMATS
        ),
    ],
    ids=str,
)
def test_every_code_survives_decoding_and_encoding(fmt, jit):
    encode_, decode_ = (jax.jit(f, static_argnums=0) if jit else f for f in (encode, decode))
    codes = jnp.arange(fmt.qmin, fmt.qmax + 1).astype(fmt.code_dtype)[None]
    scales = jnp.asarray(np.random.default_rng(0).uniform(1e-4, 1e4, (50, 1)), jnp.float32)
    for zero in [None] if fmt.symmetric else [jnp.full_like(scales, z) for z in (fmt.qmin, fmt.qmax // 2, fmt.qmax)]:
        every = decode_(fmt, codes, scales, zero)
        again = encode_(fmt, every, scales, zero)
        np.testing.assert_array_equal(again, jnp.broadcast_to(codes, again.shape))
        assert_same_bits(fake_quant(fmt, every, scales, zero), every)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
@pytest.mark.parametrize("jit", [False, True])
def test_accelerators_narrow_whole_numbers_by_their_bits(dtype, jit, monkeypatch):
    monkeypatch.setattr(integer, "on_accelerator", lambda: True)
    every = np.arange(jnp.iinfo(dtype).min, jnp.iinfo(dtype).max + 1)
    narrow = jax.jit(integer.narrow, static_argnums=1) if jit else integer.narrow
    found = narrow(jnp.asarray(every, jnp.float32), dtype)
    assert found.dtype == dtype and np.array_equal(found, every)


def test_all_codes_of_each_format_are_reached():
    x = jnp.linspace(-1.1, 1.1, 4001)[None]
    for fmt in FORMATS:
        codes = np.unique(encode(fmt, x, *grid_from_range(fmt, -jnp.ones((1, 1)), jnp.ones((1, 1)))))
        np.testing.assert_array_equal(codes, np.arange(fmt.qmin, fmt.qmax + 1))
        assert codes.dtype == fmt.code_dtype == (np.int8 if fmt.symmetric else np.uint8)


def test_a_scale_and_its_repetition_give_the_same_codes_in_every_context():
    """XLA divides by a broadcast scalar through its reciprocal; thirds and sevenths put that on rounding ties."""
    fmt, x = Int(8), jnp.arange(-6000, 6000, dtype=jnp.float32)[None] / 2
    for value in (3.0, 7.0, 0.1, 49.0, 63.0):
        expected = np.clip(np.rint(np.asarray(x) / np.float32(value)), -127, 127)
        one, full = jnp.full((1, 1), value), jnp.asarray(np.full(x.shape, value, np.float32))
        for scale in (one, full):
            np.testing.assert_array_equal(encode(fmt, x, scale, None), expected)
            np.testing.assert_array_equal(jax.jit(encode, static_argnums=0)(fmt, x, scale, None), expected)
        constant = jax.jit(lambda x, scale=value: encode(fmt, x, jnp.full((1, 1), scale), None))
        np.testing.assert_array_equal(constant(x), expected)


@given(formats, matrices)
def test_a_grid_is_the_same_under_jit(fmt, x):
    for eager, jitted in zip(grid_of(fmt, x), jax.jit(grid_of, static_argnums=0)(fmt, x)):
        assert (eager is None and jitted is None) or np.array_equal(eager, jitted)


@given(formats, matrices)
def test_fake_quant_is_idempotent(fmt, x):
    scale, zero = grid_of(fmt, x)
    once = fake_quant(fmt, jnp.asarray(x), scale, zero)
    assert_same_bits(fake_quant(fmt, once, scale, zero), once)


@given(formats, matrices)
def test_fake_quant_is_monotone(fmt, x):
    flat = jnp.asarray(np.sort(x.reshape(1, -1)))
    assert (np.diff(np.asarray(fake_quant(fmt, flat, *grid_of(fmt, flat * 0.5)))) >= 0).all()


@given(formats, matrices)
def test_values_within_the_range_move_by_at_most_about_half_a_step(fmt, x):
    scale, zero = (a if a is None else np.asarray(a) for a in grid_of(fmt, x))
    error = np.abs(np.asarray(fake_quant(fmt, jnp.asarray(x), scale, zero)) - x)
    # Rounding the zero point can cut up to another half step off an end; the scale has a floor.
    assert (error <= np.maximum(scale, SMALLEST_SCALE) * (0.5 if fmt.symmetric else 1.0) + np.abs(x) * 1e-6).all()


@given(formats, matrices)
def test_zero_is_always_representable(fmt, x):
    scale, zero = grid_of(fmt, x)
    assert_same_bits(fake_quant(fmt, jnp.zeros(x.shape), scale, zero), jnp.zeros(x.shape))
    if zero is not None:
        assert (np.asarray(zero) == np.rint(zero)).all() and (zero >= fmt.qmin).all() and (zero <= fmt.qmax).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_constant_rows_are_finite_and_zero_rows_get_scale_one(fmt):
    x = jnp.asarray([[0.0] * 4, [5.0] * 4, [-3.0] * 4])
    scale, zero = grid_of(fmt, x)
    assert scale[0, 0] == 1
    np.testing.assert_allclose(fake_quant(fmt, x, scale, zero), x, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_float_types_are_computed_in_float32(dtype):
    x = jnp.linspace(-3, 3, 64, dtype=jnp.float32)[None].astype(dtype)
    for fmt in (Int(4), Int(8, symmetric=False)):
        grid = grid_of(fmt, x)
        assert grid[0].dtype == jnp.float32
        out = fake_quant(fmt, x, *grid)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, simulate(fmt, x, *grid).astype(dtype))


def test_rounding_is_half_to_even():
    x = jnp.asarray([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    np.testing.assert_array_equal(encode(Int(4), x, jnp.ones((1, 1)), None), [[-2, -2, 0, 0, 2, 2]])


def test_vmap_over_candidate_grids_equals_a_loop():
    x, fmt = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32), Int(4, symmetric=False)
    ends = jnp.linspace(0.1, 3.0, 17)[:, None, None]
    scales, zeros = grid_from_range(fmt, -ends, ends)
    assert zeros is not None
    together = jax.vmap(lambda s, z: fake_quant(fmt, x, s, z))(scales, zeros)
    assert_same_bits(together, jnp.stack([fake_quant(fmt, x, s, z) for s, z in zip(scales, zeros)]))


# Gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [Int(4), Int(4, symmetric=False), Int(8), Int(2, symmetric=False)], ids=str)
def test_the_gradient_of_x_passes_inside_the_range_and_stops_outside(fmt):
    x = jnp.linspace(-3, 3, 101)[None]
    scale, zero = grid_from_range(fmt, -jnp.ones((1, 1)), jnp.ones((1, 1)))
    offset = 0 if zero is None else float(zero[0, 0])
    steps = np.rint(np.asarray(x) / np.asarray(scale)) + offset
    gradient = jax.jit(jax.grad(lambda x: fake_quant(fmt, x, scale, zero).sum()))(x)
    np.testing.assert_allclose(gradient, (steps >= fmt.qmin) & (steps <= fmt.qmax), rtol=1e-6)
    at_the_ends = jax.grad(lambda x: fake_quant(fmt, x, scale, zero).sum())(decode_ends(fmt, scale, zero))
    np.testing.assert_allclose(at_the_ends, 1, rtol=1e-6)


def decode_ends(fmt, scale, zero):
    return decode(fmt, jnp.asarray([[fmt.qmin, fmt.qmax]]), scale, zero)


def test_the_gradients_of_scale_and_zero_are_those_of_lsq():
    fmt, scale, zero = Int(4, symmetric=False), jnp.full((1, 1), 0.5), jnp.full((1, 1), 6.0)
    x = jnp.asarray([[-9.0, -1.3, 0.1, 2.2, 9.0]])
    slope = jax.vmap(jax.grad(lambda s, z, x: fake_quant(fmt, x, s, z).sum(), argnums=(0, 1)), in_axes=(None, None, 0))
    of_scale, of_zero = slope(scale, zero, x.reshape(5, 1, 1))
    ratio = np.asarray(x[0]) / 0.5
    np.testing.assert_allclose(of_scale.ravel(), [0 - 6, *(np.rint(ratio) - ratio)[1:4], 15 - 6], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_zero.ravel(), [-0.5, 0, 0, 0, -0.5], atol=1e-6)


def test_a_range_can_be_learned():
    """d fake_quant / d high is 1 for what is clipped at high, as in PACT."""
    fmt = Int(8, symmetric=False)

    def top(high):
        return fake_quant(fmt, jnp.full((1, 1), 50.0), *grid_from_range(fmt, jnp.full((1, 1), -1.0), high)).sum()

    np.testing.assert_allclose(jax.grad(top)(jnp.full((1, 1), 2.0)), 1, atol=0.02)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 0, -4, 9, 16, 4.0, "4"])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(ValueError, match="from 2 to 8"):
        Int(bits)


def test_integers_are_not_quantized_again():
    with pytest.raises(TypeError, match="int8"):
        encode(Int(4), jnp.zeros((2, 2), jnp.int8), jnp.ones((1, 1)), None)


# The published code's numbers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip("the golden file shared/goldens/fakequant_int.npz is not here")
    return dict(np.load(GOLDEN))


def test_fake_quantized_values_scales_and_codes_equal_the_reference_exactly(golden):
    checked = 0
    for key in golden:
        setting = re.match(r"(\w+?)Quantize__(per_tensor|per_channel0|ch0|ch-1|g\d+)?_*b(\d)_(sym|asym)__(\w+)$", key)
        if not setting:
            continue
        kind, where, bits, sign, result = setting.groups()
        fmt = Int(int(bits), sign == "sym")
        of_weight = kind in ("Fixed", "GroupFixed") or where == "per_channel0" or result == "out_W"
        x = golden["W" if of_weight else "x"]
        whole = where in ("per_tensor", "ch-1")
        rows = jnp.asarray(x.reshape(-1, int(where[1:]) if where and where[0] == "g" else x.shape[-1]))
        scale, zero = grid_of(fmt, rows, (0, 1) if whole else 1)
        if result in ("out", "out_W"):
            found = fake_quant(fmt, rows, scale, zero)
        elif result == "codes":
            found = encode(fmt, rows, scale, zero)
        elif result == "scale":
            found = scale
        else:
            found = jnp.zeros_like(scale) if zero is None else zero
        np.testing.assert_array_equal(np.asarray(found).reshape(golden[key].shape), golden[key], err_msg=key)
        checked += 1
    assert checked == 138


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_grids_equal_the_reference_exactly(golden, bits, symmetric):
    low, high = (jnp.asarray(golden[f"qp__{end}"]) for end in ("min", "max"))
    scale, zero = grid_from_range(Int(bits, symmetric), low, high)
    key = f"qp__b{bits}_{'sym' if symmetric else 'asym'}__"
    only_zero = np.asarray((low == 0) & (high == 0))  # where the reference has machine epsilon and jaxq has 1
    np.testing.assert_array_equal(scale, np.where(only_zero, 1, golden[key + "scale"]))
    np.testing.assert_array_equal(0 if zero is None else zero, golden[key + "zp"] if zero is not None else 0)


@pytest.mark.parametrize("bits", [8, 6, 5, 4])
@pytest.mark.parametrize("jit", [False, True])
def test_zero_points_on_rounding_ties_equal_the_reference_exactly(golden, bits, jit):
    span = jnp.asarray(golden["tie__t"])
    make = jax.jit(grid_from_range, static_argnums=0) if jit else grid_from_range
    scale, zero = make(Int(bits, symmetric=False), -span, span)
    np.testing.assert_array_equal(scale, golden[f"tie__b{bits}__scale"])
    np.testing.assert_array_equal(zero, golden[f"tie__b{bits}__zp"])
