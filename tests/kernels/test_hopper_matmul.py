"""The Hopper kernel: its meaning, when it is chosen, what it compiles to, and that run in numpy (`ptx.py`)."""

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
from jaxq.kernels.layout import pack_codes
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
MISSING = [
    name for name in ("jax_cuda13_plugin", "nvidia.cu13") if not (find_spec(name.split(".")[0]) and find_spec(name))
]
compiles = pytest.mark.skipif(bool(MISSING), reason=f"no GPU compiler ({MISSING}): pip install 'jaxq[gpu-aot]'")


def check(row: dict) -> None:
    assert row["spilled"] == 0 and not row["serialized"], row
    assert row["wgmma"] == row["hgmma"] == 16, "8 of 16 channels for each of two tiles of 64 columns"
    assert row["alu"] < 5, row
    (tile, _, splits), rows = row["tile"], row["rows"]
    padded = -(-rows // tile) * tile
    most = (
        4 * splits * padded * row["N"] if splits > 1 else 4 * padded * row["N"] * (padded > rows)
    ) + 2 * padded * row["K"]
    assert row["temporary"] <= most + 4 * row["N"] * row["K"] // 128, "no weight"


def drawn(m: int, k: int, n: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, codes, packed codes and scales, all so small that sums are exact in float32."""
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 16, (k, n)).astype(np.uint8)
    packed = np.asarray(pack_codes(jnp.asarray(codes), 4)[0])
    scale = (2.0 ** draw.integers(-2, 3, (groups, n))).astype(np.float32)
    return draw.integers(-8, 9, (m, k)).astype(ml_dtypes.bfloat16), codes, packed, scale


def exact(fmt: Int | Float, x: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64, the codes' values in numpy."""
    code = codes.astype(int)
    if isinstance(fmt, Int):
        values = (code ^ (8 if fmt.symmetric else 0)) - 8
    else:
        m = fmt.mantissa_bits
        exponent, mantissa = code % 8 >> m, code % 2**m / 2**m
        magnitude = np.where(exponent == 0, 2.0 * mantissa, (1 + mantissa) * 2.0**exponent) / 2.0**fmt.bias
        values = np.where(code < 8, magnitude, -magnitude)
    groups = scale.shape[0]
    a, b = x.astype(float).reshape(len(x), groups, -1), values.reshape(groups, -1, scale.shape[1])
    return np.einsum("mgk,gkn,gn->mn", a, b, scale)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_plain_meaning_is_what_numpy_finds(fmt, groups):
    x, codes, packed, scale = drawn(3, 512, 40, groups)
    found = hopper.plain_hopper_matmul(jnp.asarray(x), jnp.asarray(packed), jnp.asarray(scale), fmt)
    assert np.array_equal(found, exact(fmt, x, codes, scale))


def test_tiles_fill_the_machine_and_cut_no_step():
    for m, k, n, groups in [(1, 4096, 4096, 1), (17, 11008, 4096, 1), (300, 4096, 1152, 32), (4096, 768, 128, 1)]:
        rows, warpgroups, splits = hopper.tiles(m, k, n, groups)
        assert rows % 8 == 0 and n % (warpgroups * 128) == 0 and k // 128 % splits == 0
        assert splits == 1 or -(-m // rows) * n // 128 // warpgroups * splits <= 132


def test_misfits_name_what_was_found():
    x, _, packed, scale = (jnp.asarray(a) for a in drawn(3, 384, 128, 1))
    with pytest.raises(ValueError, match=r"x \(3, 384\).*K in blocks of 256"):
        hopper.hopper_matmul(x, packed, scale, Int(4))


# Compiled -------------------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize(
    ("name", "m", "k", "n"),
    [
        ("e2m1", 5, 512, 256),
        ("int4", 20, 2048, 128),  # one warpgroup, eight parts
        pytest.param("uint4", 150, 1024, 256, marks=pytest.mark.slow),  # two blocks of rows
        pytest.param("e1m2_g128", 33, 1024, 256, marks=pytest.mark.slow),
        pytest.param("e3m0_g128", 3, 2304, 256, marks=pytest.mark.slow),
        pytest.param("int4_g128", 3, 4096, 256, marks=pytest.mark.slow),
        pytest.param("e2m1", 9, 2048, 17024, marks=pytest.mark.slow),  # the pipeline's slots are used twice
    ],
)
def test_the_compiled_kernel_run_in_numpy_is_exact(name, m, k, n, tmp_path):
    (row,) = rows_of(
        "gpu_compiled.py", "--kernels", name, "--rows", str(m), "--shapes", f"{k}x{n}", "--keep", str(tmp_path)
    )
    check(row)
    fmt, groups = FORMATS[name.removesuffix("_g128")], k // 128 if name.endswith("g128") else 1
    rows, warpgroups, splits = row["tile"]
    x, codes, packed, scale = drawn(-(-m // rows) * rows, k, n, groups)
    unit = 1.0 if isinstance(fmt, Int) else 2.0 ** (fmt.bias - 1)  # which the kernel's caller takes off the scales
    out = np.full((splits, len(x), n), np.nan, np.float32)
    maps = [ptx.Tiled(packed, (8, warpgroups)), ptx.Tiled(x, (rows // 8, 1))]
    grid = splits, n // 128 // warpgroups, len(x) // rows
    (text,) = (file.read_text() for file in tmp_path.glob("*.ptx"))
    ptx.run(text, grid, warpgroups + 1, maps, [(scale / unit).astype(np.float32), out])
    assert np.array_equal(out.sum(0), exact(fmt, x, codes, scale))


@compiles
@pytest.mark.slow
def test_all_kernels_compile():
    rows = rows_of("gpu_compiled.py", "--rows", "1", "16", "256", "4096")
    assert len(rows) == 40
    for row in rows:
        check(row)


# Chosen ---------------------------------------------------------------------------------------------------------------

W = jax.random.normal(jax.random.key(0), (512, 256), jnp.bfloat16)
X = jax.random.normal(jax.random.key(1), (5, 512), jnp.bfloat16)


def forward(p, x):
    return x @ p["w"]


def packed(weights: Int | Float = Int(4), activations: Int | None = None, w: jax.Array = W) -> jaxq.Quantized:
    return jaxq.pack(jaxq.calibrate(forward, {"w": w}, [X], jaxq.quantize(weights, activations)))


def lowered(tree: jaxq.Quantized, products: str, kind: str = "NVIDIA H200") -> str:
    device = AbstractDevice(kind, None, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)):
        traced = jax.jit(jaxq.execute(forward, products)).trace(tree, X)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS)
def test_execute_has_a_hopper_run_it_only_when_asked(weights):
    tree = packed(weights)
    assert "jaxq_hopper_matmul" in lowered(tree, "experimental")
    assert "jaxq_hopper_matmul" not in lowered(tree, "int8")
    assert "jaxq_hopper_matmul" not in lowered(tree, "experimental", "NVIDIA A100-SXM4-80GB")


def test_products_without_a_kernel():
    for tree in (packed(Int(8)), packed(activations=Int(8)), packed(w=W[:, :200])):
        assert "jaxq_hopper_matmul" not in lowered(tree, "experimental")


@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS)
def test_what_the_kernel_is_given_means_the_plain_product(weights, monkeypatch):
    """With the kernel's meaning in its place: scales, units and zero points."""
    from jaxq.kernels import gpu
    from jaxq.kernels.plain import Integers, product, weight_integers

    monkeypatch.setattr(hopper, "hopper_matmul", hopper.plain_hopper_matmul)
    leaf = packed(weights).params["w"]
    w = weight_integers(leaf.unpack())
    x = Integers(X)
    assert gpu.has_kernel(x, leaf.split, W.shape[1])
    found = gpu.packed_product(x, leaf.planes[0], w, leaf.split)
    wanted = product(Integers(X.astype(jnp.float32)), w, None, "int8", "highest")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("weights", [Int(4, symmetric=False), Float(2, 1)], ids=str)
def test_groups(weights, monkeypatch):
    from jaxq.kernels import gpu
    from jaxq.kernels.plain import Integers, weight_integers

    tree = packed(jaxq.per_group(weights, 128))
    leaf = tree.params["w"]
    assert "jaxq_hopper_matmul" in lowered(tree, "experimental")
    monkeypatch.setattr(hopper, "hopper_matmul", hopper.plain_hopper_matmul)
    found = gpu.packed_product(Integers(X), leaf.planes[0], weight_integers(leaf), leaf.split)
    wanted = np.asarray(X, float) @ np.asarray(replace(leaf, dtype=jnp.float32).dequantize(), float)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_elsewhere_and_for_derivatives_it_is_the_plain_product():
    tree = packed(Float(2, 1))
    usual, asked = (jax.jit(jaxq.execute(forward, products)) for products in ("int8", "experimental"))
    assert np.array_equal(asked(tree, X), usual(tree, X))
    device = AbstractDevice("NVIDIA H200", None, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)):
        slope = jax.jit(jax.grad(lambda x: asked(tree, x).astype(jnp.float32).sum()))(X)
    wanted = jax.jit(jax.grad(lambda x: usual(tree, x).astype(jnp.float32).sum()))(X)
    assert np.array_equal(slope, wanted)
