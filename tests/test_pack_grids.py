"""`pack`: scales and zero points as bytes, and that they are the grids they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

import jaxq
from jaxq import storage
from jaxq.fold import divided
from jaxq.qtensor import Packed, QTensor
from jaxq.quantizer import quantize_weight
from tests.test_pack import named, no_table, same_tree
from tests.zoo.specimen import normal, weight

BLOCKS = [jaxq.mxfp8(), jaxq.mxfp6(), jaxq.mxfp4(), jaxq.nvfp4()]
ASYMMETRIC = [jaxq.per_group(jaxq.Int(4, symmetric=False), 32), jaxq.per_channel(jaxq.Int(8, symmetric=False))]

# Scales in bytes with one for the tensor, and zero points in bytes; the others have less of it.
ALIKE = jaxq.mxfp4(), ASYMMETRIC[1]
STORED = [jaxq.nvfp4(), ASYMMETRIC[0], *(pytest.param(quantizer, marks=pytest.mark.slow) for quantizer in ALIKE)]
half = settings(max_examples=settings.default.max_examples // 2)  # as nearly every example compiles


def in_bytes(q: QTensor) -> Packed:
    return jaxq.pack({"w": q})["w"]


def bits_of(tree: Any) -> list[bytes]:
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


@half
@given(
    st.sampled_from([*BLOCKS, *ASYMMETRIC]),
    hnp.arrays(np.float32, (64, 3), elements=st.floats(-1, 1, width=32)),
    hnp.arrays(np.int32, (64 // 16, 3), elements=st.integers(-149, 127)),
)
def test_bytes_hold_the_grids_of_all_weights(quantizer, w, exponents):
    """Of blocks of any size, from subnormal numbers to the largest, zeros among them: bit for bit."""
    w = np.ldexp(w, np.repeat(exponents, 16, axis=0))
    q = quantize_weight(jnp.asarray(w), quantizer, (0,))
    leaf = in_bytes(q)
    assert same_tree(jaxq.unpack(leaf), q) and bits_of(jax.jit(Packed.unpack)(leaf)) == bits_of(q)
    assert bits_of(jax.jit(Packed.dequantize)(leaf)) == bits_of(jax.jit(QTensor.dequantize)(q))
    wide = np.ptp(w.astype(float)) > np.finfo(np.float32).max  # as an asymmetric integer's range is no float32 number
    assert leaf.grid.scale.dtype == jnp.float32 and (wide or np.isfinite(leaf.grid.scale).all())


@pytest.mark.parametrize("quantizer", [*BLOCKS, *ASYMMETRIC], ids=named)
def test_with_x64_enabled(quantizer):
    """The same bytes and the same numbers, packed, unpacked and multiplied."""
    x, w = normal(0, 2, 64), weight(1, 64, 8)

    def found() -> list[bytes]:
        q = jaxq.calibrate(no_table, {"w": jnp.asarray(w)}, [x], jaxq.quantize(quantizer, None))
        packed = jaxq.pack(q)
        assert same_tree(jaxq.unpack(packed), q)
        return bits_of((packed, jax.jit(jaxq.execute(no_table))(packed, x), packed.params["w"].grid))

    with jax.enable_x64(True):
        wide = found()
    assert wide == found()


@pytest.mark.parametrize("quantizer", [*BLOCKS, *ASYMMETRIC], ids=named)
def test_what_is_a_byte_follows_from_the_description(quantizer):
    """Whatever the values, traced or not; and the shapes are the float32 grid's."""
    block, shape = isinstance(quantizer.format, jaxq.Float), (64, 8)
    for w in (weight(0, *shape), jnp.zeros(shape)):
        leaf, q = in_bytes(quantize_weight(w, quantizer, (0,))), quantize_weight(w, quantizer, (0,))
        assert leaf.stored.scale.dtype == (jnp.uint8 if block else jnp.float32)
        assert leaf.stored.zero is None if block else leaf.stored.zero.dtype == jnp.uint8
        assert jax.eval_shape(lambda leaf: leaf.grid, leaf) == jax.eval_shape(lambda q: q.grid, q)
        assert [a.shape for a in jax.tree.leaves(leaf.stored)] == [a.shape for a in jax.tree.leaves(q.grid)]


@pytest.mark.parametrize(
    "weights,bits",
    [
        (jaxq.mxfp8(), 8 + 8 / 32),
        (jaxq.mxfp6(), 6 + 8 / 32),
        (jaxq.mxfp4(), 4 + 8 / 32),
        (jaxq.nvfp4(), 4 + 8 / 16),
        (jaxq.per_group(jaxq.Int(4, symmetric=False), 128), 4 + (32 + 8) / 128),
        (jaxq.per_group(jaxq.Int(4), 128), 4 + 32 / 128),
        (jaxq.per_channel(jaxq.Int(4, symmetric=False)), 4 + (32 + 8) / 512),
    ],
    ids=named,
)
def test_bits_a_weight(weights, bits):
    tensors = 32 / (512 * 256) if weights in BLOCKS else 0  # a block format's number for the whole tensor
    w = quantize_weight(weight(0, 512, 256), weights, (0,))
    assert jaxq.bits_per_weight(in_bytes(w)) == bits + tensors


@pytest.mark.parametrize("quantizer", STORED, ids=named)
def test_grids_of_stacked_layers_are_scanned_as_bytes(quantizer):
    def f(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    x = normal(0, 8, 64)
    q = jaxq.calibrate(f, {"w": weight(1, 3, 64, 64)}, [x], jaxq.quantize(quantizer, None))
    packed, run = jaxq.pack(q), jax.jit(jaxq.execute(f))
    assert packed.params["w"].stored.scale.shape[0] == 3 and same_tree(jaxq.unpack(packed), q)
    np.testing.assert_allclose(run(packed, x), run(q, x), atol=1e-5)


@pytest.mark.parametrize("quantizer", STORED, ids=named)
def test_a_packed_grid_is_saved_exported_and_divided(quantizer, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers, which JAX does not install")
    x = normal(0, 3, 64)
    q = jaxq.calibrate(no_table, {"w": weight(1, 64, 8)}, [x], jaxq.quantize(quantizer, jaxq.Int(8)))
    packed, run = jaxq.pack(q), jax.jit(jaxq.execute(no_table))
    storage.save(tmp_path / "packed", packed, {})
    assert same_tree(storage.load(tmp_path / "packed")[0], packed)
    data = jax.export.export(run, platforms=("cpu", "tpu", "cuda"))(packed, x).serialize()
    again = jax.export.deserialize(data)
    np.testing.assert_array_equal(again.call(packed, x), run(packed, x))
    assert (
        jax.tree.unflatten(again.in_tree, again.in_avals)[0][0].params["w"].stored.scales == q.params["w"].grid.scales
    )
    by = jnp.linspace(0.5, 3.0, 8)[None]
    assert same_tree(jaxq.unpack(divided(packed.params["w"], by)), divided(q.params["w"], by))


def test_what_is_at_hand_is_looked_at_under_jit():
    q, x = {"w": quantize_weight(weight(0, 64, 8), jaxq.mxfp4(), (0,))}, normal(1, 2, 64)
    packed, run = jaxq.pack(q), jaxq.execute(no_table)
    want = jax.jit(run)(packed, x)
    for constant in (lambda: packed, lambda: jaxq.pack(q)):
        np.testing.assert_allclose(jax.jit(lambda x, constant=constant: run(constant(), x))(x), want, rtol=1e-6)


def test_grids_that_bytes_do_not_hold_are_refused():
    """No quantizer makes such: someone's training, say, did."""
    block, integers = (quantize_weight(weight(0, 64, 8), n, (0,)) for n in (jaxq.mxfp4(), ASYMMETRIC[0]))

    def with_grid(q: QTensor, **parts: Any) -> Any:
        return {"a": {"w": replace(q, grid=replace(q.grid, **parts))}}

    scale = block.grid.scale
    for wrong in (scale * 1.5, -scale, 0 * scale, jnp.full_like(scale, 2.0**-128), jnp.full_like(scale, jnp.nan)):
        with pytest.raises(ValueError, match=r"a/w: some of its scales are not power_of_two; round them"):
            jaxq.pack(with_grid(block, scale=wrong))
    for wrong in (0.3, 2.0**-10, 500.0):
        with pytest.raises(ValueError, match=r"a/w: some of its scales are not e4m3"):
            jaxq.pack(with_grid(block, scale=jnp.full_like(scale, wrong), scales="e4m3"))
    for wrong in (7.5, -1.0, 256.0, jnp.nan):
        with pytest.raises(ValueError, match=r"a/w: some of its zero points are no whole numbers from 0 to 255"):
            jaxq.pack(with_grid(integers, zero=jnp.full_like(integers.grid.scale, wrong)))
    real = with_grid(block, scale=scale * 1.5, scales="real")
    assert same_tree(jaxq.unpack(jaxq.pack(real)), real)


@pytest.mark.parametrize("quantizer", [jaxq.mxfp4(), jaxq.nvfp4()], ids=named)
def test_damaged_bytes_are_refused(quantizer):
    leaf, x = in_bytes(quantize_weight(weight(0, 64, 8), quantizer, (0,))), normal(1, 2, 64)

    def run(**parts: Any) -> Any:
        return jaxq.execute(no_table)({"w": replace(leaf, stored=replace(leaf.stored, **parts))}, x)

    with pytest.raises(ValueError, match=r"w: its scale \(\w+ scales\) is float32, not uint8; take the leaf that"):
        run(scale=leaf.grid.scale)
    with pytest.raises(ValueError, match=r"w: numbers \[3, 8\] do not divide"):
        run(scale=leaf.stored.scale[:1].repeat(3, 0))
    no_number = leaf.stored.scale.at[1, 2].set(255)
    with pytest.raises(ValueError, match=r"w: a byte of its \w+ scales stands for no number"):
        run(scale=no_number)
    under_jit = jax.jit(jaxq.execute(no_table))({"w": replace(leaf, stored=replace(leaf.stored, scale=no_number))}, x)
    np.testing.assert_array_equal(np.isnan(under_jit), np.arange(8)[None].repeat(2, 0) == 2)
    wrong = in_bytes(quantize_weight(weight(0, 64, 8), ASYMMETRIC[0], (0,)))
    wrong = replace(wrong, stored=replace(wrong.stored, zero=wrong.grid.zero))
    with pytest.raises(ValueError, match=r"w: its zero \(real scales\) is float32, not uint8"):
        jaxq.execute(no_table)({"w": wrong}, x)
