"""The quantizing Hopper kernel: what it compiles to, run in numpy (`ptx.py`), when it is chosen, and on a GPU."""

from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import jaxq
from jaxq.formats import Float, Int
from jaxq.kernels import gpu
from jaxq.products import read_input
from jaxq.qtensor import Grid
from tests.kernels import ptx
from tests.kernels.ahead import rows_of

hopper = pytest.importorskip(
    "jaxq.kernels.hopper_quantize", reason="this jaxlib has no Mosaic GPU", exc_type=ImportError
)

FORMATS = {"int8": Int(8), "uint8": Int(8, symmetric=False), "int4": Int(4), "uint6": Int(6, symmetric=False)}
MISSING = [
    name for name in ("jax_cuda13_plugin", "nvidia.cu13") if not (find_spec(name.split(".")[0]) and find_spec(name))
]
compiles = pytest.mark.skipif(bool(MISSING), reason=f"no GPU compiler ({MISSING}): pip install 'jaxq[gpu-aot]'")


def drawn(m: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, of which one row has ties between codes, one is 0 and one positive; shift and divisor."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(m, k)) * 2.0 ** draw.integers(-3, 4, (m, 1)) + 0.5
    x[1] = draw.integers(-127, 128, k) / 2
    x[1, 3], x[2], x[3] = 127, 0, np.abs(x[3])
    shift, divisor = draw.normal(size=k), 2.0 ** draw.normal(size=k)
    return x.astype(ml_dtypes.bfloat16), shift.astype(np.float32), divisor.astype(np.float32)


def fixed(fmt: Int) -> Grid:
    one = np.ones((1, 1), np.float32)
    return Grid(jnp.asarray(one / 37), None if fmt.symmetric else jnp.asarray(one * 2 ** (fmt.bits - 2) + 5))


def meaning(fmt: Int, grid: Grid | None, x: np.ndarray, *vectors: np.ndarray) -> list:
    """Operation by operation: `jit` may leave out the rounding of a quotient to bfloat16."""
    found = hopper.plain_hopper_quantize(jnp.asarray(x), fmt, grid, *map(jnp.asarray, vectors))
    return [None if a is None else np.asarray(a) for a in found]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("static", [False, True])
def test_the_plain_meaning_is_what_numpy_finds(fmt, static):
    """Values to their halfway points, in float64."""
    x, shift, divisor = drawn(5, 40)
    grid = fixed(fmt) if static else None
    values, scale, center = meaning(fmt, grid, x, shift, divisor)
    a = (x - shift.astype(x.dtype)).astype(float) / divisor.astype(x.dtype).astype(float)
    a = a.astype(ml_dtypes.bfloat16).astype(float)
    low, high = np.minimum(a.min(1, keepdims=True), 0), np.maximum(a.max(1, keepdims=True), 0)
    if grid is None:
        width, steps = (np.maximum(-low, high), fmt.qmax) if fmt.symmetric else (high - low, fmt.qmax - fmt.qmin)
        np.testing.assert_allclose(scale, np.where(width == 0, 1, width / steps), rtol=1e-6)
    found = (values + (0 if center is None else center)) * scale.astype(float)
    zero = 0 if center is None else 2 ** (fmt.bits - 1) - center
    inside = np.clip(a, (fmt.qmin - zero) * scale, (fmt.qmax - zero) * scale)
    assert np.abs(found - inside).max() <= 0.5001 * scale.max() and np.abs(values).max() <= 128


# Compiled -------------------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize(
    ("name", "static", "vectors", "m", "k"),
    [
        ("int8", False, True, 9, 1032),  # the last chunk, and the last rows, lie over others
        ("uint8", False, True, 43, 1536),
        ("uint8", True, True, 5, 2048),
        pytest.param("int8", True, False, 20, 512, marks=pytest.mark.slow),
        pytest.param("uint6", False, False, 20, 768, marks=pytest.mark.slow),
        pytest.param("int4", True, True, 4, 11008, marks=pytest.mark.slow),
        pytest.param("int8", False, True, 1600, 8192, marks=pytest.mark.slow),  # three turns of a warpgroup
        pytest.param("uint8", False, True, 7, 32768, marks=pytest.mark.slow),
    ],
)
def test_the_compiled_kernel_run_in_numpy_is_its_meaning(name, static, vectors, m, k, tmp_path):
    kind = name + ("_static" if static else "") + ("_vectors" if vectors else "")
    (row,) = rows_of("gpu_quantize.py", "--kernels", kind, "--shapes", f"{m}x{k}", "--keep", str(tmp_path))
    assert row["spilled"] < 32 and row["instructions"] < 30, row
    fmt, (x, *given) = FORMATS[name], drawn(m, k)
    given, grid = given if vectors else [], fixed(fmt) if static else None
    values, *numbers = meaning(fmt, grid, x, *given)
    out = np.full(x.shape, 99, np.int8)
    own = [] if static else [np.full((m, 1), np.nan, np.float32) for _ in range(2 - fmt.symmetric)]
    grids = [np.array(a) for a in jax.tree.leaves(grid)]
    _, rows, warpgroups = hopper.tiles(m, k)
    (text,) = (file.read_text() for file in tmp_path.glob("*.ptx"))
    blocks = min(hopper.PROCESSORS, -(-m // (rows * warpgroups)))
    ptx.run(text, (blocks, 1, 1), warpgroups, [], [*given, x, *grids, out, *own])  # in the order of their first use
    assert np.array_equal(out, values)
    if not static:
        assert np.array_equal(own[0], numbers[0])
        assert fmt.symmetric or np.array_equal(2 ** (fmt.bits - 1) - own[1], numbers[1])


# Chosen ---------------------------------------------------------------------------------------------------------------

X = jax.random.normal(jax.random.key(1), (4, 128, 512), jnp.bfloat16) + 0.5
W = jax.random.normal(jax.random.key(0), (512, 256), jnp.bfloat16)
ACTIVATIONS = {
    "int8": Int(8),
    "uint8": Int(8, symmetric=False),
    "int8_token": jaxq.per_token(Int(8)),
    "uint6_token": jaxq.per_token(Int(6, symmetric=False)),
}


def forward(p, x):
    return x @ p["w"]


def quantized(activations: object, dtype: object = jnp.bfloat16, channels: int = 512) -> jaxq.Quantized:
    w, x = W[:channels].astype(dtype), X[..., :channels].astype(dtype)
    return jaxq.calibrate(forward, {"w": w}, [x], jaxq.quantize(Int(8), activations))


def uses(tree: jaxq.Quantized, products: str = "int8", kind: str = "NVIDIA H100 80GB HBM3", x: jax.Array = X) -> bool:
    """Whether a GPU's program has the kernel."""
    device = AbstractDevice(kind, None, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)):
        traced = jax.jit(jaxq.execute(forward, products)).trace(jaxq.pack(tree), x)
        return "jaxq_hopper_quantize" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_hopper_reads_many_tokens_by_it(activations):
    tree = quantized(activations)
    assert uses(tree) and not uses(tree, kind="NVIDIA A100-SXM4-80GB") and not uses(tree, x=X[:1])
    assert not any(uses(tree, products) for products in ("xla", "float", "decoded"))


def test_activations_without_it():
    assert not uses(quantized(Float(2, 1))) and not uses(quantized(None))
    assert not uses(quantized(Int(8), channels=300), x=X[..., :300])
    assert not uses(quantized(Int(8), jnp.float32), x=X.astype(jnp.float32))


@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_what_the_kernel_is_given_means_the_activation(activations, monkeypatch):
    """Axes and vectors. On a Hopper the kernel itself, elsewhere its meaning in its place."""
    (quant,) = quantized(activations).inputs.values()
    shift, divisor = drawn(4, 512)[1:]
    quant = replace(quant, shift=jnp.asarray(shift).reshape(8, 64), scale=jnp.asarray(divisor).reshape(8, 64))
    x = X.reshape(4, 128, 8, 64)
    if not gpu.target():
        monkeypatch.setattr(hopper, "hopper_quantize", hopper.plain_hopper_quantize)
    found = gpu.quantized(quant, x, (2, 3))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = read_input(*jax.device_put((quant, x), jax.devices("cpu")[0]), (2, 3))
    for name in ("values", "scale", "center"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert (a is None and b is None) or (a.shape == b.shape and np.array_equal(a, b)), name
    assert found.bound == wanted.bound and np.array_equal(found.int8, wanted.values)


@pytest.mark.parametrize(
    "activations",
    [pytest.param(a, id=name, marks=[] if name == "int8" else pytest.mark.slow) for name, a in ACTIVATIONS.items()],
)
def test_elsewhere_and_for_derivatives_it_is_the_plain_reading(activations):
    """A program that is traced for a Hopper and run here."""
    tree = jaxq.pack(quantized(activations))

    def run(x: jax.Array, products: str) -> jax.Array:
        return jaxq.execute(forward, products)(tree, x).astype(jnp.float32).sum()

    device = AbstractDevice("NVIDIA H200", None, "gpu")
    for f in (run, jax.grad(run)):
        wanted = jax.jit(f, static_argnums=1)(X, "xla")
        with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)):
            traced = jax.jit(f, static_argnums=1).trace(X, "int8")
            found = traced.lower(lowering_platforms=("cpu",)).compile()(X)
        np.testing.assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=2e-2)
