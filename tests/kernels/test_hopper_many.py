"""The Hopper kernel for many rows: its meaning, when it is chosen, what it compiles to, and that run in numpy."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxq
from jaxq.formats import Float, Int
from jaxq.formats.scales import from_bytes
from jaxq.kernels import gpu
from jaxq.products import read_input
from tests.kernels import ptx
from tests.kernels.ahead import rows_of
from tests.kernels.test_hopper_matmul import (
    ACTIVATIONS,
    EIGHT,
    FORMATS,
    KERNELS,
    W,
    X,
    compiles,
    drawn,
    exact,
    quantized,
)
from tests.kernels.test_hopper_matmul import uses as uses_kernel

many, tiles, weights = (
    pytest.importorskip(f"jaxq.kernels.{name}", reason="this jaxlib has no Mosaic GPU", exc_type=ImportError)
    for name in ("hopper_many", "hopper_tiles", "hopper_weights")
)

ROWS = jnp.concatenate([X * (1 + i / 8) for i in range(12)])  # 60
GROUPED = jnp.concatenate([ROWS, ROWS])  # more than the other kernel takes of weights in groups
INTEGERS = {"int8": Int(8), "uint8": Int(8, symmetric=False)}
PAIRS = {(name, "bfloat16"): (fmt, None) for name, fmt in (FORMATS | EIGHT).items()} | {
    (w, x): (fmt, ACTIVATIONS[x])
    for w, fmt in (FORMATS | INTEGERS).items()
    for x in ACTIVATIONS
    if isinstance(fmt, Int) or not x.startswith("uint")
}


def vectors(m: int, n: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    found = {"row": 2.0 ** draw.integers(-2, 3, m), "left": draw.integers(-9, 10, (2, m))}
    return {name: a.astype(np.float32) for name, a in (found | {"right": draw.integers(-9, 10, (2, n))}).items()}


def finished(sums: np.ndarray, scale: np.ndarray, row: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64; the sums come times the scale."""
    return (sums + left.astype(float).T @ right * scale) * row[:, None]


def scaled(values: np.ndarray, scale: np.ndarray, real: bool) -> np.ndarray:
    """Weights, float64 [K, N], as the kernel rounds them."""

    def rounded(a: np.ndarray) -> np.ndarray:
        return a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float)

    scale = np.repeat(scale.astype(float), len(values) // len(scale), 0)
    first = rounded(scale)
    return rounded(values * first + (rounded(values * rounded(scale - first)) if real else 0))


def drawn_groups(name: str, m: int, k: int, n: int) -> tuple:
    """As `drawn`, with real scales that bfloat16 does not hold; and the product in float64."""
    fmt, size, scales = KERNELS[name]
    x, codes, packed, scale, zero = drawn(fmt, m, k, n, k // (size or k), scales)
    if size and scales == "real":
        scale = (scale * (1 + np.random.default_rng(3).integers(0, 2**10, scale.shape) * 2.0**-10)).astype(np.float32)
    real = np.asarray(from_bytes(scales, jnp.asarray(scale)))
    if not size:
        return x, codes, packed, scale, zero, exact(fmt, x, codes, real, zero)
    values = exact(fmt, np.eye(k), codes, np.ones_like(real), zero)
    return x, codes, packed, scale, zero, x.astype(float) @ scaled(values, real, scales == "real")


@pytest.mark.parametrize("name", KERNELS)
def test_the_plain_meaning_is_what_numpy_finds(name):
    x, _, packed, scale, zero, product = drawn_groups(name, 3, 512, 40)
    zeros, others, (fmt, size, scales) = None if zero is None else jnp.asarray(zero), vectors(3, 40), KERNELS[name]
    found = many.plain_hopper_many(
        *map(jnp.asarray, (x, packed, scale)), fmt, zero=zeros, scales=scales, factor=jnp.full((1, 1), 2.0), **others
    )
    wanted = 2 * finished(product, np.ones((1, 40)) if size else scale, **others)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.nanmax(np.abs(wanted)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_tiles_are_what_the_tensor_cores_take(dtype):
    made = weights.weights(Int(8), jnp.dtype(dtype))
    small = (100, 256, 128), (5, 128, 128)
    for m, k, n in [(17, 4096, 4096), (128, 4096, 11008), (2048, 2048, 4096), (8192, 11008, 4096), *small]:
        (slices, rows, splits), steps = tiles.tiles(m, k, n, made), k // made.depth
        assert rows % (8 if dtype == jnp.bfloat16 else 16) == 0 and slices * rows <= tiles.MOST_SUMS
        assert 1 <= splits <= steps and -(-steps // splits) * (splits - 1) < steps, "no part of K is empty"


def test_tiles_are_those_that_were_fastest():
    made = weights.weights(Int(4), jnp.dtype(jnp.bfloat16))
    fastest = {32: (2, 32, 3), 128: (1, 128, 1), 256: (2, 88, 1), 512: (1, 176, 1), 2048: (1, 232, 1)}
    assert {m: tiles.tiles(m, 2048, 11008, made) for m in fastest} == fastest, "on an H200"
    fastest = {32: (1, 32, 4), 64: (1, 64, 4), 128: (1, 64, 2), 256: (1, 64, 1)}
    assert {m: tiles.tiles(m, 2048, 4096, made) for m in fastest} == fastest
    fastest = {16: (2, 16, 3), 32: (2, 32, 3), 64: (2, 64, 3), 128: (2, 128, 3), 256: (1, 256, 1)}
    assert {m: tiles.tiles(m, 2048, 11008, made, 2) for m in fastest} == fastest, "in groups"
    fastest = {16: (1, 16, 4), 32: (1, 32, 4), 64: (1, 64, 4), 128: (1, 128, 4)}
    assert {m: tiles.tiles(m, 2048, 4096, made, 2) for m in fastest} == fastest


def test_misfits_name_what_was_found():
    x, _, packed, scale, _ = drawn(Int(4), 3, 384, 128, 1)
    with pytest.raises(ValueError, match=r"x \(3, 384\).*K in blocks of 256"):
        many.hopper_many(jnp.asarray(x), jnp.asarray(packed), jnp.asarray(scale), Int(4))
    with pytest.raises(ValueError, match="not multiplied in int8"):
        many.hopper_many(jnp.asarray(x, jnp.int8), jnp.asarray(packed), jnp.asarray(scale), Float(3, 0))
    x, _, packed, scale, _ = drawn(Int(4), 3, 512, 128, 4)
    with pytest.raises(ValueError, match=r"of int8.*scales \(4, 128\).*for x in bfloat16, groups"):
        many.hopper_many(jnp.asarray(x, jnp.int8), jnp.asarray(packed), jnp.asarray(scale), Int(4))


# Compiled -------------------------------------------------------------------------------------------------------------


def check(row: dict) -> None:
    assert row["overwritten"] == 0 and not row["serialized"], row
    assert row["spilled"] == 0 and row["wgmma"] == row["gmma"] and row["registers"] <= 232, row
    assert row["alu"] < (4.5 if row["kernel"].endswith(("g128", "fp4")) else 3), row
    parts = row["tile"][2] * 4 * row["rows"] * row["N"] if row["tile"][2] > 1 else 0
    padded = 2 * (row["rows"] + 8) * row["K"] if row["rows"] % 8 else 0
    assert row["temporary"] <= parts + padded + 64 * (row["rows"] + 128) + 8 * row["N"], "no weight"


@compiles
@pytest.mark.parametrize(
    ("name", "m", "k", "n", "tile"),
    [
        ("int4", 300, 512, 128, (1, 256, 1)),
        ("int8_e2m1", 70, 512, 384, (2, 64, 1)),  # a tile of columns that is half there
        ("uint4_g128", 70, 512, 384, (2, 64, 1)),
        ("nvfp4", 40, 512, 256, (1, 40, 1)),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("uint4", 150, 1024, 384, (2, 128, 2)),
                ("e2m1", 130, 1024, 256, (1, 136, 1)),
                ("e3m0", 65, 1024, 256, (2, 24, 3)),
                ("int8", 150, 1024, 384, (2, 128, 1)),
                ("e4m3", 129, 512, 256, (1, 88, 1)),
                ("int8_int4", 150, 2048, 384, (2, 128, 1)),
                ("int8_uint4", 129, 2048, 256, (1, 192, 2)),
                ("int8_int8", 150, 2048, 256, (1, 256, 1)),
                ("int8_e1m2", 129, 1024, 256, (1, 128, 2)),
                ("int4", 2900, 512, 1408, (2, 128, 1)),  # blocks take a second tile
                ("int4_g128", 150, 1024, 384, (2, 128, 2)),
                ("e2m1_g128", 129, 512, 256, (1, 88, 1)),
                ("mxfp4", 300, 1024, 256, (1, 256, 1)),
                ("int8_g128", 129, 512, 256, (1, 88, 1)),
                ("e4m3_g128", 70, 512, 384, (2, 64, 1)),
            ]
        ],
    ],
)
@pytest.mark.parametrize("others", [False, True], ids=["", "vectors"])
def test_the_compiled_kernel_run_in_numpy_is_exact(name, m, k, n, tile, others, tmp_path):
    options = ["--kernels", name, "--rows", str(m), "--shapes", f"{k}x{n}", "--tile", *map(str, tile)]
    options += ["--keep", str(tmp_path), *(["--vectors"] if others else [])]
    (row,) = rows_of("gpu_compiled_many.py", *options)
    check(row)
    in_int8 = name not in KERNELS
    (slices, rows, splits), of = tile, name.removeprefix("int8_") if in_int8 else name
    fmt, size, scales = KERNELS[of]
    x, codes, packed, scale, zero, product = drawn_groups(of, m, k, n)
    if in_int8:
        x = np.random.default_rng(2).integers(-127, 128, (m, k)).astype(np.int8)
        product = exact(fmt, x, codes, scale, None if zero is None else np.full_like(zero, 8))
    made, numbers = weights.weights(fmt, x.dtype), [scale] if zero is None or in_int8 else [scale, zero]
    groups = tiles.Groups(size or k, scales, sum(a.itemsize for a in numbers) if size else 0)
    given = {} if size else dict(zip(("scale", "zero"), numbers))
    if made.bias:
        given["sums"] = x.sum(1, dtype=np.int32)[None]
    if others:
        given |= {**vectors(m, n)}
        last = np.ones((1, n)) if size else scale
        product = finished(product, last, given["row"], given["left"], given["right"])
        given["row"] = given["row"][None]
    for vector in {"sums", "row", "left"} & given.keys():
        given[vector] = np.pad(given[vector], ((0, 0), (0, -m % rows)))
    out = np.full((splits, m, n), np.nan, ml_dtypes.bfloat16 if splits == 1 else np.float32)
    used = ["zero", "sums", "left", "right", "row", "scale"]  # the order that the kernel first uses them in
    padded, depth = np.pad(x, ((0, -m % 8), (0, 0))), row["depth"]
    maps: list = [
        ptx.Tiled(packed, (depth // 8, slices)),
        ptx.Tiled(padded, (rows // 8, depth * x.itemsize // 128)),
        *(ptx.Rows(a, 128 * slices, groups.each(depth)) for a in numbers if size),
    ]
    (text,) = (file.read_text() for file in tmp_path.glob("*.ptx"))
    blocks = min(-(-m // rows) * -(-n // (128 * slices)) * splits, tiles.PROCESSORS)
    ptx.run(text, (blocks, 1, 1), 3, maps, [*(given[vector] for vector in used if vector in given), out])
    found = out[0] if splits == 1 else out.astype(float).sum(0)
    wanted = product.astype(np.float32).astype(out.dtype)
    if name == "e4m3_g128":  # of which sums are not exact: some are rounded to the next bfloat16
        assert (found != wanted)[~np.isnan(product)].mean() < 1e-3
        return np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=2**-7)
    assert np.array_equal(found, wanted, equal_nan=True)


@compiles
@pytest.mark.slow
def test_all_kernels_compile():
    rows = rows_of("gpu_compiled_many.py", "--shapes", "4096x11008", "--rows", "17", "128", "2048")
    assert len(rows) == 3 * 21
    for row in rows:
        check(row)


# Chosen ---------------------------------------------------------------------------------------------------------------


def uses(tree: jaxq.Quantized, **options: object) -> bool:
    return uses_kernel(tree, kernel="jaxq_hopper_many", **({"x": ROWS} | options))


@pytest.mark.parametrize("weights", [*FORMATS.values(), *EIGHT.values()], ids=[*FORMATS, *EIGHT])
def test_a_hopper_runs_it_for_weights_alone(weights, monkeypatch):
    tree = quantized(weights)
    assert uses(tree) and not uses(tree, products="xla") and not uses(tree, kind="NVIDIA A100-SXM4-80GB")
    assert uses(tree, x=X), "few rows with a small weight"
    monkeypatch.setattr(gpu, "SMALL", 0)
    assert not uses(tree, x=X)


@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_hopper_runs_it_for_quantized_activations(activations):
    assert uses(quantized(Int(4, symmetric=False), activations)) and uses(quantized(Int(8), activations))


def test_products_without_it():
    assert not uses(quantized(w=jnp.ones((512, 200), jnp.bfloat16))) and not uses(quantized(Int(6)))
    assert not uses(quantized(jaxq.per_group(Int(4), 128)), x=X), "few rows with groups have the other kernel"
    floats = quantized(jaxq.per_group(Int(4), 128), w=W.astype(jnp.float32))
    assert not uses(floats, x=GROUPED.astype(jnp.float32)), "scaled weights would be rounded"
    assert not uses(quantized(Float(4, 3, reserved=1), Int(8))), "neither int8 nor bfloat16 holds both"


@pytest.mark.parametrize(("weights", "activations"), PAIRS.values(), ids=map("-".join, PAIRS))
def test_what_the_kernel_is_given_means_the_product(weights, activations, monkeypatch):
    """Scales, units and zero points. On a Hopper the kernel itself, elsewhere its meaning in its place."""
    tree = quantized(weights, activations)
    leaf, (quant,) = jaxq.pack(tree).params["w"], tree.inputs.values() or (None,)
    x = read_input(quant, ROWS, (1,))
    assert gpu.has_kernel(x, leaf.split, 256, 1, leaf.sums)
    if not gpu.target():
        monkeypatch.setattr(many, "hopper_many", many.plain_hopper_many)
    found = gpu.packed_product(x, leaf.planes[0], leaf.grid, leaf.split, leaf.sums, dtype=jnp.float32)
    a = np.asarray(x.centered, np.float64) * (1 if x.scale is None else np.asarray(x.scale))
    wanted = a @ np.asarray(replace(leaf, dtype=jnp.float32).dequantize(), float)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


BYTES = {"mxfp4": jaxq.mxfp4(), "nvfp4": jaxq.nvfp4(), "mxfp8": jaxq.mxfp8()}
GROUPS = BYTES | {
    f"{name}_g{size}": jaxq.per_group(f, size) for name, f in (FORMATS | EIGHT).items() for size in (32, 128)
}

# With each activation by default, for each way that scales and integers are given; the others with bfloat16 alone.
WITH_ALL = (*BYTES, "uint4_g128", "int8_g32")
GROUPED_PAIRS = [
    pytest.param(name, x, id=f"{name}-{kind}", marks=[] if x is None or name in WITH_ALL else pytest.mark.slow)
    for name in GROUPS
    for kind, x in ({"bfloat16": None} | ACTIVATIONS).items()
]


@pytest.mark.parametrize(("name", "activations"), GROUPED_PAIRS)
def test_what_the_kernel_is_given_of_groups_means_the_product(name, activations, monkeypatch):
    """With the weights as bfloat16 has them, or nearly always where their scales are not bytes: the sum of two factors
    is not quite such a scale. NVFP4's take the tensor's scale after the sum, and are not rounded."""
    tree, given = quantized(GROUPS[name], activations), []
    leaf, (quant,) = jaxq.pack(tree).params["w"], tree.inputs.values() or (None,)
    x, groups = read_input(quant, GROUPED, (1,)), leaf.stored.scale.shape[0]
    assert gpu.has_kernel(x, leaf.split, 256, groups, None, jnp.bfloat16)
    assert not gpu.has_kernel(x, leaf.split, 256, groups, None, jnp.float32)

    def noted(x: jax.Array, w: jax.Array, scale: jax.Array, *rest: Any, **named: Any) -> jax.Array:
        given.append(scale.dtype)
        return (multiply if gpu.target() else many.plain_hopper_many)(x, w, scale, *rest, **named)

    multiply = many.hopper_many
    monkeypatch.setattr(many, "hopper_many", noted)
    run = partial(gpu.packed_product, seen=jnp.bfloat16, dtype=jnp.float32)
    found = run(x, leaf.planes[0], leaf.stored, leaf.split, None)
    a = np.asarray(x.centered, np.float64) * (1 if x.scale is None else np.asarray(x.scale))
    w = replace(leaf, dtype=jnp.float32).dequantize()
    wanted = a @ np.asarray(w if name == "nvfp4" else w.astype(jnp.bfloat16), float)
    assert given == [jnp.uint8 if name in BYTES else jnp.float32]
    off = 1e-5 if name in BYTES else 2e-4
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=off * np.abs(wanted).max())


@pytest.mark.parametrize("weights", [jaxq.per_group(Int(4), 128), jaxq.per_group(Int(8), 32), jaxq.nvfp4()])
def test_a_hopper_runs_it_for_groups(weights):
    tree = quantized(weights)
    assert uses(tree, x=GROUPED) and not uses(tree, x=GROUPED, products="xla")
    assert uses(quantized(weights, jaxq.per_token(Int(8))), x=GROUPED)
