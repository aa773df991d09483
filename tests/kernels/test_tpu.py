"""What `execute` has a TPU do with packed weights: the kernel's product is the plain one, and it is chosen."""

from functools import cache
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    Sharding,
    SingleDeviceSharding,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq import products
from jaxq.formats import Float, Int
from jaxq.kernels.plain import Integers, activation_integers, product, shifted, weight_integers
from jaxq.kernels.tpu import E4M3, has_kernel, packed_product
from jaxq.qtensor import Packed, PerTensor, PerToken
from jaxq.quantizer import per_channel, per_group, per_tensor, quantize_weight

M, K, N = 5, 512, 700
WEIGHTS = [Int(4), Int(4, symmetric=False), Float(2, 1), Float(1, 2), Float(3, 0)]
E4M3FN, E5M2 = Float(4, 3, reserved=1), Float(5, 2, reserved=4)
EIGHT = [Int(8), Int(8, symmetric=False), E4M3FN, E5M2]
# Read as one that stays: of the integers, and of the floats.
slow, ALIKE = pytest.mark.slow, (Int(4), Float(1, 2), Float(3, 0), Int(8), E5M2)
GROUPED_WEIGHTS, GROUPED_EIGHT = (
    [pytest.param(w, marks=slow) if w in ALIKE else w for w in ws] for ws in (WEIGHTS, EIGHT)
)
X = jax.random.normal(jax.random.key(0), (M, K)) * 3 + 0.5
W = jax.random.normal(jax.random.key(1), (K, N))


def linear(p, x):
    return x @ p["w"]


def read(activations) -> Integers:
    if activations is None:
        return Integers(X.astype(jnp.bfloat16))
    granularity = PerToken() if activations.bits < 8 else PerTensor()
    if granularity == PerToken():
        return activation_integers(X, activations, granularity, None, (1,))
    grid = quantize_weight(X, per_tensor(activations), (0, 1)).grid
    return activation_integers(X, activations, granularity, grid, (1,))


def both(x: Integers, weights, device: str, sums: bool = True) -> tuple[jax.Array, jax.Array]:
    packed = jaxq.pack({"w": quantize_weight(W, per_channel(weights), (0,))})["w"]
    w = weight_integers(packed)
    total = w.values.sum(0, dtype=jnp.int32, keepdims=True) if sums and isinstance(weights, Int) else None
    assert has_kernel(x, packed.split, "TPU7x")
    found = packed_product(x, packed.planes[0], w, packed.split, total, device, interpret=True)
    return found, product(x, w, total, "int8")


DEVICES = [kind if kind == "TPU v6 lite" else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(E4M3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("activations", "weights"),
    [
        pytest.param(x, w, marks=slow) if w in ALIKE and x in (Int(6), None) else (x, w)
        for x in (Int(8), Int(6), Float(2, 1), None)
        for w in (*WEIGHTS, *EIGHT)
    ],
    ids=str,
)
def test_the_kernels_product_is_the_plain_one(activations, weights, device):
    x = read(activations)
    found, wanted = both(x, weights, device)
    atol = (2e-6 if x.bound is not None else 1e-5) * float(jnp.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=atol)


@pytest.mark.parametrize("device", [pytest.param(d, marks=slow) if d == "TPU v5 lite" else d for d in sorted(E4M3)])
@pytest.mark.parametrize("activations", [E4M3FN, E5M2, Float(4, 3)], ids=str)
def test_activations_of_8_bit_floats(activations, device):
    """Larger numbers than bfloat16 counts to, but of few significant bits."""
    for weights in (E4M3FN, Float(2, 1)):
        found, wanted = both(read(activations), weights, device)
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("size", [32, 128, *(pytest.param(size, marks=pytest.mark.slow) for size in (16, 64))])
@pytest.mark.parametrize("weights", GROUPED_EIGHT, ids=str)
@pytest.mark.parametrize("activations", [Int(8), None], ids=str)
def test_groups_of_weights_of_8_bits(activations, weights, size):
    x, packed = read(activations), jaxq.pack({"w": quantize_weight(W, per_group(weights, size), (0,))})["w"]
    kind = "TPU v5 lite"
    assert has_kernel(x, packed.split, kind, K // size) and not has_kernel(x, packed.split, kind, K // 8)
    w = weight_integers(packed)
    found = packed_product(x, packed.planes[0], w, packed.split, None, kind, interpret=True)
    wanted = exact(x, packed)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("size", [32, pytest.param(128, marks=pytest.mark.slow), 256])
@pytest.mark.parametrize("weights", GROUPED_WEIGHTS, ids=str)
@pytest.mark.parametrize("activations", [Int(8), Float(2, 1), None], ids=str)
def test_groups(activations, weights, size):
    """The kernel's product is that of the decoded numbers."""
    x, packed = read(activations), jaxq.pack({"w": quantize_weight(W, per_group(weights, size), (0,))})["w"]
    assert has_kernel(x, packed.split, "TPU7x", K // size) and not has_kernel(x, packed.split, "TPU7x", K // 8)
    w = weight_integers(packed)
    found = packed_product(x, packed.planes[0], w, packed.split, None, "TPU7x", interpret=True)
    wanted = exact(x, packed)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS[:2], ids=str)
def test_zero_points_of_the_activation_in_groups(weights, sums):
    x, recipe = read(Int(8, symmetric=False)), jaxq.quantize(per_group(weights, 128), Int(8, symmetric=False))
    packed = jaxq.pack(jaxq.calibrate(linear, {"w": W}, [X], recipe)).params["w"]
    assert packed.sums.shape == (K // 128, N)
    given = packed.sums if sums else None
    found = packed_product(x, packed.planes[0], weight_integers(packed), weights, given, "TPU v6 lite", interpret=True)
    wanted = exact(x, packed)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())


def exact(x: Integers, packed: Packed) -> np.ndarray:
    values = np.asarray(x.values if x.center is None else x.values + x.center, float)
    return values @ np.asarray(packed.dequantize(), float) * (1 if x.scale is None else np.asarray(x.scale, float))


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("weights", [*WEIGHTS[:2], *EIGHT[:2]], ids=str)
def test_zero_points_of_the_activation(weights, sums):
    found, wanted = both(read(Int(8, symmetric=False)), weights, "TPU v6 lite", sums)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("weights", WEIGHTS[2:], ids=str)
def test_exponents_in_the_activation(weights):
    x = shifted(read(Float(2, 1)), (jnp.arange(K) % 4)[None].astype(jnp.int8), 3)
    found, wanted = both(x, weights, "TPU v5 lite")
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6 * float(jnp.abs(wanted).max()))


def test_numbers_without_a_kernel():
    whole, wide, v6e = read(Int(8)), read(Int(8, symmetric=False)), "TPU v6 lite"
    assert not has_kernel(whole, Int(6), v6e) and not has_kernel(whole, None, v6e), "not 4 or 8 bits, or layers differ"
    assert not has_kernel(whole, Int(8), v6e) and has_kernel(whole, Int(8), v6e, 2), "XLA is as fast"
    assert not has_kernel(whole, Float(4, 3), v6e), "no machine's: it has a number beyond 448"
    assert not has_kernel(Integers(X), Int(4), v6e), "float32 would be rounded to bfloat16"
    assert not has_kernel(wide, Float(2, 1), v6e), "a zero point beside a float's elements"
    assert not has_kernel(Integers(whole.values[:, :384], bound=127), Int(4), v6e), "no whole blocks of 256"
    prefill = Integers(jnp.zeros((65, 512), jnp.bfloat16))
    assert has_kernel(prefill, Int(4), v6e, 8), "groups of 64"
    assert not has_kernel(prefill, Int(4), v6e, 16), "of 32: decoding takes less by then"
    assert has_kernel(prefill, E5M2, v6e, 8) and not has_kernel(prefill, E5M2, v6e, 16)
    assert has_kernel(prefill, Int(4), v6e, 16, jnp.bfloat16), "decoded to the program's own dtype"
    assert not has_kernel(Integers(prefill.values.astype(jnp.float32)), Int(4), v6e, 16, jnp.bfloat16)
    assert not has_kernel(shifted(wide, jnp.zeros((1, K), jnp.int8), 1), Int(4), v6e, 2, jnp.bfloat16), "nine bits"
    assert not has_kernel(shifted(whole, jnp.zeros((1, K), jnp.int8), 1), Int(4), v6e), "beyond 8 bits"


SEARCH = jaxq.FloatSearch(rounds=1, clips=jaxq.steps.log_clips(count=3), method=jaxq.exhaustive())
GROUPED = jaxq.per_group(Int(4, symmetric=False), 128)
RECIPES = {
    "w4a8": (jaxq.quantize(Int(4), Int(8, symmetric=False)), jnp.float32),
    "w4a16": (jaxq.quantize(Int(4), None), jnp.bfloat16),
    "e2m1": (jaxq.quantize(Float(2, 1), Float(2, 1)), jnp.float32),
    "llm_fp4": (jaxq.post_shifted_fp4(4, 4, search=SEARCH), jnp.float32),
    "w4a8_g128": (jaxq.quantize(GROUPED, Int(8, symmetric=False)), jnp.float32),
    "w4a16_g128": (jaxq.quantize(GROUPED, None), jnp.bfloat16),
    "w4a8_g32": (jaxq.quantize(per_group(Int(4, symmetric=False), 32), Int(8, symmetric=False)), jnp.float32),
    "nvfp4": (jaxq.quantize(jaxq.nvfp4(), None), jnp.bfloat16),
    "mxfp8": (jaxq.quantize(jaxq.mxfp8(), None), jnp.bfloat16),
    "w8a8_g128": (jaxq.quantize(per_group(Int(8, symmetric=False), 128), Int(8, symmetric=False)), jnp.float32),
    "fp8": (jaxq.quantize(E4M3FN, E4M3FN), jnp.float32),
}


def of(recipe, dtype=jnp.float32) -> jaxq.Quantized:
    return jaxq.calibrate(linear, {"w": W.astype(dtype)}, [X.astype(dtype)], recipe)


# Interpreted, their kernels are those of w4a8_g128, nvfp4, mxfp8, and llm_fp4.
NEAR = {"w4a8_g32", "w4a16_g128", "w8a8_g128", "e2m1"}
# On a mesh: a packed weight alone, with its grouped grid, its blocks' and its exponents.
PARTED = {"w4a8", "w4a16_g128", "mxfp8", "llm_fp4"}


@cache
def quantized(name: str) -> jaxq.Quantized:
    return of(*RECIPES[name])


def one_device(kind: str | None) -> AbstractMesh:
    device = None if kind is None else AbstractDevice(kind, None, "tpu")
    return AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)


def lowered(
    tree: jaxq.Quantized, x: jax.Array, how="int8", kind: str | None = "TPU v6 lite", on: Sharding | None = None
) -> jax.stages.Lowered:
    """The program for a TPU of a product with a packed weight."""
    tree = jaxq.pack(tree)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), (tree, x))
    with use_abstract_mesh(one_device(kind)):
        return jax.jit(jaxq.execute(linear, how)).trace(*given).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("name", RECIPES)
def test_execute_has_a_tpu_run_the_kernel(name):
    assert "jaxq_packed_matmul" in lowered(quantized(name), X.astype(RECIPES[name][1])).as_text()


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow) if n in NEAR else n for n in RECIPES])
def test_what_execute_computes_by_the_kernel_is_the_simulation(name, monkeypatch):
    """The whole way from the program to the kernel, which is interpreted, and back."""
    monkeypatch.setattr(products, "_device", lambda *_: "TPU v6 lite")
    monkeypatch.setattr(products, "_either", lambda platform, kernel, plain: kernel)
    tree, dtype = quantized(name), RECIPES[name][1]
    x = X.astype(dtype)
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(jaxq.execute(linear))(jaxq.pack(tree), x)
    wanted = np.asarray(jax.jit(jaxq.execute(linear))(tree, x), float)
    rounding = 4e-6 if dtype == jnp.float32 else 2e-2  # the simulation rounds weights to bfloat16
    np.testing.assert_allclose(np.asarray(found, float), wanted, atol=rounding * np.abs(wanted).max())


@pytest.fixture
def no_compilation_cache():
    """What is compiled for a device that is not there cannot be read back from the cache."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="no TPU compiler: pip install 'jaxq[tpu-aot]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("name", RECIPES)
def test_execute_compiles_for_tpus(name, topology, monkeypatch, no_compilation_cache):
    """Nothing of the size of the weight in bfloat16 is made on the way."""
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    x, on = X.astype(RECIPES[name][1]), SingleDeviceSharding(device)
    program = lowered(quantized(name), x, kind=device.device_kind, on=on).compile()
    assert "jaxq_packed_matmul" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2 * W.size


@pytest.mark.parametrize("name", [n if n in PARTED else pytest.param(n, marks=slow) for n in RECIPES])
def test_on_a_mesh_kernels_run_inside_shard_map(name):
    """XLA cannot partition a kernel: where it divides the work itself, it also multiplies."""
    tree, x = jaxq.pack(quantized(name)), X[:4].astype(RECIPES[name][1])
    mesh = AbstractMesh(
        (2, 2), ("data", "model"), (AxisType.Auto,) * 2, abstract_device=AbstractDevice("TPU v6 lite", None, "tpu")
    )
    held = jaxq.shardings(tree, {"w": P(None, "model")}, mesh)
    specs = jax.tree.map(lambda s: s.spec, held)
    parts = jax.shard_map(jaxq.execute(linear), mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data", "model"))

    def program(run, *at) -> str:
        given = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), (tree, x), at)
        with use_abstract_mesh(mesh):
            return jax.jit(run).trace(*given).lower(lowering_platforms=("tpu",)).as_text()

    data = NamedSharding(mesh, P("data"))
    assert "jaxq_packed_matmul" in program(parts, held, data)
    assert "jaxq_packed_matmul" not in program(jaxq.execute(linear), held, data)


def test_a_cast_of_the_weight_keeps_its_kernel():
    def forward(p, x):
        return x @ p["w"].astype(x.dtype)

    x = X.astype(jnp.bfloat16)
    tree = jaxq.pack(jaxq.calibrate(forward, {"w": W}, [x], jaxq.quantize(Int(4), None)))
    with use_abstract_mesh(one_device("TPU v6 lite")):
        program = jax.jit(jaxq.execute(forward)).trace(tree, x).lower(lowering_platforms=("tpu",))
    assert "jaxq_packed_matmul" in program.as_text()


def test_execute_has_no_kernel_run_elsewhere():
    w4a8 = of(jaxq.quantize(Int(4), Int(8)))
    assert "jaxq_packed_matmul" not in lowered(w4a8, X, how="float").as_text()
    assert "jaxq_packed_matmul" not in lowered(w4a8, X, kind="TPU v4").as_text()
    assert "jaxq_packed_matmul" not in lowered(w4a8, X, kind=None).as_text()
    w8a8 = of(jaxq.quantize(Int(8), Int(8)))
    assert "jaxq_packed_matmul" not in lowered(w8a8, X).as_text()
    assert "jaxq_packed_matmul" in lowered(w8a8, X, kind="TPU7x").as_text()
    assert "jaxq_packed_matmul" not in lowered(of(jaxq.quantize(jaxq.per_group(Int(4), 8), Int(8))), X).as_text()
