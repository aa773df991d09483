"""Weights in groups decoded in the TPU's kernel: in interpret mode, its plain meaning, and numpy."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

import jaxq
import jaxq.kernels.decoded_matmul as module
from jaxq import products
from jaxq.formats import Float, Int
from jaxq.kernels.decoded_matmul import Scaled, decoded_matmul, plain_decoded_matmul
from jaxq.kernels.layout import pack_codes
from jaxq.kernels.plain import Integers, activation_integers, weight_integers
from jaxq.kernels.tpu import E4M3, has_kernel, packed_product, weight_carrier
from jaxq.qtensor import PerToken
from jaxq.quantizer import per_group, quantize_weight

M, K, N = 100, 512, 300
UINT4, UINT8, E2M1, E4M3FN = Int(4, symmetric=False), Int(8, symmetric=False), Float(2, 1), Float(4, 3, reserved=1)
FORMATS = [Int(4), UINT4, E2M1, Float(1, 2), Int(8), UINT8, E4M3FN, Float(5, 2, reserved=4)]
ALIKE = {Int(4), Float(1, 2), Int(8), Float(5, 2, reserved=4)}  # decoded as another one of as many bits
X = jax.random.normal(jax.random.key(0), (M, K)) * 3 + 0.5
W = jax.random.normal(jax.random.key(1), (K, N))
V6E = "TPU v6 lite"


def linear(p, x):
    return x @ p["w"]


def packed(weights) -> jaxq.Packed:
    return jaxq.pack({"w": quantize_weight(W, weights, (0,))})["w"]


def by_kernel(x: Integers, leaf: jaxq.Packed, kind: str) -> jax.Array:
    given = x, leaf.planes[0], weight_integers(leaf), leaf.split, None, kind
    return packed_product(*given, seen=jnp.bfloat16, interpret=True)


@pytest.mark.parametrize("kind", [V6E, *(pytest.param(k, marks=pytest.mark.slow) for k in E4M3 if k != V6E)])
@pytest.mark.parametrize("size", [32, 256, *(pytest.param(size, marks=pytest.mark.slow) for size in (16, 64, 128))])
@pytest.mark.parametrize(
    "fmt", [pytest.param(f, marks=pytest.mark.slow) if f in ALIKE else f for f in FORMATS], ids=str
)
def test_weights_are_those_of_a_program_in_bfloat16_bit_for_bit(fmt, size, kind):
    """Each is multiplied by one and by nothing else."""
    leaf = packed(per_group(fmt, size))
    found = by_kernel(Integers(jnp.eye(K, dtype=jnp.bfloat16)), leaf, kind)
    assert np.array_equal(np.asarray(found), np.asarray(leaf.dequantize().astype(jnp.bfloat16), np.float32))


@pytest.mark.parametrize("scaled", [jaxq.mxfp4(), jaxq.mxfp8()], ids=["mxfp4", "mxfp8"])
def test_scales_that_are_powers_of_two_round_nothing(scaled):
    leaf = packed(scaled)
    assert np.array_equal(leaf.dequantize(), np.asarray(by_kernel(Integers(jnp.eye(K, dtype=jnp.bfloat16)), leaf, V6E)))


@pytest.mark.parametrize("fmt", [Int(8), UINT8, Int(6), E2M1, E4M3FN], ids=str)
@pytest.mark.parametrize(
    "weights", [per_group(UINT4, 128), per_group(Int(8), 32), jaxq.mxfp4()], ids=["uint4", "int8", "mxfp4"]
)
def test_activations_are_exact_with_their_zero_points(weights, fmt):
    x, leaf = activation_integers(X, fmt, PerToken(), None, (1,)), packed(weights)
    found = by_kernel(x, leaf, "TPU7x")
    w = np.asarray(leaf.dequantize().astype(jnp.bfloat16), float)
    wanted = np.asarray(x.centered, float) @ w * np.asarray(x.scale, float)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())


SHAPES = [(1, 256, 128, 16), (37, 768, 130, 128), (70, 512, 300, 512)]
DEEP = [(600, 768, 1100, 16), (37, 1024, 130, 64), (37, 2048, 130, 128)]  # in three, two and two steps


@pytest.mark.parametrize(("m", "k", "n", "size"), SHAPES + DEEP)
def test_any_shape_and_its_plain_meaning(m, k, n, size, monkeypatch):
    monkeypatch.setattr(module, "MOST", 1 << 14)  # several blocks with ragged ends
    if (m, k, n, size) in DEEP:
        monkeypatch.setattr(module, "WHOLE", 512)
        monkeypatch.setattr(module, "DEPTH", 256)
    steps = k // module.tile_of(m, k, k // size, n).depth
    assert steps == {(600, 768): 3, (37, 1024): 2, (37, 2048): 2}.get((m, k), 1)
    draw = np.random.default_rng(0)
    codes = pack_codes(jnp.asarray(draw.integers(0, 16, (k, n)).astype(np.uint8)), 4)[0]
    scale, center = (jnp.asarray(draw.uniform(1, 2, (k // size, n)), jnp.float32) for _ in range(2))
    x, rows = jnp.asarray(draw.integers(-8, 9, (m, k)), jnp.bfloat16), jnp.asarray(draw.random((m, 1)), jnp.float32)
    operands, carrier = Scaled(x, codes, scale, center, rows), weight_carrier(Int(4), jnp.bfloat16, V6E)
    found = decoded_matmul(operands, carrier, interpret=True)
    np.testing.assert_allclose(found, plain_decoded_matmul(operands, carrier), rtol=2e-6, atol=1e-3)


RECIPES = {
    "w4a16_g128": jaxq.quantize(per_group(UINT4, 128), None),
    "nvfp4": jaxq.quantize(jaxq.nvfp4(), None),
    "mxfp8": jaxq.quantize(jaxq.mxfp8(), None),
    "w4a8_g32": jaxq.quantize(per_group(Int(4), 32), jaxq.per_token(UINT8)),
    "w8a8_g128": jaxq.quantize(per_group(UINT8, 128), Int(8)),
}

NEAR = {
    "w8a8_g128",
    "mxfp8",
}  # the former's groups as w4a16's, its activation as w4a8's; the latter's blocks as nvfp4's


def tree_and_x(name: str) -> tuple[jaxq.Quantized, jax.Array]:
    x = X.astype(jnp.bfloat16)
    return jaxq.calibrate(linear, {"w": W.astype(jnp.bfloat16)}, [x], RECIPES[name]), x


def lowered(tree, x, kind: str, on=None) -> jax.stages.Lowered:
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), (jaxq.pack(tree), x))
    device = AbstractDevice(kind, None, "tpu")
    with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)):
        return jax.jit(jaxq.execute(linear)).trace(*given).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in NEAR else n for n in RECIPES])
def test_execute_has_it_for_many_tokens_and_computes_the_simulation(name, monkeypatch):
    tree, x = tree_and_x(name)
    assert "jaxq_decoded_matmul" in lowered(tree, x, V6E).as_text()
    assert "jaxq_decoded_matmul" not in lowered(tree, x[:8], V6E).as_text()
    monkeypatch.setattr(products, "_device", lambda *_: V6E)
    monkeypatch.setattr(products, "_either", lambda platform, kernel, plain: kernel)
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(jaxq.execute(linear))(jaxq.pack(tree), x)
    wanted = np.asarray(jax.jit(jaxq.execute(linear))(tree, x), float)
    rounding = 1e-5 if tree.inputs == {} else 1e-2  # the simulation rounds quantized activations to bfloat16
    np.testing.assert_allclose(np.asarray(found, float), wanted, atol=rounding * np.abs(wanted).max(), rtol=2**-7)


def test_many_channels_that_steps_do_not_divide_are_left_to_others():
    x = Integers(jnp.zeros((128, 128 * 110), jnp.bfloat16))
    assert module.tile_of(*x.values.shape, 110, N) is None and module.tile_of(128, 128 * 112, 112, N).depth == 2048
    leaf = jnp.zeros((64 * 110, N), jnp.uint8), jnp.ones((110, N))
    with pytest.raises(ValueError, match="14080 channels in 110 groups: beyond 13824 blocks of 8 groups"):
        decoded_matmul(Scaled(x.values, *leaf), weight_carrier(E2M1, jnp.bfloat16, V6E))
    assert has_kernel(x, E2M1, V6E, 110, jnp.bfloat16), "as in float32, by sums of groups"


def test_v5e_multiplies_int8_faster_but_not_with_zero_points():
    x = activation_integers(X, Int(8), PerToken(), None, (1,))
    wide = activation_integers(X, UINT8, PerToken(), None, (1,))

    def kernel_of(x: Integers, fmt: Int, kind: str) -> str:
        leaf = packed(per_group(fmt, 128))
        assert has_kernel(x, fmt, kind, 4, jnp.bfloat16)
        given = x, leaf.planes[0], weight_integers(leaf), fmt, None, kind
        return str(jax.make_jaxpr(lambda: packed_product(*given, seen=jnp.bfloat16))())

    assert "jaxq_packed_matmul" in kernel_of(x, Int(4), "TPU v5 lite")
    for given, fmt, kind in ((wide, Int(4), "TPU v5 lite"), (x, UINT4, "TPU v5 lite"), (x, Int(4), V6E)):
        assert "jaxq_decoded_matmul" in kernel_of(given, fmt, kind)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="no TPU compiler: pip install 'jaxq[tpu-aot]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("name", RECIPES)
def test_it_compiles_for_tpus_without_a_decoded_weight_in_memory(name, topology, monkeypatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    program = lowered(*tree_and_x(name), device.device_kind, SingleDeviceSharding(device)).compile()
    assert "jaxq_decoded_matmul" in program.as_text() or (name, topology) == ("w8a8_g128", "v5e:2x2")
    assert program.memory_analysis().temp_size_in_bytes < W.size
