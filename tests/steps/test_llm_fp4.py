"""LLM-FP4 as a step: pre- and post-shifted exponents, composition, and input that is not well."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.formats import fake_quant
from jaxq.steps import Clips, Step, channel_shift, log_clips, os_plus
from jaxq.storage import load, save

C, OUT = 16, 12
SEARCH = jaxq.FloatSearch(clips=log_clips(0.5, 2.0, 9), method=jaxq.exhaustive(), rounds=2)
E2M1 = jaxq.Float(2, 1)


def fp4(step: Callable = jaxq.llm_fp4, weights=4, activations=4) -> Step:
    return step(weights, activations, search=SEARCH)


def row(v: jax.Array, ndim: int) -> jax.Array:
    return v.reshape((1,) * (ndim - 1) + v.shape)


def forward(params, x):
    """A norm, fc1 with ReLU, fc2."""
    p = params["norm"]
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * row(p["scale"], x.ndim)
    x = x + row(p["bias"], x.ndim) if "bias" in p else x
    h = jax.nn.relu(x @ params["fc1"]["kernel"] + row(params["fc1"]["bias"], x.ndim))
    return h @ params["fc2"]["kernel"]


@cache
def made(bias: bool = True) -> tuple[dict, tuple[jax.Array, ...]]:
    """Parameters and two batches; channels differ by powers of ten."""
    rng = np.random.default_rng(3)
    params = {
        "norm": {"scale": np.exp(rng.normal(size=C) * 1.5)} | ({"bias": rng.normal(size=C)} if bias else {}),
        "fc1": {"kernel": rng.normal(size=(C, C)) / 4, "bias": rng.normal(size=C)},
        "fc2": {"kernel": rng.normal(size=(C, OUT)) / 4},
    }
    x = rng.normal(size=(2, 3, 7, C))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, tuple(x)))


@cache
def calibrated(step: Callable, bias: bool = True) -> jaxq.Quantized:
    params, xs = made(bias)
    return jaxq.calibrate(forward, params, list(xs), fp4(step))


def error(quantized: jaxq.Quantized, bias: bool = True) -> float:
    params, xs = made(bias)
    run = jax.jit(jaxq.execute(forward))
    pairs = [(run(quantized, x), forward(params, x)) for x in xs]
    assert all(np.isfinite(a).all() for a, _ in pairs)
    return float(sum(jnp.square(a - b).sum() for a, b in pairs) / sum(jnp.square(b).sum() for _, b in pairs))


def exponents_of(quantized: jaxq.Quantized) -> dict[str, np.ndarray]:
    """k of each group: its input is divided by 2**-k."""
    found = {name: -np.log2(t.scale) for name, t in quantized.transforms.items()}
    assert all((k == np.rint(k)).all() for k in found.values())
    return found


@pytest.mark.parametrize("step", [jaxq.pre_shifted_fp4, jaxq.post_shifted_fp4], ids=["pre", "post"])
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["layer_norm", "rms_norm"])
def test_exponents_are_exact_and_fold_into_the_norm_and_the_columns(step: Callable, bias: bool) -> None:
    params, xs = made(bias)
    quantized = calibrated(step, bias)
    found = exponents_of(quantized)
    assert "fc1/kernel" in found and len(np.unique(found["fc1/kernel"])) > 1
    for name, k in found.items():
        e = 3 - int(quantized.inputs[name].grid.mantissa.item())  # of 4 bits
        assert (k >= 0).all() and (k <= 2**e - 1).all()
        assert quantized.inputs[name].scale is None  # nothing is left to do at run time
    factor = 2.0 ** found["fc1/kernel"]
    np.testing.assert_array_equal(quantized.params["norm"]["scale"], np.asarray(params["norm"]["scale"]) * factor)
    folded = jaxq.fold(forward, params, quantized.transforms, xs[0])
    assert not folded.inputs
    # A power of two changes no digit of a product; sums may be taken in another order.
    np.testing.assert_allclose(forward(folded.params, xs[0]), forward(params, xs[0]), rtol=1e-6, atol=1e-6)
    assert error(folded, bias) < 1e-12


def test_exponents_that_fold_nowhere_stay_at_run_time() -> None:
    params, xs = made()
    w = {"w": params["fc1"]["kernel"]}
    x = xs[0] * row(jnp.exp2(jnp.asarray(np.arange(C) % 4, jnp.float32)), 3)
    run = lambda p, x: x @ p["w"]  # noqa: E731
    quantized = jaxq.calibrate(run, w, [x], fp4())
    (quant,) = quantized.inputs.values()
    assert quant.scale is not None and (np.log2(quant.scale) == np.rint(np.log2(quant.scale))).all()
    exact = jaxq.Quantized(
        {"w": w["w"] * quant.scale[:, None]}, {"w": jaxq.InputQuant(None, quant.scale, sites=("w",))}
    )
    np.testing.assert_allclose(jax.jit(jaxq.execute(run))(exact, x), run(w, x), rtol=1e-6, atol=1e-6)


def test_post_shifted_by_hand() -> None:
    """Q(x 2**k) 2**-k Q(W)."""
    params, xs = made()
    w, x = {"w": params["fc1"]["kernel"]}, xs[0]
    quantized = jaxq.calibrate(lambda p, x: x @ p["w"], w, [x], fp4(jaxq.post_shifted_fp4, E2M1, E2M1))
    (quant,), q = quantized.inputs.values(), quantized.params["w"]
    k = -np.log2(quant.scale)
    assert k.any() and q.exponents.dtype == jnp.int8
    np.testing.assert_array_equal(q.exponents, -k[:, None])
    x_hat = fake_quant(E2M1, x * row(jnp.asarray(2**k), 3), quant.grid.scale)
    want = np.asarray(x_hat) * 2.0**-k @ np.asarray(fake_quant(E2M1, w["w"], q.grid.scale))
    got = jax.jit(jaxq.execute(lambda p, x: x @ p["w"]))(quantized, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_exponents_pay_where_a_few_channels_are_large() -> None:
    """As they are in language models (LLM-FP4, section 4.2)."""
    params, xs = made()
    w = {"w": params["fc1"]["kernel"]}
    x = xs[0].at[..., :2].multiply(20)
    run = lambda p, x: x @ p["w"]  # noqa: E731

    def lost(step: Step) -> float:
        return float(jnp.square(jax.jit(jaxq.execute(run))(jaxq.calibrate(run, w, [x], step), x) - run(w, x)).sum())

    alone = lost(fp4(jaxq.fpq_baseline))
    assert max(lost(fp4(jaxq.pre_shifted_fp4)), lost(fp4(jaxq.post_shifted_fp4))) < 0.8 * alone
    assert alone < 0.8 * lost(jaxq.quantize(E2M1, E2M1))


def test_each_group_has_the_exponents_of_less_error() -> None:
    """Pre-shifted, the weights of a few loud channels dominate their rows; where all channels differ, so that weights
    that absorb the exponents come out even, they do not."""
    rng = np.random.default_rng(0)
    spread = np.exp2(-(np.arange(64) % 4)).astype(np.float32)
    x = rng.normal(size=(2, 64, 64)).astype(np.float32)
    loud = np.where(np.arange(64) < 2, 8, 1).astype(np.float32)
    w = rng.normal(size=(64, 32)).astype(np.float32)
    # In `even` the weights are large where the channels are small: 2**-k makes them equal.
    params = {"loud": jnp.asarray(w), "even": jnp.asarray(w / spread[:, None])}
    run = lambda p, x: (x * row(jnp.asarray(loud), 3) @ p["loud"], x * row(jnp.asarray(spread), 3) @ p["even"])  # noqa: E731
    groups: dict[str, dict[jaxq.steps.Step, float]] = {"loud": {}, "even": {}}
    for step in (jaxq.llm_fp4, jaxq.pre_shifted_fp4, jaxq.post_shifted_fp4):
        note = lambda g, step=step: groups[g.plan.name].update({step: min(g.log["losses"])})  # noqa: E731
        quantized = jaxq.calibrate(run, params, [jnp.asarray(x)], fp4(step), on_group=note)
        if step is jaxq.llm_fp4:
            kept = {name: quantized.params[name].exponents is not None for name in params}
    assert kept == {"loud": True, "even": False}
    for losses in groups.values():
        assert losses[jaxq.llm_fp4] == min(losses.values()) < max(losses.values())


@pytest.mark.parametrize("power", [5, -9])
def test_the_unit_of_weights_and_activations_does_not_matter(power: int) -> None:
    """The published search depends on it (B13)."""
    params, xs = made()
    w, x, factor = {"w": params["fc1"]["kernel"]}, xs[0], jnp.float32(2.0**power)
    run = lambda p, x: x @ p["w"]  # noqa: E731
    one = jaxq.calibrate(run, w, [x], fp4())
    for scale_w, scale_x in ((factor, 1), (1, factor)):
        scaled = {"w": w["w"] * scale_w}
        other = jaxq.calibrate(run, scaled, [x * scale_x], fp4())
        got = jax.jit(jaxq.execute(run))(other, x * scale_x)
        np.testing.assert_array_equal(got, jax.jit(jaxq.execute(run))(one, x) * factor)


def test_permuting_output_channels_permutes_the_result() -> None:
    params, xs = made()
    run = lambda p, x: x @ p["w"]  # noqa: E731
    order = np.random.default_rng(0).permutation(C)
    w = params["fc1"]["kernel"]
    one, other = (jaxq.calibrate(run, {"w": a}, [xs[0]], fp4(jaxq.fpq_baseline)) for a in (w, w[:, order]))
    np.testing.assert_array_equal(one.params["w"].codes[:, order], other.params["w"].codes)
    np.testing.assert_array_equal(one.inputs["w"].grid.scale, other.inputs["w"].grid.scale)


@pytest.mark.parametrize(
    "first",
    [pytest.param(os_plus(), marks=pytest.mark.slow), jaxq.smooth_quant(), channel_shift()],  # the others' two together
    ids=["os_plus", "smooth", "shift"],
)
def test_after_another_transform(first: Step) -> None:
    params, xs = made()
    quantized = jaxq.calibrate(forward, params, list(xs), jaxq.chain(first, fp4()))
    alone = jaxq.calibrate(forward, params, list(xs), jaxq.chain(first, jaxq.quantize(E2M1, E2M1)))
    assert error(quantized) < error(alone)
    folded = jaxq.fold(forward, params, quantized.transforms, xs[0])
    assert error(folded) < 1e-10


@pytest.mark.slow
def test_saved_exported_compiled_and_mapped(tmp_path) -> None:
    _, xs = made()
    run = jax.jit(jaxq.execute(forward))
    for name, step in (("pre", jaxq.pre_shifted_fp4), ("post", jaxq.post_shifted_fp4)):
        quantized = calibrated(step)
        want = run(quantized, xs[0])
        save(tmp_path / name, quantized, {})
        again, _ = load(tmp_path / name)
        assert jax.tree.structure(again) == jax.tree.structure(quantized)
        np.testing.assert_array_equal(run(again, xs[0]), want)
        np.testing.assert_array_equal(jax.export.export(run)(quantized, xs[0]).call(quantized, xs[0]), want)
        np.testing.assert_allclose(jaxq.execute(forward)(quantized, xs[0]), want, rtol=1e-4, atol=1e-4)
        mapped = jax.vmap(jaxq.execute(forward), (None, 0))(quantized, jnp.stack(xs))
        np.testing.assert_allclose(mapped[0], want, rtol=1e-4, atol=1e-4)


def test_zeros_and_constants() -> None:
    """Zero rows and columns of weights, zero and constant channels, nothing but zeros: no NaN, and zeros stay zero."""
    params, xs = made()
    w = params["fc1"]["kernel"].at[:, 3].set(0).at[5].set(0)
    x = xs[0].at[..., 2].set(0).at[..., 4].set(7.0)
    run = lambda p, x: x @ p["w"]  # noqa: E731
    for step in (jaxq.pre_shifted_fp4, jaxq.post_shifted_fp4, jaxq.fpq_baseline):
        quantized = jaxq.calibrate(run, {"w": w}, [x], fp4(step))
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(quantized) if a.dtype == jnp.float32)
        got = jax.jit(jaxq.execute(run))(quantized, x)
        assert np.isfinite(got).all() and not got[..., 3].any()
        assert jnp.square(got - x @ w).sum() < 0.05 * jnp.square(x @ w).sum()
        for a, b in ((w, x * 0), (w * 0, x)):
            quantized = jaxq.calibrate(run, {"w": a}, [b], fp4(step))
            assert not jax.jit(jaxq.execute(run))(quantized, b).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    params, xs = made()
    with pytest.raises(ValueError, match="fc1/kernel.*activation.*batch 1"):
        jaxq.calibrate(forward, params, [xs[0], xs[1].at[0, 0, 0].set(bad)], fp4())
    broken = {**params, "fc2": {"kernel": params["fc2"]["kernel"].at[0, 0].set(bad)}}
    with pytest.raises(ValueError, match="fc2/kernel.*weight"):
        jaxq.calibrate(forward, broken, list(xs), fp4())


def test_wrong_arguments() -> None:
    for step in (jaxq.pre_shifted_fp4, jaxq.post_shifted_fp4, jaxq.fpq_baseline):
        with pytest.raises(ValueError, match="weights.*no float format"):
            step(jaxq.Int(4))
        with pytest.raises(ValueError, match="activations.*no float format"):
            step(4, jaxq.per_tensor(jaxq.Int(8)))
        with pytest.raises(ValueError, match="activations.*PerToken.*PerTensor"):
            step(4, jaxq.per_token(E2M1))
        with pytest.raises(ValueError, match="weights.*PerToken"):
            step(jaxq.per_token(E2M1))
        with pytest.raises(ValueError, match="attention.*PerChannel"):
            step(attention=jaxq.per_channel(E2M1))
        for bits in (2, 9, 0):
            with pytest.raises(ValueError, match="3 to 8"):
                step(bits)
        with pytest.raises(ValueError, match="rounds is 0"):
            step(search=jaxq.FloatSearch(rounds=0))
    with pytest.raises(ValueError, match="no exponents"):
        jaxq.llm_fp4(exponents=())
    with pytest.raises(ValueError, match="contain 1"):
        jaxq.FloatSearch(clips=Clips((0.5, 0.9)))


def test_a_group_that_does_not_divide_is_named() -> None:
    params, xs = made()
    with pytest.raises(ValueError, match="groups of 5 do not divide"):
        jaxq.calibrate(forward, params, list(xs), fp4(weights=jaxq.per_group(E2M1, 5)))


@pytest.mark.parametrize("scanned", [False, True])
def test_a_weight_of_two_uses_has_an_input_searched_for_each(scanned: bool) -> None:
    def layer(h, w):
        return h + jnp.tanh(h @ w), None

    def used(params, x):
        w = params["w"]
        return jax.lax.scan(lambda h, _: layer(h, w), x, None, length=2)[0] if scanned else layer(layer(x, w)[0], w)[0]

    x = jax.random.normal(jax.random.key(0), (5, C))
    params = {"w": jax.random.normal(jax.random.key(1), (C, C)) / 4}
    q = jaxq.calibrate(used, params, [x], fp4(weights=E2M1, activations=E2M1))
    assert all(quant.grid is not None for quant in q.inputs.values())
    assert sum(quant.grid.scale.size for quant in q.inputs.values()) == 2
    assert float(jnp.abs(jaxq.execute(used)(q, x) - used(params, x)).mean()) < 0.2


def test_with_x64_enabled() -> None:
    params, xs = made()
    with jax.enable_x64(True):
        q = jaxq.calibrate(forward, params, list(xs), fp4())
    same, want = jax.tree.leaves(q), jax.tree.leaves(calibrated(jaxq.llm_fp4))
    assert [a.dtype for a in same] == [a.dtype for a in want]
