"""The Hopper kernel: its meaning, when it is chosen, what it compiles to, and that run in numpy (`ptx.py`)."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import jaxq
from jaxq.formats import Float, Int
from jaxq.formats.scales import Scales, from_bytes
from jaxq.kernels import gpu
from jaxq.kernels.layout import pack_codes
from jaxq.products import read_input
from tests.kernels import ptx
from tests.kernels.ahead import rows_of

hopper = pytest.importorskip("jaxq.kernels.hopper_matmul", reason="this jaxlib has no Mosaic GPU", exc_type=ImportError)

FORMATS = {
    "int4": Int(4),
    "uint4": Int(4, symmetric=False),
    "e2m1": Float(2, 1),
    "e1m2": Float(1, 2),
    "e3m0": Float(3, 0),
}
WIDE: dict = FORMATS | {"int8": Int(8), "e4m3": Float(4, 3, reserved=1)}
KERNELS: dict = {  # formats, channels of a group or 0 for per channel, how its scales are stored
    **{name: (fmt, 0, "real") for name, fmt in WIDE.items()},
    **{f"{name}_g128": (fmt, 128, "real") for name, fmt in WIDE.items()},
    "mxfp4": (Float(2, 1), 32, "power_of_two"),
    "nvfp4": (Float(2, 1), 16, "e4m3"),
}
MISSING = [
    name for name in ("jax_cuda13_plugin", "nvidia.cu13") if not (find_spec(name.split(".")[0]) and find_spec(name))
]
compiles = pytest.mark.skipif(bool(MISSING), reason=f"no GPU compiler ({MISSING}): pip install 'jaxq[gpu-aot]'")


def check(row: dict) -> None:
    assert row["spilled"] == 0, row
    bits = 8 if row["kernel"].startswith(("int8", "e4m3")) else 4
    assert row["mma"] == row["hmma"] == row["tile"][0] // 8 * 128 // bits, "16 channels, of 64 columns, 8 rows"
    assert row["alu"] < 4, row
    tile, rows = row["tile"][0], row["rows"]
    padded = 2 * (-(-rows // tile) * tile) * (row["N"] + row["K"])
    assert row["temporary"] <= (padded if rows > 8 else 0), "no weight"


def drawn(fmt: Int | Float, m: int, k: int, n: int, groups: int, scales: Scales = "real") -> tuple:
    """x, codes, packed codes, scales and zero points as stored, all so small that sums are exact in float32."""
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 2**fmt.bits, (k, n)).astype(np.uint8)
    packed = np.asarray(pack_codes(jnp.asarray(codes), fmt.bits)[0])
    scale = (2.0 ** draw.integers(-2, 3, (groups, n))).astype(np.float32)
    if scales == "e4m3":
        scale = draw.integers(1, 41, (groups, n)).astype(np.uint8)  # subnormal numbers among them
    elif scales == "power_of_two":
        scale = (127 + np.log2(scale)).astype(np.uint8)
    zero = None if fmt.symmetric else draw.integers(0, 2**fmt.bits, (groups, n)).astype(np.uint8)
    return draw.integers(-8, 9, (m, k)).astype(ml_dtypes.bfloat16), codes, packed, scale, zero


def exact(fmt: Int | Float, x: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """float64, the codes' values in numpy."""
    code, groups, middle = codes.astype(int), scale.shape[0], 2 ** (fmt.bits - 1)
    if isinstance(fmt, Int):
        values = (
            code - np.repeat(zero.astype(int), len(code) // groups, 0) if zero is not None else (code ^ middle) - middle
        )
    else:
        m = fmt.mantissa_bits
        exponent, mantissa = code % middle >> m, code % 2**m / 2**m
        magnitude = np.where(exponent == 0, 2.0 * mantissa, (1 + mantissa) * 2.0**exponent) / 2.0**fmt.bias
        values = np.where(code < middle, magnitude, -magnitude)
    a, b = x.astype(float).reshape(len(x), groups, -1), values.reshape(groups, -1, scale.shape[1])
    return np.einsum("mgk,gkn,gn->mn", a, b, scale)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_plain_meaning_is_what_numpy_finds(fmt, groups):
    x, codes, packed, scale, zero = drawn(fmt, 3, 512, 40, groups)
    found = hopper.plain_hopper_matmul(x, packed, jnp.asarray(scale), fmt, zero=zero)
    assert np.array_equal(found, exact(fmt, x, codes, scale, zero))


def test_powers_of_two_are_what_their_bytes_stand_for():
    from jaxq.kernels.hopper_scales import real

    stored = jnp.arange(255, dtype=jnp.uint8)
    found, wanted = real("power_of_two", stored, None), from_bytes("power_of_two", stored)
    assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes(), "2**-127, which is subnormal, too"


def test_tiles_are_those_that_were_fastest():
    found = [hopper.tiles(m, k // 2, n) for m in (1, 16) for k, n in ((4096, 4096), (4096, 11008), (8192, 28672))]
    assert found == [(8, 8), (8, 4), (8, 2), (16, 8), (16, 2), (16, 1)]
    assert hopper.tiles(1, 8192, 28672) == (8, 4), "8 bits"
    assert hopper.tiles(1, 256, 128) == (8, 1), "two steps for a part, or more"


def test_misfits_name_what_was_found():
    x, _, packed, scale, _ = drawn(Int(4), 3, 384, 128, 1)
    with pytest.raises(ValueError, match=r"x \(3, 384\).*K in blocks of 256"):
        hopper.hopper_matmul(jnp.asarray(x), jnp.asarray(packed), jnp.asarray(scale), Int(4))


# Compiled -------------------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize(
    ("name", "m", "k", "n"),
    [
        ("e2m1", 5, 512, 256),
        ("int4", 16, 2048, 128),  # a cluster of four
        ("uint4_g128", 3, 1024, 256),
        ("nvfp4", 3, 1024, 128),
        pytest.param("mxfp4", 16, 1024, 256, marks=pytest.mark.slow),
        pytest.param("uint4", 150, 1024, 256, marks=pytest.mark.slow),  # two blocks of rows
        pytest.param("e1m2_g128", 33, 1024, 256, marks=pytest.mark.slow),
        pytest.param("e3m0_g128", 3, 2304, 256, marks=pytest.mark.slow),  # nine steps by four blocks
        pytest.param("int4_g128", 3, 4096, 256, marks=pytest.mark.slow),
        pytest.param("int8", 9, 1024, 256, marks=pytest.mark.slow),
        pytest.param("e4m3_g128", 20, 1024, 128, marks=pytest.mark.slow),
        pytest.param("e2m1", 9, 2048, 17024, marks=pytest.mark.slow),  # the pipeline's slots are used twice
    ],
)
def test_the_compiled_kernel_run_in_numpy_is_exact(name, m, k, n, tmp_path):
    (row,) = rows_of(
        "gpu_compiled.py", "--kernels", name, "--rows", str(m), "--shapes", f"{k}x{n}", "--keep", str(tmp_path)
    )
    check(row)
    fmt, size, scales = KERNELS[name]
    groups, (rows, splits) = k // (size or k), row["tile"]
    x, codes, packed, scale, zero = drawn(fmt, m, k, n, groups, scales)
    padded = m if m <= 8 else -(-m // rows) * rows
    out = np.full((m, n), np.nan, ml_dtypes.bfloat16)
    given = np.concatenate([x, np.zeros((padded - m, k), x.dtype)])
    numbers = [scale] if zero is None else [scale, zero]
    maps: list = [ptx.Tiled(packed, (16, 1)), ptx.Tiled(given, (rows // 8, 16 // fmt.bits))]
    maps += [ptx.Rows(a, 128, max(1, 128 // size)) for a in numbers if groups > 1]
    (text,) = (file.read_text() for file in tmp_path.glob("*.ptx"))
    height, width = padded // min(rows, padded), n // 128
    grid = (splits * width, height, 1) if "%ctaid.y" in text else (splits * height * width, 1, 1)
    ptx.run(text, grid, 1, maps, [*numbers, out] if groups == 1 else [out], splits)
    real = np.asarray(from_bytes(scales, jnp.asarray(scale)))
    assert np.array_equal(out, exact(fmt, x, codes, real, zero).astype(ml_dtypes.bfloat16))


@compiles
@pytest.mark.slow
def test_all_kernels_compile():
    rows = rows_of("gpu_compiled.py", "--rows", "1", "16", "256", "4096")
    assert len(rows) == 4 * len(KERNELS)
    for row in rows:
        check(row)


# Chosen ---------------------------------------------------------------------------------------------------------------

W = jax.random.normal(jax.random.key(0), (512, 256), jnp.bfloat16)
X = jax.random.normal(jax.random.key(1), (5, 512), jnp.bfloat16) + 0.5
EIGHT = {"int8": Int(8), "uint8": Int(8, symmetric=False), "e4m3": Float(4, 3, reserved=1), "e3m4": Float(3, 4)}
ACTIVATIONS = {
    "int8": Int(8),
    "uint8": Int(8, symmetric=False),
    "int8_token": jaxq.per_token(Int(8)),
    "uint6_token": jaxq.per_token(Int(6, symmetric=False)),
    "e2m1": Float(2, 1),
}


def forward(p, x):
    return x @ p["w"]


def quantized(weights: object = Int(4), activations: object = None, w: jax.Array = W) -> jaxq.Quantized:
    return jaxq.calibrate(forward, {"w": w}, [X.astype(w.dtype)], jaxq.quantize(weights, activations))


@pytest.fixture
def any_size(monkeypatch):
    """Small weights have the kernel for many rows; these tests' shall not."""
    monkeypatch.setattr(gpu, "SMALL", 0)


def uses(
    tree: jaxq.Quantized,
    products: str = "int8",
    kind: str = "NVIDIA H200",
    x: jax.Array = X,
    kernel: str = "jaxq_hopper_matmul",
) -> bool:
    """Whether a GPU's program has the kernel."""
    device = AbstractDevice(kind, None, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)):
        traced = jax.jit(jaxq.execute(forward, products)).trace(jaxq.pack(tree), x)
        return kernel in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("weights", [*FORMATS.values(), *EIGHT.values()], ids=[*FORMATS, *EIGHT])
def test_a_hopper_runs_it_for_weights_alone(weights):
    tree = quantized(weights)
    assert (
        uses(tree)
        and not uses(tree, "xla")
        and not uses(tree, "float")
        and not uses(tree, kind="NVIDIA A100-SXM4-80GB")
    )


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_hopper_runs_it_for_quantized_activations(activations):
    assert uses(quantized(Int(4, symmetric=False), activations))
    assert not uses(quantized(Int(8), activations)), "8 bits by 8 XLA multiplies, in int8"


@pytest.mark.usefixtures("any_size")
def test_products_without_a_kernel():
    many = jnp.broadcast_to(X[:1], (1000, 512))
    assert not uses(quantized(), x=many), "there is another kernel"
    assert not uses(quantized(), x=X[:0]), "no tokens"
    assert not uses(quantized(w=W[:, :200])) and not uses(quantized(Int(6))) and not uses(quantized(Float(7, 0)))
    assert not uses(quantized(Float(2, 1), Int(8, symmetric=False))), "floats have no sums beforehand"
    assert not uses(quantized(w=W.astype(jnp.float32)), x=X.astype(jnp.float32)), "bfloat16 would round it"


PAIRS = {(name, "bfloat16"): (fmt, None) for name, fmt in (FORMATS | EIGHT).items()} | {
    (w, x): (FORMATS[w], ACTIVATIONS[x])
    for w in FORMATS
    for x in ACTIVATIONS
    if isinstance(FORMATS[w], Int) or not x.startswith("uint")
}


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(("weights", "activations"), PAIRS.values(), ids=map("-".join, PAIRS))
@pytest.mark.parametrize("group", [None, pytest.param(128, marks=pytest.mark.slow), 32])
def test_what_the_kernel_is_given_means_the_product(weights, activations, group, monkeypatch):
    """Scales, units and zero points. On a Hopper the kernel itself, elsewhere its meaning in its place."""
    tree = quantized(weights if group is None else jaxq.per_group(weights, group), activations)
    leaf, (quant,) = jaxq.pack(tree).params["w"], tree.inputs.values() or (None,)
    x = read_input(quant, X, (1,))
    groups, sums = leaf.grid.scale.shape[0], jaxq.pack(tree).params["w"].sums
    assert gpu.has_kernel(x, leaf.split, 256, groups, sums)
    if not gpu.target():
        monkeypatch.setattr(hopper, "hopper_matmul", hopper.plain_hopper_matmul)
    found = gpu.packed_product(x, leaf.planes[0], leaf.stored, leaf.split, sums, dtype=jnp.float32)
    a = np.asarray(x.centered, np.float64) * (1 if x.scale is None else np.asarray(x.scale))
    wanted = a @ np.asarray(replace(leaf, dtype=jnp.float32).dequantize(), float)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("activations", [None, jaxq.per_token(Int(8))], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("weights", [jaxq.mxfp4(), jaxq.nvfp4()], ids=["mxfp4", "nvfp4"])
def test_the_kernel_is_given_block_scales_as_bytes(weights, activations, monkeypatch):
    tree = quantized(weights, activations)
    leaf, (quant,) = jaxq.pack(tree).params["w"], tree.inputs.values() or (None,)
    x, given = read_input(quant, X, (1,)), []

    def noted(x: jax.Array, w: jax.Array, scale: jax.Array, *rest: Any, **named: Any) -> jax.Array:
        given.append(scale.dtype)
        return (multiply if gpu.target() else hopper.plain_hopper_matmul)(x, w, scale, *rest, **named)

    multiply = hopper.hopper_matmul
    monkeypatch.setattr(hopper, "hopper_matmul", noted)
    found = gpu.packed_product(x, leaf.planes[0], leaf.stored, leaf.split, None, dtype=jnp.float32)
    a = np.asarray(x.centered, np.float64) * (1 if x.scale is None else np.asarray(x.scale))
    wanted = a @ np.asarray(replace(leaf, dtype=jnp.float32).dequantize(), float)
    assert given == [jnp.uint8]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_elsewhere_and_for_derivatives_it_is_the_plain_product():
    tree = quantized(Float(2, 1))
    packed, run = jaxq.pack(tree), jax.jit(jaxq.execute(forward))
    for f in (run, jax.grad(lambda tree, x: run(tree, x).astype(jnp.float32).sum(), 1)):
        found, wanted = (np.asarray(f(t, X), float) for t in (packed, tree))
        np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-2 * np.abs(wanted).max())
