"""Products with packed codes: the kernel in interpret mode, its plain meaning, and integers in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq.kernels.packed_matmul as module
from jaxq.formats import Float, Int, decode
from jaxq.kernels import tiles
from jaxq.kernels.carrier import Carrier, float_carrier, int8_carrier, number_carrier
from jaxq.kernels.layout import pack_codes
from jaxq.kernels.packed_matmul import Operands, packed_matmul, plain_packed_matmul
from jaxq.kernels.tpu import E4M3, elements_dtype, weight_carrier

slow = pytest.mark.slow
FLOATS = (Float(2, 1), Float(1, 2), Float(3, 0))
INTS = (Int(4), Int(4, symmetric=False))
FIRST = INTS[0], FLOATS[0]
PAIRS = [  # a format, the activation's dtype, the carrier
    *((fmt, jnp.int8, int8_carrier(fmt)) for fmt in INTS),
    *((fmt, jnp.bfloat16, float_carrier(fmt, e4m3)) for fmt in INTS for e4m3 in sorted(set(E4M3.values()), key=str)),
    *((fmt, jnp.bfloat16, float_carrier(fmt, jnp.float8_e5m2)) for fmt in FLOATS),
    *((fmt, jnp.float8_e4m3fn, float_carrier(fmt, jnp.float8_e4m3fn)) for fmt in FLOATS),
]
IDS = [f"{fmt}-{np.dtype(dtype).name}-{np.dtype(c.dtype).name}".replace(" ", "") for fmt, dtype, c in PAIRS]


plainly = jax.jit(plain_packed_matmul, static_argnums=1)


def values(fmt: Int | Float, codes: np.ndarray) -> np.ndarray:
    """What 4-bit codes stand for at scale 1, float64."""
    if isinstance(fmt, Int):
        return ((codes.astype(int) ^ 8) - 8 if fmt.symmetric else codes).astype(float)
    return np.asarray(decode(fmt, jnp.asarray(codes), jnp.ones((1, 1))), float)


def drawn(k: int, n: int, m: int, dtype: type, seed: int = 0) -> tuple[np.ndarray, jnp.ndarray, np.ndarray]:
    """Codes [K, N], packed, and an activation [M, K] of E2M1's elements in units of the smallest, times up to 8."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 16, (k, n)).astype(np.uint8)
    elements = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96])
    x = draw.choice(elements, (m, k)) * draw.choice([-1, 1], (m, k))
    return codes, pack_codes(jnp.asarray(codes), 4)[0], jnp.asarray(x, jnp.float32).astype(dtype)


@pytest.mark.parametrize(("fmt", "dtype", "carrier"), PAIRS, ids=IDS)
def test_a_carrier_holds_each_of_the_16_codes_exactly(fmt, dtype, carrier: Carrier):
    codes = np.arange(16, dtype=np.uint8)[:, None]
    held = np.asarray(carrier.of_codes(jnp.asarray(codes)).astype(jnp.float32), float) / carrier.unit
    assert np.array_equal(held, values(fmt, codes) + carrier.offset)


ONE_ROW, GROUPS, SMALL_GROUPS = (1, 256, 128, 1), (17, 768, 130, 6), (5, 768, 130, 24)
# Every format with one shape; with the others one of the integers, and one of the floats.
PRODUCTS = [
    pytest.param(
        *pair,
        *shape,
        id=f"{name}-{'-'.join(map(str, shape))}",
        marks=() if shape == GROUPS or pair[0] in FIRST else slow,
    )
    for pair, name in zip(PAIRS, IDS)
    for shape in (ONE_ROW, GROUPS, SMALL_GROUPS)
]


@pytest.mark.parametrize(("fmt", "dtype", "carrier", "m", "k", "n", "groups"), PRODUCTS)
def test_products_are_the_integers_that_numpy_finds(fmt, dtype, carrier: Carrier, m, k, n, groups):
    codes, packed, x = drawn(k, n, m, dtype)
    scale = 2.0 ** np.random.default_rng(1).integers(-3, 1, (groups, n))
    operands = Operands(x, packed, jnp.asarray(scale, jnp.float32))
    found = packed_matmul(operands, carrier, interpret=True)
    runs = np.asarray(x.astype(jnp.float32), float).reshape(m, groups, -1)
    weights = (values(fmt, codes) + carrier.offset).reshape(groups, -1, n)
    exact = np.einsum("mgk,gkn,gn->mn", runs, weights, scale)
    assert np.array_equal(np.asarray(found), exact)
    assert np.array_equal(np.asarray(plainly(operands, carrier)), exact)


NUMBERS = [  # the weights' numbers of 8 bits, the activation's dtype
    *((jnp.int8, dtype) for dtype in (jnp.int8, jnp.bfloat16)),
    *((numbers, jnp.bfloat16) for numbers in (jnp.float8_e4m3fn, jnp.float8_e5m2)),
    (jnp.float8_e4m3fn, jnp.float8_e4m3fn),
]


@pytest.mark.parametrize(
    ("numbers", "dtype", "e4m3"),
    [
        # The machine's own e4m3 makes a difference to e4m3 alone.
        pytest.param(numbers, dtype, e4m3, marks=slow if i and numbers != jnp.float8_e4m3fn else ())
        for numbers, dtype in NUMBERS
        for i, e4m3 in enumerate(sorted(set(E4M3.values()), key=str))
    ],
)
@pytest.mark.parametrize(
    ("m", "k", "n", "groups"),
    [
        (17, 768, 130, 6),
        (9, 768, 130, 24),
        *(pytest.param(*shape, marks=slow) for shape in ((1, 256, 128, 1), (1, 512, 129, 8), (3, 256, 128, 16))),
    ],
)
def test_products_with_numbers_of_8_bits(numbers, dtype, e4m3, m, k, n, groups):
    """All 256 of them, negative zeros too, and each exactly: sums are of few of them."""
    draw = np.random.default_rng(0)
    codes = jnp.asarray(np.resize(draw.permutation(256).astype(np.uint8), (k, n)))
    codes = jnp.where(jnp.isfinite(jax.lax.bitcast_convert_type(codes, numbers).astype(jnp.float32)), codes, 0)
    w = jax.lax.bitcast_convert_type(codes, numbers)
    x = jnp.zeros((m, k)).at[jnp.arange(m), draw.integers(0, k, m)].set(3).astype(dtype)
    scale = 2.0 ** draw.integers(-3, 1, (groups, n))
    exact = np.asarray(x.astype(jnp.float32), float) @ (
        np.asarray(w.astype(jnp.float32), float) * np.repeat(scale, k // groups, 0)
    )
    operands, carrier = (
        Operands(x, w if numbers == jnp.int8 else codes, jnp.asarray(scale, jnp.float32)),
        number_carrier(numbers, dtype, e4m3),
    )
    assert np.array_equal(np.asarray(packed_matmul(operands, carrier, interpret=True)), exact)
    assert np.array_equal(np.asarray(plainly(operands, carrier)), exact)


@pytest.mark.parametrize(
    ("dtype", "size", "m"),
    [
        *((jnp.int8, *of) for of in ((64, 1), (32, 9))),
        (jnp.bfloat16, 16, 3),
        *(pytest.param(*of, marks=slow) for of in ((jnp.int8, 16, 3), (jnp.bfloat16, 64, 1), (jnp.bfloat16, 32, 9))),
    ],
)
def test_all_sizes_of_small_groups(dtype, size, m):
    k, n = 512, 129
    fmt, carrier = (
        (Int(4), int8_carrier(Int(4)))
        if dtype == jnp.int8
        else (Float(2, 1), float_carrier(Float(2, 1), jnp.float8_e5m2))
    )
    codes, packed, x = drawn(k, n, m, dtype)
    scale = 2.0 ** np.random.default_rng(size).integers(-3, 1, (k // size, n))
    found = packed_matmul(Operands(x, packed, jnp.asarray(scale, jnp.float32)), carrier, interpret=True)
    weights = values(fmt, codes) * np.repeat(scale, size, 0)
    assert np.array_equal(np.asarray(found), np.asarray(x.astype(jnp.float32), float) @ weights)


@pytest.mark.parametrize("groups", [1, pytest.param(4, marks=slow), 16])
def test_zero_points_of_both_sides_and_row_scales(groups):
    m, k, n = 3, 512, 200
    codes, packed, x = drawn(k, n, m, jnp.int8)
    draw = np.random.default_rng(2)
    carrier = int8_carrier(Int(4, symmetric=False))
    runs, weights = np.asarray(x, int).reshape(m, groups, -1), codes.astype(int).reshape(groups, -1, n)
    zero_x, zero_w = draw.integers(-128, 128, (m, groups)), draw.integers(0, 16, (groups, n))
    carried, carried_zero = weights + carrier.offset, zero_w + carrier.offset
    left = np.stack([zero_x, (runs - zero_x[:, :, None]).sum(2)])  # the activation's zero point, and its row sums
    right = np.stack([carried.sum(1), carried_zero])  # the weight's column sums, and its zero point
    rows, scale = draw.random((m, 1)), draw.random((groups, n))
    floats = {name: jnp.asarray(a, jnp.float32) for name, a in (("scale", scale), ("rows", rows))}
    ints = {name: jnp.asarray(a, jnp.int32) for name, a in (("left", left), ("right", right))}
    exact = np.einsum("mgk,gkn,gn->mn", runs - zero_x[:, :, None], weights - zero_w[:, None], scale) * rows
    for found in (
        packed_matmul(Operands(x, packed, **floats, **ints), carrier, interpret=True),
        plainly(Operands(x, packed, **floats, **ints), carrier),
    ):
        np.testing.assert_allclose(np.asarray(found), exact, rtol=2e-5, atol=1e-2)


@pytest.mark.parametrize("k", [130, 384])
def test_where_blocks_are_not_whole_the_plain_meaning_serves(k):
    codes, packed, x = drawn(k, 10, 3, jnp.int8)
    operands = Operands(x, packed, jnp.ones((1, 10)))
    exact = np.asarray(x, int) @ values(Int(4), codes)
    assert np.array_equal(np.asarray(plainly(operands, int8_carrier(Int(4)))), exact)
    with pytest.raises(ValueError, match="plain_packed_matmul takes any"):
        packed_matmul(operands, int8_carrier(Int(4)), interpret=True)


def test_several_blocks_with_ragged_ends(monkeypatch):
    monkeypatch.setattr(module, "X_BYTES", 1 << 15)
    monkeypatch.setattr(tiles, "W_BYTES", 1 << 15)
    m, k, n = 70, 512, 300
    assert tiles.whole_depth(m, k, n, module.X_BYTES // 2) == (32, k, 256)  # so that neither divides
    codes, packed, x = drawn(k, n, m, jnp.bfloat16)
    carrier = float_carrier(Float(2, 1), jnp.float8_e5m2)
    found = packed_matmul(Operands(x, packed, jnp.ones((1, n))), carrier, interpret=True)
    assert np.array_equal(np.asarray(found), np.asarray(x.astype(jnp.float32), float) @ values(Float(2, 1), codes))


@pytest.mark.parametrize("device", ["TPU v6 lite", pytest.param("TPU7x", marks=slow)])
def test_llm_fp4_at_its_largest_is_exact_in_float32(device):
    """Every product at its largest, 96 * 12 in units of the smallest, for the longest sum that must fit."""
    k = 14336  # whole blocks below 2**24 / 1152
    x = jnp.full((1, k), 96, elements_dtype(device))
    packed = pack_codes(jnp.full((k, 2), 7, jnp.uint8), 4)[0]
    carrier = weight_carrier(Float(2, 1), x.dtype, device)
    found = packed_matmul(Operands(x, packed, jnp.full((1, 2), 2.0)), carrier, interpret=True)
    assert np.array_equal(np.asarray(found), np.full((1, 2), 96 * 12 * k))


def test_misfits_name_what_was_found():
    packed, scale = jnp.zeros((128, 8), jnp.uint8), jnp.ones((1, 8))
    with pytest.raises(ValueError, match=r"x \(2, 512\), packed weights \(128, 8\)"):
        packed_matmul(Operands(jnp.zeros((2, 512), jnp.int8), packed, scale), int8_carrier(Int(4)))
    with pytest.raises(ValueError, match="no carrier in float8_e5m2"):
        float_carrier(Int(4), jnp.float8_e5m2)
    with pytest.raises(ValueError, match="no kernels for 'TPU v3'"):
        weight_carrier(Int(4), jnp.bfloat16, "TPU v3")
