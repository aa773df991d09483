"""Range estimators: the published code's numbers, and the laws of measuring and merging."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxq import observers
from jaxq.formats import Int, fake_quant, grid_from_range
from jaxq.observers import observe, token_range

GOLDENS = Path(__file__).resolve().parents[1] / "../shared/goldens"

FACTORIES = [
    observers.min_max,
    observers.average_min_max,
    observers.ema_min_max,
    observers.average_quantile,
    observers.ema_quantile,
    observers.mse,
    observers.average_mse,
    observers.lsq_plus,
    lambda: observers.token_quantile(0.9),
]
everyone = pytest.mark.parametrize("observer", [make() for make in FACTORIES], ids=lambda observer: observer.name)

values = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
batches = hnp.arrays(np.float32, (2, 4, 3), elements=values)


def golden(name):
    if not (GOLDENS / name).exists():
        pytest.skip(f"the golden file shared/goldens/{name} is not here")
    return dict(np.load(GOLDENS / name))


def one_row(x, mask=None):
    """`x` as one row of tokens, with the mask as `valid`."""
    valid = None if mask is None else jnp.asarray(mask.reshape(-1).astype(bool))
    return jnp.asarray(x.reshape(1, -1, x.shape[-1])), valid


def fmt_of(setting):
    return Int(int(setting[1]), setting.endswith("_sym"))


def assert_range(found, low, high, rtol=1e-6):
    np.testing.assert_allclose(np.ravel(found[0]), np.ravel(low), rtol=rtol)
    np.testing.assert_allclose(np.ravel(found[1]), np.ravel(high), rtol=rtol)


# The published code's numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("setting", ["b8_sym", "b4_asym"])
@pytest.mark.parametrize(
    "name, observer",
    [
        ("AvgMinMax", observers.average_min_max()),
        ("EMAMinMax", observers.ema_min_max()),
        ("AvgQuantile", observers.average_quantile()),
        ("EMAQuantile", observers.ema_quantile()),
    ],
)
def test_activation_ranges_after_each_batch_equal_the_reference(name, observer, setting, masked):
    """To 1e-6 relative."""
    data = golden("obs_activation.npz")
    key = f"{name}Observer__{setting}__{'mask' if masked else 'nomask'}__"
    xs, valids = zip(*(one_row(data[f"x{i}"], data[f"mask{i}"] if masked else None) for i in range(3)))
    for i in range(3):
        low, high = observe(observer, fmt_of(setting), xs[: i + 1], valids[: i + 1])
        assert_range((low, high), data[key + "min_val"][i], data[key + "max_val"][i])
    scale, zero = grid_from_range(fmt_of(setting), low[:, None, None], high[:, None, None])
    quantized = fake_quant(fmt_of(setting), xs[2], scale, zero).reshape(data["x2"].shape)
    # Ranges that differ in the last bit may move a value on a rounding tie by one step.
    np.testing.assert_allclose(quantized, data[key + "fake_quant_last"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_each_batch_measured_by_min_max_equals_the_reference_which_keeps_the_last_only(masked):
    data = golden("obs_activation.npz")
    key = f"MinMaxObserver__b8_sym__{'mask' if masked else 'nomask'}__"
    for i in range(3):
        x, valid = one_row(data[f"x{i}"], data[f"mask{i}"] if masked else None)
        found = observers.min_max().measure(x, Int(8), valid)
        assert_range(found, data[key + "min_val"][i], data[key + "max_val"][i], rtol=0)


@pytest.mark.parametrize("setting", ["b8_sym", "b4_sym"])
@pytest.mark.parametrize("name", ["MinMax", "LSQPlus"])
@pytest.mark.parametrize("axis", ["ch-1", "ch0"])
def test_weight_ranges_equal_the_reference(name, setting, axis):
    """To 2e-6 relative (the standard deviation's order of summation)."""
    data = golden("obs_weight_minmax_lsq.npz")
    rows = data["W"].reshape(1 if axis == "ch-1" else 24, 1, -1)
    observer = observers.min_max() if name == "MinMax" else observers.lsq_plus()
    key = f"{name}Observer__{setting}__{axis}__"
    found = observe(observer, fmt_of(setting), [jnp.asarray(rows)])
    assert_range(found, data[key + "min_val"], data[key + "max_val"], rtol=2e-6)


@pytest.mark.parametrize(
    "percentile", [1.0, 0.995, 0.9, 0.5, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.985, 0.97))]
)
@pytest.mark.parametrize("masked", [True, False])
def test_token_quantile_equals_the_reference(percentile, masked):
    """The ranges are attained values: equal, up to the mean over batches (1e-6)."""
    data = golden("obs_tokenwise.npz")
    key = f"p{percentile}__{'mask' if masked else 'nomask_seq'}__"
    xs, valids = zip(*(one_row(data[f"x{i}"], data[f"mask{i}"] if masked else None) for i in range(3)))
    for i in range(3):
        found = observe(observers.token_quantile(percentile), Int(6, False), xs[: i + 1], valids[: i + 1])
        assert_range(found, data[key + "min_val"][i], data[key + "max_val"][i])


def test_token_quantile_of_a_negative_tensor_equals_the_reference():
    data = golden("obs_tokenwise.npz")
    for percentile in (1.0, 0.9, 0.5):
        x, valid = one_row(data["xneg"], data["mask0"])
        found = token_range(x, percentile, valid)
        assert_range(found, data[f"xneg__p{percentile}__min_val"], data[f"xneg__p{percentile}__max_val"], rtol=0)


@pytest.mark.parametrize("setting", ["b8_sym", "b6_sym", "b4_sym"])
@pytest.mark.parametrize("name, observer", [("MSE", observers.mse()), ("AvgMSE", observers.average_mse())])
def test_mse_over_two_batches_equals_the_reference(name, observer, setting):
    """The same candidates are chosen: ranges to 1e-6 relative."""
    data = golden("obs_mse.npz")
    xs = [one_row(data["x"])[0], one_row(data["x2"])[0]]
    key = f"{name}Observer__{setting}__two_batches__"
    for i in range(2):
        found = observe(observer, fmt_of(setting), xs[: i + 1])
        assert_range(found, data[key + "min_val"][i], data[key + "max_val"][i])


@pytest.mark.parametrize("setting, source", [(f"b{b}_asym_{x}", x) for b in (8, 4) for x in ("xpos", "xneg")])
def test_mse_of_one_signed_data_equals_the_reference(setting, source):
    data = golden("obs_mse.npz")
    found = observe(observers.mse(), fmt_of(setting[:7]), [one_row(data[source])[0]])
    assert_range(found, data[f"MSEObserver__{setting}__min_val"], data[f"MSEObserver__{setting}__max_val"])


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_two_dimensional_mse_search_equals_the_reference(bits):
    data = golden("obs_mse.npz")
    key = f"MSEObserver__b{bits}_asym_2d__"
    found = observe(observers.mse(), Int(bits, False), [one_row(data["x"])[0]])
    assert_range(found, data[key + "min_val"], data[key + "max_val"])


@pytest.mark.parametrize("setting", ["b4_sym", "b8_sym", "b4_asym", "b3_asym"])
def test_mse_of_each_output_channel_equals_the_reference(setting):
    data = golden("obs_mse.npz")
    key = f"MSEObserver__{setting}_perchannel_W__"
    found = observe(observers.mse(), fmt_of(setting), [jnp.asarray(data["W"])[:, None]])
    assert_range(found, data[key + "min_val"], data[key + "max_val"])


# Measuring ----------------------------------------------------------------------------------------------------------


@everyone
@given(x=batches)
def test_a_mask_equals_removing_the_tokens(observer, x):
    fmt, valid = Int(3), np.array([True, False, True, True])
    masked = jax.jit(observer.measure, static_argnums=1)(jnp.asarray(x), fmt, jnp.asarray(valid))
    removed = jax.jit(observer.measure, static_argnums=1)(jnp.asarray(x[:, valid]), fmt)
    size = np.abs(x).max() + 1e-30
    if "mse" not in observer.name:
        np.testing.assert_allclose(masked, removed, rtol=1e-5, atol=1e-6 * size)
        return
    # Candidates of equal error may be exchanged by the order of summation; the error may not change.
    for row, low, high, other_low, other_high in zip(x[:, valid], *masked, *removed):
        mine, other = squared_error(fmt, row, low, high), squared_error(fmt, row, other_low, other_high)
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-9 * size**2)


def squared_error(fmt, row, low, high):
    scale, zero = grid_from_range(fmt, low.reshape(1, 1), high.reshape(1, 1))
    return float(((fake_quant(fmt, jnp.asarray(row), scale, zero) - row) ** 2).mean())


@everyone
@pytest.mark.parametrize("seed", range(3))
def test_eager_and_jit_agree_and_rows_do_not_mix(observer, seed):
    x = jnp.asarray(np.random.default_rng(seed).standard_t(3, size=(3, 5, 7)), jnp.float32)
    fmt, measure = Int(4), jax.jit(observer.measure, static_argnums=1)
    together = measure(x, fmt)
    np.testing.assert_allclose(observer.measure(x, fmt), together, rtol=1e-5)
    np.testing.assert_array_equal(measure(x, fmt), together)
    apart = [measure(x[i : i + 1], fmt) for i in range(3)]
    np.testing.assert_allclose(jnp.concatenate([jnp.stack(r) for r in apart], axis=1), together, rtol=1e-5)
    assert all(a.shape == (3,) and a.dtype == jnp.float32 for a in together)


@everyone
@given(x=batches)
def test_ranges_lie_within_the_data_and_zero(observer, x):
    low, high = map(np.asarray, jax.jit(observer.measure, static_argnums=1)(jnp.asarray(x), Int(4)))
    if observer.name == "lsq_plus":
        return
    widest = np.abs(x).max(axis=(1, 2)) * (1 + 1e-6)  # mse searches symmetrically around 0
    least, most = (-widest, widest) if "mse" in observer.name else (x.min(axis=(1, 2)), x.max(axis=(1, 2)))
    assert (low <= high).all()
    assert (low >= np.minimum(least, 0)).all() and (high <= np.maximum(most, 0)).all()


@given(x=batches)
def test_min_max_contains_every_value(x):
    low, high = map(np.asarray, observers.min_max().measure(jnp.asarray(x), Int(4)))
    np.testing.assert_array_equal(low, x.min(axis=(1, 2)))
    np.testing.assert_array_equal(high, x.max(axis=(1, 2)))


@pytest.mark.parametrize("fmt", [Int(4), Int(3, False)], ids=str)
def test_mse_is_never_worse_than_min_max(fmt):
    x = jnp.asarray(np.random.default_rng(1).standard_t(2, size=(1, 20, 16)), jnp.float32)
    best, widest = (observe(o, fmt, [x]) for o in (observers.mse(), observers.min_max()))
    assert squared_error(fmt, x[0], *best) <= squared_error(fmt, x[0], *widest)


def test_the_quantile_is_the_histograms():
    x = np.abs(np.random.default_rng(2).standard_t(2, size=(2, 50, 20))).astype(np.float32)
    valid = np.arange(50) % 3 > 0
    for fraction in (0.0, 0.5, 0.99, 1.0):
        high = observers.average_quantile(fraction).measure(jnp.asarray(x), Int(8), jnp.asarray(valid))[1]
        for row, found in zip(x[:, valid], high):
            counts = np.histogram(row, 2048, (0, row.max()))[0].cumsum()
            clip = (np.argmax(counts >= fraction * row.size) + 0.5) * row.max() / 2048
            np.testing.assert_allclose(found, min(clip, row.max()), rtol=1e-5)


def test_token_range_at_percentile_one_is_min_max_and_takes_a_traced_percentile():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 30, 8)), jnp.float32)
    percentiles = jnp.asarray([1.0, 0.9, 0.5])
    lows, highs = jax.jit(jax.vmap(token_range, in_axes=(None, 0)))(x, percentiles)
    np.testing.assert_array_equal((lows[0], highs[0]), observers.min_max().measure(x, Int(8)))
    for i, percentile in enumerate((1.0, 0.9, 0.5)):
        np.testing.assert_array_equal((lows[i], highs[i]), token_range(x, percentile))
    assert (jnp.diff(highs, axis=0) <= 0).all() and (jnp.diff(lows, axis=0) >= 0).all()


def test_all_zero_data_and_lower_precision_are_ranged():
    zeros = jnp.zeros((1, 3, 4), jnp.bfloat16)
    for make in FACTORIES:
        for fmt in [Int(4)] if make is observers.lsq_plus else [Int(4), Int(4, False)]:
            low, high = observe(make(), fmt, [zeros])
            assert low.dtype == high.dtype == jnp.float32
            assert (low == 0).all() and (high == 0).all()


@everyone
def test_a_batch_without_a_valid_token_or_with_nan_is_not_finite(observer):
    x = jnp.ones((1, 3, 4))
    measure = jax.jit(observer.measure, static_argnums=1)
    nothing = measure(x, Int(4), jnp.zeros(3, bool))
    assert not np.isfinite(nothing).all()
    assert not np.isfinite(measure(x.at[0, 1, 2].set(jnp.nan), Int(4))).all()


# Merging ------------------------------------------------------------------------------------------------------------


def test_averages_count_each_batch_once():
    xs = [jnp.full((1, 2, 2), value) * jnp.asarray([[[-1.0, 1.0]]]) for value in (1.0, 2.0, 6.0, 3.0)]
    low, high = observe(observers.average_min_max(), Int(8), xs)
    np.testing.assert_allclose((low[0], high[0]), (-3.0, 3.0), rtol=1e-6)


@given(st.lists(batches, min_size=1, max_size=4))
def test_running_extrema_do_not_depend_on_the_order_and_equal_one_large_batch(xs):
    forward = observe(observers.min_max(), Int(8), map(jnp.asarray, xs))
    np.testing.assert_array_equal(forward, observe(observers.min_max(), Int(8), map(jnp.asarray, xs[::-1])))
    np.testing.assert_array_equal(forward, observers.min_max().measure(jnp.concatenate(xs, axis=1), Int(8)))


@everyone
def test_merging_equal_ranges_changes_nothing_and_the_count_may_be_traced(observer):
    state = (jnp.asarray([-1.5, 0.0]), jnp.asarray([2.25, 3.0]))
    for count in (1, 7):
        np.testing.assert_allclose(observer.merge(state, state, count), state, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(observer.merge)(state, state, jnp.int32(count)), state, rtol=1e-6)


def test_the_moving_average_starts_with_the_first_batch():
    xs = [jnp.full((1, 1, 1), value) for value in (1.0, 2.0, 4.0)]
    _, high = observe(observers.ema_min_max(decay=0.5), Int(8), xs)
    np.testing.assert_allclose(high, 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 4)


# Descriptions and errors --------------------------------------------------------------------------------------------


def test_equal_arguments_give_the_same_hashable_observer():
    assert observers.mse() is observers.mse()
    assert observers.ema_min_max() is observers.ema_min_max(0.9) is observers.ema_min_max(decay=0.9)
    assert observers.ema_quantile() is observers.ema_quantile(decay=0.9) is not observers.ema_quantile(0.5)
    assert len({make() for make in FACTORIES}) == len({make().name for make in FACTORIES}) == len(FACTORIES)


@pytest.mark.parametrize(
    "make",
    [lambda: observers.ema_min_max(1.5), lambda: observers.average_quantile(-1), lambda: observers.token_quantile(99)],
)
def test_fractions_outside_0_to_1_are_refused(make):
    with pytest.raises(ValueError, match="between 0 and 1"):
        make()


@everyone
@pytest.mark.parametrize("shape", [(2, 3), (0, 3, 4), (1, 0, 4), (1, 3, 0)])
def test_shapes_that_cannot_be_measured_are_refused(observer, shape):
    with pytest.raises(ValueError, match="rows, tokens, features"):
        observer.measure(jnp.zeros(shape), Int(4))


@everyone
def test_masks_that_do_not_fit_are_refused(observer):
    for valid in (jnp.ones(2, bool), jnp.ones(3, jnp.int32), jnp.ones((1, 3), bool)):
        with pytest.raises(ValueError, match=r"bool\[3\]"):
            observer.measure(jnp.zeros((1, 3, 4)), Int(4), valid)


def test_observe_refuses_no_batches_and_too_few_masks():
    with pytest.raises(ValueError, match="at least one"):
        observe(observers.mse(), Int(4), [])
    with pytest.raises(ValueError, match="2 batches and 1 valids"):
        observe(observers.mse(), Int(4), [jnp.zeros((1, 1, 1))] * 2, [None])


def test_lsq_plus_is_for_symmetric_formats_and_two_values_or_more():
    with pytest.raises(ValueError, match="symmetric"):
        observe(observers.lsq_plus(), Int(4, False), [jnp.zeros((1, 1, 4))])
    with pytest.raises(ValueError, match="two values"):
        observe(observers.lsq_plus(), Int(4), [jnp.zeros((1, 1, 1))])
