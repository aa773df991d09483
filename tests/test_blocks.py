"""The hardware's block formats, against the standards written out in numpy and ml_dtypes' numbers."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

import jaxq
from jaxq.contraction import dynamic_grid, quantize_activation
from jaxq.fold import divided
from jaxq.formats import Float, Int, encode
from jaxq.observers import mse
from jaxq.qtensor import PerGroup
from jaxq.quantizer import fake_quantize_weight, quantize_weight
from jaxq.steps import Step
from jaxq.steps.group import transformed
from jaxq.storage import load, save
from tests.zoo import bare
from tests.zoo.specimen import block, block_params, linear, linear_params, normal, tokens, weight

E5M2 = Float(5, 2, reserved=4)
# Each with the type of its elements and, for MX, the exponent of the largest one (OCP MX v1.0, table 1).
MICROSCALED = {
    "mxfp8": (jaxq.mxfp8(), ml_dtypes.float8_e4m3fn, 8),
    "mxfp8 E5M2": (jaxq.mxfp8(E5M2), ml_dtypes.float8_e5m2, 15),
    "mxfp6": (jaxq.mxfp6(), ml_dtypes.float6_e2m3fn, 2),
    "mxfp6 E3M2": (jaxq.mxfp6(Float(3, 2)), ml_dtypes.float6_e3m2fn, 4),
    "mxfp4": (jaxq.mxfp4(), ml_dtypes.float4_e2m1fn, 2),
}
QUANTIZERS = {**{name: q for name, (q, _, _) in MICROSCALED.items()}, "nvfp4": jaxq.nvfp4()}

sizes = st.sampled_from([1e-30, 1e-3, 1.0, 1e20])
numbers = st.floats(-4.0, 4.0, width=32, allow_subnormal=False)


def sized(a: np.ndarray, sizes: list[float]) -> np.ndarray:
    """Rows of different sizes; what becomes subnormal is 0, as XLA has it."""
    a = a * np.array(sizes, np.float32)[:, None]
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.float32(0), a)


matrices = st.builds(
    sized,
    hnp.arrays(np.float32, (3, 64), elements=numbers),
    st.lists(sizes, min_size=3, max_size=3),
)


def elements_of(x: np.ndarray, dtype, scale: np.ndarray) -> np.ndarray:
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(x / scale, -largest, largest).astype(dtype).astype(np.float32)


def microscaled(x: np.ndarray, dtype, emax: int) -> tuple[np.ndarray, np.ndarray]:
    """OCP MX v1.0, 6.3: the values of rows of blocks of 32 and their scales, as E8M0."""
    blocks = x.reshape(-1, 32)
    most = np.abs(blocks).max(1, keepdims=True)
    exponent = np.floor(np.log2(np.where(most > 0, most, 1.0).astype(np.float64))) - emax
    exponent = np.where(most > 0, np.maximum(exponent, -126), 0)
    scale = (2.0**exponent).astype(np.float32)
    return (elements_of(blocks, dtype, scale) * scale).reshape(x.shape), scale.astype(ml_dtypes.float8_e8m0fnu)


def nvfp4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NVIDIA's two levels: the values, the blocks' scales as E4M3 and the tensor's."""
    blocks = x.reshape(-1, 16)
    most = np.abs(blocks).max(1, keepdims=True)
    smallest = np.float32(2.0**-116)  # so that 0.5 * 2**-9 * outer, the smallest step, is a normal number
    outer = np.maximum(most.max() / np.float32(6 * 448), smallest) if most.any() else np.float32(1)
    wanted = most / np.float32(6) / outer
    stored = np.where(most > 0, np.maximum(np.minimum(wanted, 448), 2.0**-9), 1).astype(ml_dtypes.float8_e4m3fn)
    scale = stored.astype(np.float32) * outer
    return (elements_of(blocks, ml_dtypes.float4_e2m1fn, scale) * scale).reshape(x.shape), stored, outer


# The standards ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(MICROSCALED)), matrices)
def test_microscaling_is_the_standards(name, x):
    quantizer, dtype, emax = MICROSCALED[name]
    q = quantize_weight(jnp.asarray(x), quantizer, (1,))
    values, scales = microscaled(x, dtype, emax)
    np.testing.assert_allclose(q.dequantize(), values, rtol=0, atol=2.0**-126)  # subnormals may be flushed
    stored = np.asarray(q.grid.scale)
    np.testing.assert_array_equal(stored.astype(ml_dtypes.float8_e8m0fnu), scales.reshape(stored.shape))
    np.testing.assert_array_equal(stored.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), stored)
    assert q.grid.outer.shape == (1, 1) and q.grid.outer == 1 and q.grid.zero is None


@given(matrices)
def test_nvfp4_is_the_standards(x):
    q = quantize_weight(jnp.asarray(x), jaxq.nvfp4(), (1,))
    values, scales, outer = nvfp4(x)
    np.testing.assert_allclose(q.dequantize(), values, rtol=0, atol=2.0**-126)
    stored = np.asarray(q.grid.scale)
    np.testing.assert_array_equal(stored.astype(ml_dtypes.float8_e4m3fn), scales.reshape(stored.shape))
    np.testing.assert_array_equal(stored.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), stored)
    np.testing.assert_array_equal(q.grid.outer, [[outer]])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_elements_saturate_and_codes_are_the_hardwares(name):
    """A block whose largest value lies between the largest element and the next power of two."""
    quantizer, (_, dtype, _) = QUANTIZERS[name], MICROSCALED.get(name, MICROSCALED["mxfp4"])
    x = jnp.asarray(np.linspace(-1.99, 1.99, 64, dtype=np.float32))[None]
    q = quantize_weight(x, quantizer, (1,))
    largest = quantizer.format.largest
    elements = np.asarray(q.dequantize() / (q.grid.over((1, 64)).scale))
    assert np.abs(elements).max() == largest
    np.testing.assert_array_equal(np.asarray(q.codes).view(dtype).astype(np.float32), elements)


# Laws ---------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(QUANTIZERS)), matrices)
def test_codes_stand_for_what_searches_and_activations_see(name, x):
    """Law 2 on blocks, eager and jitted; an activation and a weight of the same numbers are quantized alike."""
    quantizer, x = QUANTIZERS[name], jnp.asarray(x)
    want = np.asarray(quantize_weight(x, quantizer, (1,)).dequantize()).tobytes()
    for f in (fake_quantize_weight, jax.jit(fake_quantize_weight, static_argnums=(1, 2))):
        assert np.asarray(f(x, quantizer, (1,))).tobytes() == want
    static = (quantizer.format, quantizer.granularity, None, (1,))
    assert np.asarray(quantize_activation(x, *static)).tobytes() == want
    assert np.asarray(jax.jit(lambda x: quantize_activation(x, *static))(x)).tobytes() == want
    assert np.isfinite(np.frombuffer(want, np.float32)).all()


@pytest.mark.parametrize("quantizer", [jaxq.mxfp4(), jaxq.nvfp4()], ids=["mxfp4", "nvfp4"])
@pytest.mark.slow
def test_every_layout_has_the_same_blocks(quantizer):
    w = normal(0, 64, 5)
    want = quantize_weight(w, quantizer, (0,)).dequantize()
    np.testing.assert_array_equal(quantize_weight(w.T, quantizer, (1,)).dequantize(), want.T)
    halves = quantize_weight(w.reshape(2, 32, 5), quantizer, (0, 1)).dequantize()
    np.testing.assert_array_equal(halves.reshape(64, 5), want)
    heads = quantize_activation(w.T.reshape(5, 2, 32), quantizer.format, quantizer.granularity, None, (1, 2))
    np.testing.assert_array_equal(heads.reshape(5, 64), want.T)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_zero_constant_and_extreme_blocks_are_defined(name):
    quantizer, size = QUANTIZERS[name], QUANTIZERS[name].granularity.size
    rows = jnp.asarray([0.0, 3.0, -5.0, 1e-20, 1e-37, 2.0**100])[:, None] * jnp.ones((1, size))
    for w in (rows, rows[:1], rows[3:4], rows[4:5]):
        q = quantize_weight(w, quantizer, (1,))
        assert np.isfinite(q.dequantize()).all() and (np.asarray(q.grid.over(w.shape).scale) >= 2.0**-126).all()
        zero = ~np.asarray(w).any(1)
        assert (np.asarray(q.grid.scale)[zero] == 1).all() and not np.asarray(q.dequantize())[zero].any()
    q = quantize_weight(rows[:3], quantizer, (1,))
    np.testing.assert_allclose(q.dequantize(), rows[:3], rtol=0.21)  # 5 is no E2M1 element times 2**k


def test_a_small_block_beside_a_large_one_keeps_its_values():
    """Rounding its scale to nearest would give 0."""
    x = jnp.concatenate([jnp.full((1, 16), 1.0), jnp.full((1, 16), 1e-6)], 1)
    q = quantize_weight(x, jaxq.nvfp4(), (1,))
    assert q.grid.scale[0, 1] == 2.0**-9
    np.testing.assert_allclose(q.dequantize()[0, 16:], 1e-6, rtol=0.3)


# Whose tensor -------------------------------------------------------------------------------------------------------


def calibrated(s, recipe):
    return jaxq.calibrate(s.forward, s.params, [s.inputs], recipe)


@pytest.mark.slow
def test_each_expert_has_a_tensor_scale_of_its_own():
    recipe = jaxq.quantize(jaxq.nvfp4(), None)
    batched, ragged = bare.vmapped_experts(), bare.ragged()
    for s, path in ((batched, ("experts", "down", "kernel")), (ragged, ("w",))):
        got, w = calibrated(s, recipe).params, s.params
        for key in path:
            got, w = got[key], w[key]
        assert got.grid.outer.shape == (3, 1, 1)
        alone = [quantize_weight(e, jaxq.nvfp4(), (0,)) for e in w]
        for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(jax.tree.map(lambda *a: jnp.stack(a), *alone))):
            np.testing.assert_array_equal(mine, theirs)
    factors = np.asarray(got.grid.outer)
    assert len(set(factors.ravel())) == 3


# Models -------------------------------------------------------------------------------------------------------------


def mlp(p, x):
    return linear(jax.nn.relu(linear(x, p["a"])), p["b"])


MLP = {"a": linear_params(0, 64, 64), "b": linear_params(1, 64, 8)}
X = normal(2, 3, 5, 64)


def transformer(p, t):
    x, _ = lax.scan(lambda x, layer: (block(layer, x), None), p["embed"][t], p["layers"])
    return x @ p["head"]


@pytest.mark.slow
def test_a_model_is_close_in_each_and_closer_with_more_bits():
    """E4M3 and E2M3 have the same mantissa: where a block has no outliers MXFP8 gains nothing on MXFP6."""
    errors = {}
    for kind in ("mxfp8", "mxfp6", "nvfp4", "mxfp4"):
        q = jaxq.calibrate(mlp, MLP, [X], jaxq.quantize(QUANTIZERS[kind], QUANTIZERS[kind]))
        assert all(quant.grid is None for quant in q.inputs.values())
        got, want = jaxq.execute(mlp)(q, X), mlp(MLP, X)
        errors[kind] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert 0.01 < errors["mxfp6"] < 1.3 * errors["mxfp8"] < 1.69 * errors["mxfp6"]
    assert max(errors["mxfp8"], errors["mxfp6"]) < errors["nvfp4"] / 2 and errors["nvfp4"] <= errors["mxfp4"] < 0.3


def test_beside_an_outlier_more_exponents_keep_more():
    x = normal(0, 8, 32).at[:, 5].set(100.0)
    others = jnp.arange(32) != 5

    def lost(kind):
        return float(jnp.abs(fake_quantize_weight(x, QUANTIZERS[kind], (1,)) - x)[:, others].mean())

    assert lost("mxfp8") < lost("mxfp8 E5M2") < lost("mxfp6 E3M2") < lost("mxfp6") < lost("mxfp4")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mxfp6", "nvfp4"])
def test_stacked_layers_calibrated_saved_vmapped_and_differentiated(kind, tmp_path):
    fmt, run = QUANTIZERS[kind], jax.jit(jaxq.execute(transformer))
    params = {"embed": normal(0, 40, 32), "layers": block_params(0, 32, 2), "head": weight(2, 32, 40)}
    t = tokens(3, 4, 8)
    q = jaxq.calibrate(transformer, params, [t], jaxq.quantize(fmt, fmt))
    kernel = q.params["layers"]["fc1"]["kernel"]
    assert kernel.grid.scale.shape == (2, 32 // fmt.granularity.size, 64) and kernel.grid.outer.shape == (2, 1, 1)
    for i, layer in enumerate(params["layers"]["fc1"]["kernel"]):
        np.testing.assert_array_equal(kernel.dequantize()[i], quantize_weight(layer, fmt, (0,)).dequantize())
    want = run(q, t)
    save(tmp_path / "model", q, {})
    loaded, _ = load(tmp_path / "model")
    assert jax.tree.structure(loaded) == jax.tree.structure(q)
    np.testing.assert_array_equal(run(loaded, t), want)
    many = jax.jit(jax.vmap(jaxq.execute(transformer), in_axes=(None, 0)))(q, t[:, None])[:, 0]
    if kind == "nvfp4":  # each with tensor scales of its own
        assert jnp.linalg.norm(many - want) < 0.3 * jnp.linalg.norm(want)
    else:
        np.testing.assert_allclose(many, want, rtol=1e-3, atol=1e-3)
    slope = jax.jit(jax.grad(lambda w: jnp.square(run(replace(q, params={**q.params, "embed": w}), t)).mean()))
    assert np.isfinite(slope(params["embed"])).all() and np.asarray(slope(params["embed"])).any()


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_exported_and_read_again(kind):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers, which JAX does not install")
    q = jaxq.calibrate(mlp, MLP, [X], jaxq.quantize(QUANTIZERS[kind], QUANTIZERS[kind]))
    exported = jax.export.export(jax.jit(jaxq.execute(mlp)))(q, X)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    np.testing.assert_array_equal(again.call(q, X), exported.call(q, X))


@pytest.mark.slow
def test_attention_and_tables():
    def f(p, t):
        x = p["embed"][t]
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ p["q"], x @ p["k"])), x)

    params, t = {"embed": normal(0, 40, 32), "q": weight(1, 32, 32) / 5, "k": weight(2, 32, 32)}, tokens(3, 2, 32)
    fmt = jaxq.mxfp8()
    q = jaxq.calibrate(f, params, [t], jaxq.quantize(fmt, fmt, attention=fmt, embeddings=fmt))
    assert q.params["embed"].grid.scale.shape == (40, 1)
    assert sum(quant.granularity == fmt.granularity for name, quant in q.inputs.items() if "dot" in name) == 4
    got, want = jaxq.execute(f)(q, t), f(params, t)
    assert jnp.linalg.norm(got - want) < 0.2 * jnp.linalg.norm(want)


# Folding ------------------------------------------------------------------------------------------------------------


def scaling(s: jax.Array) -> Step:
    return Step(lambda _, spec: spec, lambda group: transformed(group, None, s))


@pytest.mark.parametrize("quantizer", [jaxq.mxfp4(), jaxq.nvfp4()], ids=["mxfp4", "nvfp4"])
def test_a_fold_into_codes_leaves_the_blocks_scales_alone(quantizer):
    recipe = jaxq.quantize(quantizer, quantizer)
    plain = jaxq.calibrate(mlp, MLP, [X], recipe).params["a"]["kernel"]
    powers = 2.0 ** (jnp.arange(64) % 5 - 2).astype(jnp.float32)
    for s in (powers, jnp.linspace(0.5, 3.0, 64)):
        rules = {"a/*": recipe, "b/*": jaxq.chain(scaling(s), recipe)}
        q = jaxq.calibrate(mlp, MLP, [X], jaxq.partition(rules), propagate="full_precision")
        kernel = q.params["a"]["kernel"]
        assert "b/kernel" in q.transforms and q.inputs["b/kernel"].scale is None
        np.testing.assert_array_equal(kernel.codes, plain.codes)
        np.testing.assert_array_equal(kernel.grid.scale, plain.grid.scale)
        assert kernel.grid.outer.shape == (1, 64)
        np.testing.assert_allclose(kernel.dequantize(), plain.dequantize() / s[None], rtol=1e-6)


def test_a_fold_that_is_a_power_of_two_keeps_microscales_powers_of_two():
    plain = quantize_weight(MLP["a"]["kernel"], jaxq.mxfp6(), (0,))
    powers = 2.0 ** (jnp.arange(64) % 7 - 3).astype(jnp.float32)
    whole = np.asarray(divided(plain, powers[None]).grid.over(plain.shape).scale)
    np.testing.assert_array_equal(whole.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), whole)


# Errors -------------------------------------------------------------------------------------------------------------


def test_impossible_blocks_are_refused():
    for scales in ("power_of_two", "e4m3"):
        for fmt in (Int(8), jaxq.AnyFloat(4)):
            with pytest.raises(ValueError, match=rf"blocks with {scales} scales are of Floats, not of "):
                jaxq.Quantizer(fmt, PerGroup(32, scales))
        with pytest.raises(ValueError, match="the observer must be min_max.*not mse"):
            jaxq.Quantizer(Float(2, 1), PerGroup(32, scales), mse())
    with pytest.raises(ValueError, match="possible are real, power_of_two, e4m3"):
        PerGroup(32, "e8m0")  # type: ignore[arg-type]
    for size in (0, -4, 2.0, True):
        with pytest.raises(ValueError, match="positive integer"):
            PerGroup(size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MXFP8 has elements .*, not Float\(exponent_bits=2"):
        jaxq.mxfp8(Float(2, 1))
    with pytest.raises(ValueError, match="MXFP6 has elements"):
        jaxq.mxfp6(Float(4, 3))


def test_blocks_that_do_not_divide_are_refused_by_name():
    with pytest.raises(ValueError, match=r"t: no whole rows of it are looked up.* granularity than groups"):
        recipe = jaxq.quantize(embeddings=jaxq.per_group(jaxq.Int(4), 8))
        jaxq.calibrate(lambda p, t: p["t"][t, t], {"t": weight(0, 31, 40)}, [jnp.array([[1, 2, 3]])], recipe)
    with pytest.raises(ValueError, match=r"w: groups of 32 do not divide its 48 channels"):
        jaxq.calibrate(
            lambda p, x: x @ p["w"], {"w": weight(0, 48, 8)}, [normal(1, 3, 48)], jaxq.quantize(jaxq.mxfp4())
        )
    with pytest.raises(ValueError, match="groups of 32 do not divide the 48 channels"):
        quantize_weight(weight(0, 48, 8), jaxq.mxfp4(), (0,))
    with pytest.raises(ValueError, match="groups of 16 do not divide the 8 channels"):
        dynamic_grid(normal(0, 3, 8), Float(2, 1), PerGroup(16, "e4m3"), (1,))


def test_real_scales_are_what_they_were():
    """The default: a float32 scale for each block, nothing besides."""
    quantizer = jaxq.per_group(Float(2, 1), 16)
    assert quantizer.granularity == PerGroup(16) == PerGroup(16, "real")
    x = normal(0, 4, 64)
    q = quantize_weight(x, quantizer, (1,))
    most = np.abs(np.asarray(x)).reshape(4, 4, 16).max(-1)
    np.testing.assert_array_equal(q.grid.scale, most / np.float32(6))
    assert q.grid.outer is None
    codes = encode(Float(2, 1), x, jnp.repeat(q.grid.scale, 16, axis=1))
    np.testing.assert_array_equal(q.codes, codes)


@pytest.mark.parametrize(
    "quantizer",
    [pytest.param(jaxq.mxfp4(), marks=pytest.mark.slow), jaxq.per_group(jaxq.Int(4), 16)],
    ids=["mxfp4", "group"],
)
def test_blocks_of_several_axes_run_along_the_innermost(quantizer) -> None:
    """Attention's output projection, [heads, features] summed over, is the product of the two axes in one."""
    x, w = normal(0, 2, 3, 4, 32), normal(1, 4, 32, 8)

    def flat(p, x):
        return x.reshape(2, 3, 128) @ p["w"].reshape(128, 8)

    def heads(p, x):
        return jnp.einsum("bthd,hdo->bto", x, p["w"])

    step = jaxq.quantize(None, quantizer)
    one, other = (jaxq.execute(f)(jaxq.calibrate(f, {"w": w}, [x], step), x) for f in (flat, heads))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5)
