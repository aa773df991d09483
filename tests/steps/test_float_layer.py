"""The turns of weights and activations, on every kind of group."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.formats import fake_quant
from jaxq.steps import Exponents, log_clips
from tests.test_zoo import distance
from tests.zoo import bare, control
from tests.zoo.specimen import Specimen, linear, linear_params, norm, norm_params, normal

SEARCH = jaxq.FloatSearch(clips=log_clips(0.5, 2.0, 9), method=jaxq.exhaustive(), rounds=2)


def searched(s: Specimen, step: jaxq.steps.Step, **options) -> tuple[jaxq.Quantized, float, dict]:
    """The quantized model, the error of its output, and the groups by name."""
    groups = {}
    keep = lambda g: groups.update({g.plan.name: g})  # noqa: E731
    q = jaxq.calibrate(s.forward, s.params, s.batches or (s.inputs,), step, on_group=keep, **options)
    return q, lost(s, q), groups


def lost(s: Specimen, q: jaxq.Quantized) -> float:
    return distance(jax.jit(jaxq.execute(s.forward))(q, *s.inputs), jax.jit(s.forward)(s.params, *s.inputs))


KINDS = [
    control.scan_stacked,
]
RELATIVES = [  # of this, a convolution, and a contraction over two axes, as attention's output projection
    bare.einsum_heads_in,
    bare.conv2d_nhwc,
    bare.vmapped_experts,
    bare.transposed,
    bare.matmul,
    bare.permuted_contraction,
    bare.reshaped_weight,
    bare.ragged,
    bare.bfloat16,
    bare.lora,
    control.conditional,
]
ALL_KINDS = [*KINDS, *(pytest.param(make, marks=pytest.mark.slow) for make in RELATIVES)]


@pytest.mark.parametrize("make", ALL_KINDS, ids=lambda m: m.__name__)
def test_every_kind_of_group_is_better_than_round_to_nearest(make) -> None:
    """E4M3 at the widest range is one of the things that are tried."""
    s, fmt = make(), jaxq.Float(4, 3)
    nearest = jaxq.calibrate(s.forward, s.params, s.batches or (s.inputs,), jaxq.quantize(fmt, fmt))
    plain = lost(s, nearest)
    q, error, groups = searched(s, jaxq.llm_fp4(8, 8, search=SEARCH))
    assert 0 < error < 0.8 * plain
    assert set(q.inputs) == set(groups)
    for quant in q.inputs.values():
        assert quant.format == jaxq.AnyFloat(8) and np.isfinite(quant.grid.scale).all()


@pytest.mark.parametrize(
    ("weights", "granularity"),
    [
        # Activations have a grid per tensor, and weights by default one per channel: the other tests search both.
        pytest.param(jaxq.per_tensor(jaxq.Float(2, 1)), (1, 1), id="tensor", marks=pytest.mark.slow),
        pytest.param(jaxq.per_channel(jaxq.Float(2, 1)), (1, 12), id="channel", marks=pytest.mark.slow),
        pytest.param(jaxq.per_group(jaxq.Float(2, 1), 4), (4, 12), id="group"),
    ],
)
def test_finer_grids_fit_better(weights: jaxq.Quantizer, granularity: tuple[int, int]) -> None:
    s = bare.matmul()
    q, error, _ = searched(s, jaxq.llm_fp4(weights, 4, search=SEARCH))
    assert q.params["w"].grid.scale.shape == granularity and q.params["w"].grid.mantissa is None
    nearest = jaxq.calibrate(s.forward, s.params, [s.inputs], jaxq.quantize(weights, jaxq.Float(2, 1)))
    assert error < lost(s, nearest)


def test_only_weights_or_only_activations() -> None:
    s = bare.matmul()
    w_only, w_error, _ = searched(s, jaxq.llm_fp4(4, None, search=SEARCH))
    assert not w_only.inputs and isinstance(w_only.params["w"], jaxq.QTensor) and not w_only.transforms
    x_only, x_error, _ = searched(s, jaxq.fpq_baseline(None, 4, search=SEARCH))
    assert isinstance(x_only.params["w"], jax.Array) and list(x_only.inputs) == ["w"]
    _, both, _ = searched(s, jaxq.fpq_baseline(4, 4, search=SEARCH))
    assert max(w_error, x_error) < both < w_error + x_error
    none, error, _ = searched(s, jaxq.llm_fp4(None, None))
    assert error == 0 and not none.inputs


def test_embeddings_attention_and_what_is_left_alone() -> None:
    s = bare.embedding_take()
    q, error, _ = searched(s, jaxq.llm_fp4(4, 4, embeddings=4, search=SEARCH))
    w = q.params["w"]
    assert w.grid.scale.shape == (40, 1) and w.grid.mantissa.shape == (1, 1)
    assert (
        0 < error < distance(fake_quant(jaxq.Float(2, 1), s.params["w"], nearest_scale(s.params["w"])), s.params["w"])
    )
    untouched, error, _ = searched(s, jaxq.llm_fp4(4, 4, search=SEARCH))
    assert error == 0 and isinstance(untouched.params["w"], jax.Array)


def nearest_scale(w: jax.Array) -> jax.Array:
    return jnp.abs(w).max(1, keepdims=True) / jnp.float32(6)


def attention_of(params, x):
    y = norm(x, params["ln"])
    q, k, v = (linear(y, params[n]) for n in "qkv")
    p = jax.nn.softmax(jnp.einsum("btc,bsc->bts", q, k) / jnp.float32(4), -1)
    return jnp.einsum("bts,bsc->btc", p, v)


def attention() -> Specimen:
    params = {n: linear_params(i, 16, 16) for i, n in enumerate("qkv")}
    return Specimen(attention_of, {**params, "ln": norm_params(5, 16)}, (normal(9, 2, 6, 16),))


@pytest.mark.slow
def test_weights_that_share_an_activation_share_its_grid_and_exponents() -> None:
    s = attention()
    q, error, groups = searched(s, jaxq.llm_fp4(6, 6, attention=6, search=SEARCH))
    assert set(groups) == {"q/kernel", "dot0:lhs", "dot0:rhs", "dot1:lhs", "dot1:rhs"}
    assert set(q.inputs) == set(groups) and q.inputs["q/kernel"].sites == tuple(f"{n}/kernel" for n in "qkv")
    assert error < 0.1
    plain = jaxq.calibrate(s.forward, s.params, [s.inputs], jaxq.llm_fp4(6, 6, search=SEARCH))
    assert set(plain.inputs) == {"q/kernel"}  # attention stays in full precision, as in the paper


def test_layers_of_a_scan_choose_their_own_formats() -> None:
    """In one array each, so that one compiled function runs all of them."""
    rng = np.random.default_rng(0)
    heavy, flat = rng.standard_t(1.2, size=(16, 16)), rng.uniform(-1, 1, size=(16, 16))
    params = {"w": jnp.asarray(np.stack([heavy, flat]), jnp.float32)}

    def forward(params, x):
        return jax.lax.scan(lambda x, w: (jax.nn.tanh(x @ w), None), x, params["w"])[0]

    s = Specimen(forward, params, (normal(0, 32, 16),))
    q, _, _ = searched(s, jaxq.llm_fp4(4, None, search=SEARCH))
    w = q.params["w"]
    mantissa = np.asarray(w.grid.mantissa).ravel()
    assert w.codes.shape == (2, 16, 16) and mantissa[0] < mantissa[1]
    run = jax.jit(jaxq.execute(forward))
    x = s.inputs[0]
    by_hand = jax.nn.tanh(jax.nn.tanh(x @ w.dequantize()[0]) @ w.dequantize()[1])
    np.testing.assert_allclose(run(q, x), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quiet_first", [True, False])
@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("kind", [Exponents.PRE_SHIFTED, pytest.param(Exponents.POST_SHIFTED, marks=pytest.mark.slow)])
def test_some_layers_of_a_scan_have_exponents(kind, folds: bool, quiet_first: bool) -> None:
    """As the layers one by one, of which one has no exponents beside one that has; folded into gains or at run time."""
    gains = jnp.stack([jnp.ones(16), jnp.where(jnp.arange(16) % 2, 0.1, 1.0)])[:: -1 if quiet_first else 1]
    params = {"gain": gains, "w": normal(1, 2, 16, 16)}

    def layer(x, p):
        x = jnp.sign(x) * p["gain"][None]
        return (x if folds else jnp.maximum(x, -9.0)) @ p["w"]

    def scanned(p, x):
        return jax.lax.scan(lambda x, p: (layer(x, p), None), x, p)[0]

    def one_by_one(p, x):
        return layer(layer(x, p["0"]), p["1"])

    x, step = normal(0, 32, 16), jaxq.llm_fp4(4, 4, search=SEARCH, exponents=(kind,))
    apart = {str(i): {name: a[i] for name, a in params.items()} for i in range(2)}
    q, want = jaxq.calibrate(scanned, params, [x], step), jaxq.calibrate(one_by_one, apart, [x], step)
    assert len(want.transforms) == 1
    assert folds == all(quant.scale is None for quant in q.inputs.values())
    y = jaxq.execute(scanned)(q, x)
    for other in (jaxq.execute(one_by_one)(want, x), jaxq.execute(scanned)(jaxq.pack(q), x)):
        same = np.isclose(y, other, rtol=1e-4, atol=1e-4).all(1)
        assert same.mean() > 0.8  # the others have a sign of what is nearly 0


@pytest.mark.slow
def test_tied_weights_take_no_exponents() -> None:
    """Their other reader would see them."""
    q, error, groups = searched(bare.tied_embeddings(), jaxq.llm_fp4(6, 6, search=SEARCH))
    assert set(groups) == {"w", "embed"} == set(q.inputs) and groups["embed"].plan.shared
    assert set(q.transforms) <= {"w"} and q.params["embed"].exponents is None
    assert error < 0.1


@pytest.mark.slow  # of one operand: test_float_search's padding
def test_padding_counts_neither_in_ranges_nor_in_errors() -> None:
    s = bare.matmul()
    (x,) = s.inputs
    mask = jnp.asarray(np.arange(5)[None] < np.array([[5], [3]]))
    wild = jnp.where(mask[..., None], x, 1e4)
    real = x.reshape(-1, 16)[mask.ravel()][None]
    padded, alone = (
        jaxq.calibrate(s.forward, s.params, [a], jaxq.llm_fp4(4, 4, search=SEARCH), masks=[m])
        for a, m in ((wild, mask), (real, jnp.ones(real.shape[:2], bool)))
    )
    np.testing.assert_array_equal(padded.inputs["w"].grid.scale, alone.inputs["w"].grid.scale)
    np.testing.assert_array_equal(padded.params["w"].codes, alone.params["w"].codes)


def test_the_best_turn_is_kept() -> None:
    for seed in range(3):
        s = replace(bare.matmul(), inputs=(normal(seed, 2, 5, 16) * jnp.exp(normal(seed + 9, 1, 1, 16)),))
        _, error, groups = searched(s, jaxq.llm_fp4(4, 4, search=SEARCH))
        losses = groups["w"].log["losses"]
        size = float(jnp.square(s.forward(s.params, *s.inputs)).sum())
        assert len(losses) >= 1 and np.isfinite(losses).all()
        np.testing.assert_allclose(error**2 * size, losses.min(), rtol=1e-3)
