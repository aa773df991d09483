"""Steps on a small pre-norm block with outliers: each formula, each used alone, and what composition does."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.search import exhaustive
from jaxq.steps import (
    Step,
    channel_range,
    channel_scale,
    channel_shift,
    fed_by_norm,
    foldable,
    group_outputs,
    next_input,
    nothing,
    os_plus,
    run_time_shift,
    transformed,
)
from jaxq.steps.group import weight_range

C = 24


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    x = x * p["scale"][None, None]
    return x + p["bias"][None, None] if "bias" in p else x


def linear(x, p):
    y = x @ p["kernel"]
    return y + p["bias"][None, None] if "bias" in p else y


def forward(params, x):
    h = norm(x, params["norm"])
    h = jax.nn.silu(linear(h, params["gate"])) * linear(h, params["up"])
    return x + linear(h, params["down"])


def make(bias: bool = True):
    rng = np.random.default_rng(3)
    scale, shift = rng.uniform(0.5, 1.5, C), rng.normal(size=C) * 0.2
    scale[5], shift[5], scale[11], shift[17] = 9, 6, 14, -11

    def kernel(i, o):
        leaf = {"kernel": rng.normal(size=(i, o)) / np.sqrt(i)}
        return leaf | ({"bias": rng.normal(size=o) * 0.1} if bias else {})

    params = {
        "norm": {"scale": scale} | ({"bias": shift} if bias else {}),
        "gate": kernel(C, 32),
        "up": kernel(C, 32),
        "down": kernel(32, C),
    }
    x = rng.normal(size=(2, 4, 7, C))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))


def run(step: Step, bias: bool = True, **options):
    params, xs = make(bias)
    groups = {}
    keep = lambda g: groups.update({g.plan.name: g})  # noqa: E731
    quantized = jaxq.calibrate(forward, params, list(xs), step, on_group=keep, **options)
    return params, xs, quantized, groups


def error(quantized, params, xs) -> float:
    want = forward(params, xs[0])
    return float(jnp.linalg.norm(jaxq.execute(forward)(quantized, xs[0]) - want) / jnp.linalg.norm(want - xs[0]))


def test_shift_is_the_middle_of_each_channel_and_folds_into_the_norm() -> None:
    params, xs, quantized, _ = run(channel_shift())
    h = np.concatenate([norm(x, params["norm"]).reshape(-1, C) for x in xs])
    middle = (h.max(0) + h.min(0)) / 2
    np.testing.assert_allclose(quantized.transforms["gate/kernel"].shift, middle, rtol=1e-5, atol=1e-5)
    assert not quantized.inputs and list(quantized.transforms) == ["gate/kernel"]
    np.testing.assert_allclose(quantized.params["norm"]["bias"], params["norm"]["bias"] - middle, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(forward(quantized.params, xs[0]), forward(params, xs[0]), rtol=1e-4, atol=1e-4)


def test_shift_can_look_at_fewer_batches() -> None:
    params, xs, quantized, _ = run(channel_shift(batches=1))
    h = norm(xs[0], params["norm"]).reshape(-1, C)
    np.testing.assert_allclose(
        quantized.transforms["gate/kernel"].shift, (h.max(0) + h.min(0)) / 2, rtol=1e-5, atol=1e-5
    )


def test_a_shift_needs_biases_and_the_run_time_shift_does_not() -> None:
    params, xs, plain, _ = run(channel_shift(), bias=False)
    assert not plain.transforms
    params, xs, shifted, _ = run(run_time_shift(), bias=False)
    (quant,) = shifted.inputs.values()
    assert set(quant.bias) == {"gate/kernel", "up/kernel"} and quant.shift is not None
    np.testing.assert_allclose(jaxq.execute(forward)(shifted, xs[0]), forward(params, xs[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", [pytest.param(group_outputs, marks=pytest.mark.slow), next_input])
def test_scale_alone_beats_rounding_to_nearest(objective) -> None:
    end = jaxq.quantize(jaxq.Int(6), jaxq.Int(6))
    params, xs, quantized, groups = run(jaxq.chain(channel_scale(lower=1.0, objective=objective, batches=None), end))
    params, xs, nearest, _ = run(end)
    assert error(quantized, params, xs) < 0.7 * error(nearest, params, xs)
    log = groups["gate/kernel"].log
    assert log["losses"][log["best"]] == np.nanmin(log["losses"]) < log["losses"][0]
    assert log["folded"] and log["fold_error"] < 1e-5
    assert (quantized.transforms["gate/kernel"].scale >= 1).all()


def test_the_scale_is_searched_on_the_first_four_batches() -> None:
    params, (first, second) = make()
    xs = [first, second, first, second, -first]

    def scale(xs: list, **given):
        step = jaxq.chain(channel_scale(lower=1.0, **given), jaxq.quantize(jaxq.Int(6), jaxq.Int(6)))
        return np.asarray(jaxq.calibrate(forward, params, xs, step).transforms["gate/kernel"].scale)

    np.testing.assert_array_equal(scale(xs), scale(xs[:4]))
    np.testing.assert_array_equal(scale(xs, batches=1), scale(xs[:1]))
    assert (scale(xs, batches=1) != scale(xs)).any() and (scale(xs, batches=None) != scale(xs)).any()


def test_the_fast_search_agrees_with_the_exhaustive_one() -> None:
    end = jaxq.quantize(jaxq.Int(8), jaxq.Int(8))
    *_, slow = run(jaxq.chain(os_plus(scale=channel_scale(search=exhaustive())), end))
    *_, fast = run(jaxq.chain(os_plus(), end))
    for name in ("gate/kernel", "down/kernel"):
        exact, found = slow[name].log, fast[name].log
        tried = ~np.isnan(found["losses"])
        assert tried.sum() < len(tried) / 2
        assert np.nanmin(found["losses"]) <= 1.02 * exact["losses"].min()
        if name == "gate/kernel":  # the same input: the very same losses
            np.testing.assert_array_equal(found["losses"][tried], exact["losses"][tried])


def test_scale_without_a_quantizer_is_an_error() -> None:
    with pytest.raises(ValueError, match="gate/kernel.*quantize"):
        run(os_plus())


def test_smooth_quant_formula() -> None:
    params, xs, quantized, _ = run(jaxq.smooth_quant(0.6))
    x = np.abs(np.concatenate([norm(x, params["norm"]).reshape(-1, C) for x in xs])).max(0)
    w = np.maximum(np.abs(params["gate"]["kernel"]).max(1), np.abs(params["up"]["kernel"]).max(1))
    np.testing.assert_allclose(quantized.transforms["gate/kernel"].scale, x**0.6 / w**0.4, rtol=1e-4)
    np.testing.assert_allclose(forward(quantized.params, xs[0]), forward(params, xs[0]), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="alpha"):
        jaxq.smooth_quant(1.5)


def test_gamma_migration_leaves_the_norm_without_a_scale() -> None:
    params, xs, quantized, _ = run(jaxq.gamma_migration())
    assert list(quantized.transforms) == ["gate/kernel"]
    np.testing.assert_array_equal(quantized.transforms["gate/kernel"].scale, params["norm"]["scale"])
    np.testing.assert_allclose(quantized.params["norm"]["scale"], np.ones(C), rtol=1e-6)
    np.testing.assert_allclose(forward(quantized.params, xs[0]), forward(params, xs[0]), rtol=1e-4, atol=1e-4)


def test_the_product_of_a_gate_folds_into_up_even_when_up_is_quantized() -> None:
    params, xs, quantized, groups = run(jaxq.chain(os_plus(), jaxq.quantize()))
    assert "down/kernel" in quantized.transforms and groups["down/kernel"].log["folded"]
    s = quantized.transforms["down/kernel"].scale
    assert (np.asarray(s) > 1).any()
    assert error(quantized, params, xs) < 0.055  # rounding to nearest alone: 0.061


def test_transforms_compose() -> None:
    params, xs = make()
    seen = []
    z1, s1, z2, s2 = (jnp.asarray(np.random.default_rng(i).uniform(0.5, 2, C), jnp.float32) for i in range(4))

    def twice(group):
        seen.append(group)
        return transformed(transformed(group, shift=z1, scale=s1), shift=z2, scale=s2)

    quantized = jaxq.calibrate(forward, params, list(xs), jaxq.partition({"gate/*": Step(touch_all, twice)}))
    t = quantized.transforms["gate/kernel"]
    x = seen[0].x[0]
    np.testing.assert_allclose((x - t.shift[None, None]) / t.scale[None, None],
                               ((x - z1[None, None]) / s1[None, None] - z2[None, None]) / s2[None, None],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    np.testing.assert_allclose(forward(quantized.params, xs[0]), forward(params, xs[0]), rtol=1e-4, atol=1e-4)


def touch_all(plan, spec):
    return replace(spec, touched=True)


def test_partition_takes_the_first_rule_and_skip_leaves_alone() -> None:
    four, eight = jaxq.quantize(jaxq.Int(4), None), jaxq.quantize(jaxq.Int(8), None)
    _, _, quantized, _ = run(jaxq.partition({"gate/*": four, "*": eight}))
    bits = {k: quantized.params[k]["kernel"].format.bits for k in ("gate", "up", "down")}
    assert bits == {"gate": 4, "up": 4, "down": 8}  # gate and up read one activation: one group, one rule
    _, _, quantized, _ = run(jaxq.skip(["down/*"], eight))
    assert isinstance(quantized.params["down"]["kernel"], jax.Array)
    _, _, quantized, _ = run(jaxq.skip(["*"], eight))
    assert not any(isinstance(quantized.params[k]["kernel"], jaxq.QTensor) for k in ("gate", "up", "down"))
    with pytest.raises(ValueError, match="dawn.*down/kernel"):
        run(jaxq.skip(["dawn/*"], eight))


def test_a_rule_that_never_applies_is_refused() -> None:
    four, eight = jaxq.quantize(jaxq.Int(4), None), jaxq.quantize(jaxq.Int(8), None)
    with pytest.raises(ValueError, match=r"'gate/\*' never applies, '\*' before it"):
        jaxq.partition({"*": eight, "gate/*": four})
    with pytest.raises(ValueError, match=r"'layers/\*/q' never applies, 'layers/\*' before it"):
        jaxq.partition({"layers/*": eight, "down*": four, "layers/*/q": four})
    jaxq.partition({"layer?": four, "layer*": eight, "*/q": four, "*": eight})
    jaxq.skip(["embed*", "embed/embedding", "*"], eight)  # redundant, but nothing is lost


def test_a_path_with_brackets_names_itself_and_a_bare_string_is_refused() -> None:
    params, x = {"l[0]": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}, jnp.ones((2, 4))
    step = jaxq.skip(["l[0]"], jaxq.quantize())
    inputs = jaxq.calibrate(lambda p, x: jnp.tanh(x @ p["l[0]"]) @ p["b"], params, [x], step).inputs
    assert set(inputs) == {"b"}
    with pytest.raises(TypeError, match=r"skip: 'b' is one pattern; give a list"):
        jaxq.skip("b", jaxq.quantize())


@pytest.mark.parametrize("wrong", [8, "int8", jaxq.Int])
def test_what_is_no_description_of_numbers_is_refused(wrong) -> None:
    for name in ("weights", "activations", "attention", "embeddings"):
        with pytest.raises(TypeError, match="neither a format, as Int"):
            jaxq.quantize(**{name: wrong})


def test_where_and_nothing() -> None:
    _, _, quantized, _ = run(
        jaxq.chain(os_plus(shift=nothing(), scale=channel_scale(where=fed_by_norm)), jaxq.quantize())
    )
    assert list(quantized.transforms) == ["gate/kernel"] and quantized.transforms["gate/kernel"].shift is None
    _, _, _, groups = run(jaxq.quantize())
    assert {n: (fed_by_norm(g.plan), foldable(g.plan)) for n, g in groups.items()} == {
        "gate/kernel": (True, True),
        "down/kernel": (False, True),
    }


def test_channel_and_weight_ranges() -> None:
    params, xs, _, groups = run(Step(touch_all, lambda g: g))
    group = groups["gate/kernel"]
    low, high = channel_range(group)
    h = np.concatenate([norm(x, params["norm"]).reshape(-1, C) for x in xs])
    np.testing.assert_allclose(low, h.min(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(high, h.max(0), rtol=1e-5, atol=1e-6)
    w = np.maximum(np.abs(params["gate"]["kernel"]).max(1), np.abs(params["up"]["kernel"]).max(1))
    np.testing.assert_array_equal(weight_range(group), w)
