"""`pack`: what it stores, and that a packed model computes what the quantized one does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import jaxq
from jaxq import storage
from jaxq.qtensor import Packed, QTensor, is_qtensor
from tests.test_execute import MLP, X, mlp
from tests.test_zoo import NAMES, calibrated, distance, specimen
from tests.tiny import BERT, BLOOM, LLAMA, OPT, tiny_model
from tests.zoo.specimen import normal, weight

PRODUCTS = ("int8", "float")
slow = pytest.mark.slow


def named(numbers: Any) -> str:
    """For a test's name: a quantizer's own string has addresses in it, which differ between processes."""
    return f"{numbers.format}, {numbers.granularity}" if isinstance(numbers, jaxq.Quantizer) else str(numbers)


def leaves(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor) if is_qtensor(leaf)]


def same_tree(a: Any, b: Any) -> bool:
    def same(x: Any, y: Any) -> bool:
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            return same(jax.random.key_data(x), jax.random.key_data(y))
        return jnp.result_type(x) == jnp.result_type(y) and np.array_equal(x, y)

    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(same, a, b)))


def no_table(p, x):
    return x @ p["w"]


FORMATS = [
    *(jaxq.Int(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)),
    *(
        jaxq.Float(*split)
        for split in [(2, 1), (1, 2), (3, 0), (3, 2), (2, 3), (4, 3), (4, 3, 1), (5, 2, 4), (3, 4), (1, 1)]
    ),
    jaxq.AnyFloat(4),
    jaxq.AnyFloat(8),
]
# Stored in planes as another format of as many bits, which stays.
ALIKE = {
    *(jaxq.Int(bits, symmetric) for bits, symmetric in ((3, False), (5, True), (6, True), (7, False))),
    *(jaxq.Float(*split) for split in [(1, 2), (3, 0), (2, 3), (4, 3), (3, 4), (5, 2, 4)]),
}
ACTIVATIONS = [
    None,
    jaxq.Int(8),
    jaxq.Int(8, symmetric=False),
    jaxq.Int(4, symmetric=False),
    jaxq.Float(2, 1),
    jaxq.Float(4, 3),
    jaxq.per_token(jaxq.Int(8)),
    jaxq.per_token(jaxq.Int(6, symmetric=False)),
    jaxq.per_group(jaxq.Int(8), 8),
    jaxq.mxfp8(),
]


def check_law(recipe, products=PRODUCTS, shape=(32, 6), atol=2e-6):
    """One product: packed equals simulated to rounding. Neither operand has its zero in the middle."""
    x, w = normal(0, 3, 5, shape[0]) + 0.3, weight(1, *shape) + 0.3
    q = jaxq.calibrate(no_table, {"w": w}, [x], recipe)
    packed = jaxq.pack(q)
    assert same_tree(jaxq.unpack(packed), q)
    want = jax.jit(jaxq.execute(no_table))(q, x)
    for how in products:
        got = jax.jit(jaxq.execute(no_table, how))(packed, x)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=atol * np.abs(want).max(), err_msg=how)


@pytest.mark.parametrize("fmt", [pytest.param(f, marks=slow) if f in ALIKE else f for f in FORMATS], ids=named)
def test_every_weight_format(fmt):
    check_law(jaxq.quantize(fmt, jaxq.Int(8, symmetric=False)))
    check_law(jaxq.quantize(fmt, None), products=("int8",))


@pytest.mark.parametrize("activations", [None, jaxq.Float(7, 0), jaxq.Int(8)], ids=named)
def test_formats_whose_elements_span_more_than_float32_holds_of_the_smallest(activations):
    check_law(jaxq.quantize(jaxq.Float(7, 0), activations), products=("int8",))


@pytest.mark.parametrize(
    ("fmt", "activations"),
    [
        *((jaxq.Int(4, symmetric=False), numbers) for numbers in ACTIVATIONS),
        # Beside a float's weights integers of all kinds are one kind.
        *((jaxq.Float(2, 1), ACTIVATIONS[i]) for i in (0, 2, 4, 5, 9)),
        *(pytest.param(jaxq.Float(2, 1), ACTIVATIONS[i], marks=slow) for i in (1, 3, 6, 7, 8)),
    ],
    ids=named,
)
def test_every_kind_of_activation(fmt, activations):
    check_law(jaxq.quantize(fmt, activations), products=("int8",))


@pytest.mark.parametrize(
    "weights",
    [
        jaxq.per_tensor(jaxq.Int(8, symmetric=False)),
        jaxq.per_group(jaxq.Int(4), 8),
        jaxq.per_group(jaxq.Int(4, symmetric=False), 64),
        jaxq.per_group(jaxq.Float(2, 1), 32),
        jaxq.mxfp8(),
        jaxq.mxfp6(),
        jaxq.mxfp4(),
        jaxq.nvfp4(),
    ],
    ids=named,
)
def test_every_granularity_of_weights(weights):
    check_law(jaxq.quantize(weights, jaxq.Int(8)), products=("int8",), shape=(320, 6))


@pytest.mark.parametrize(
    "fmt",
    [
        pytest.param(jaxq.AnyFloat(4), marks=slow),
        jaxq.Float(2, 1),
        pytest.param(jaxq.Float(3, 2), marks=slow),
    ],
    ids=named,
)
def test_exponents_are_folded_into_the_activation(fmt):
    x = normal(0, 3, 5, 40) * jnp.exp2(jnp.arange(40) % 7)[None, None]
    q = jaxq.calibrate(no_table, {"w": weight(1, 40, 6)}, [x], jaxq.post_shifted_fp4(fmt, fmt))
    packed = jaxq.pack(q)
    assert q.params["w"].exponents is not None and packed.params["w"].reach > 0
    want = jax.jit(jaxq.execute(no_table))(q, x)
    for how in PRODUCTS:
        got = jax.jit(jaxq.execute(no_table, how))(packed, x)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@slow
@pytest.mark.parametrize("name", [getattr(n, "values", (n,))[0] for n in NAMES])
def test_every_model_of_the_zoo(name):
    """Values on a rounding tie may fall to either side, so that outputs differ by less than they do from the float."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        s = specimen(name)
        q = calibrated(s, 8)
        packed = jaxq.pack(q)
        assert same_tree(jaxq.unpack(packed), q)
        inputs = (s.batches or (s.inputs,))[0]
        got, want = (jax.jit(jaxq.execute(s.forward))(tree, *inputs) for tree in (packed, q))
        decoded = jax.jit(jaxq.execute(s.forward, "decoded"))(packed, *inputs)
        exact = s.forward(s.params, *inputs)
        bfloat16 = "bf16" in str(jax.make_jaxpr(s.forward)(s.params, *inputs))  # in which the simulation is rounded
    assert len(leaves(packed)) and all(isinstance(leaf, Packed) for leaf in leaves(packed))
    assert distance(decoded, want) < 1e-5
    assert distance(got, want) <= 0.5 * distance(want, exact) + (2**-7 if bfloat16 else 1e-5)


@slow
@pytest.mark.parametrize("config", [OPT, LLAMA, BERT, BLOOM], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("recipe", ["w4", "w8a8", "w4a8", "llm_fp4"])
def test_every_family(config, recipe):
    """With weights alone quantized outputs are equal to rounding. Where activations are, a rounding error moves one of
    them across a tie here and there, and with it what comes after; decoded, nothing moves."""
    model = tiny_model(config)
    int8 = jaxq.Int(8, symmetric=False)
    step = {
        "w4": jaxq.quantize(jaxq.Int(4, symmetric=False), None),
        "w8a8": jaxq.chain(jaxq.os_plus(), jaxq.quantize(jaxq.Int(8), int8, embeddings=jaxq.Int(8))),
        "w4a8": jaxq.quantize(jaxq.per_group(jaxq.Int(4), 8), jaxq.per_token(int8), attention=int8),
        "llm_fp4": jaxq.post_shifted_fp4(embeddings=4),
    }[recipe]
    tokens = np.random.default_rng(0).integers(0, 1024, (2, 12))
    q = jaxq.calibrate(model.forward, model.params, [tokens], step)
    packed = jaxq.pack(q)
    run = jax.jit(jaxq.execute(model.forward))
    exact, want, got = model.forward(model.params, tokens), run(q, tokens), run(packed, tokens)
    decoded = jax.jit(jaxq.execute(model.forward, "decoded"))(packed, tokens)
    assert distance(decoded, want) < 1e-5
    assert distance(got, want) < (1e-5 if recipe == "w4" else 0.8 * distance(want, exact))


# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt,table", [((2, 1), [0, 1, 2, 3, 4, 6, 8, 12]), ((1, 2), [0, 1, 2, 3, 4, 5, 6, 7])])
@pytest.mark.parametrize("products", PRODUCTS)
def test_w4a4_is_an_exact_sum_of_integers(fmt, table, products):
    """Against numpy's int64: unit scales, so that the outputs are the sums themselves. K * 1152 < 2**24."""
    fmt, random = jaxq.Float(*fmt), np.random.default_rng(0)
    unit = 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    reach = 3 if fmt == jaxq.Float(2, 1) else 1
    codes, x_codes = random.integers(0, 16, (4096, 5)), random.integers(0, 16, (3, 4096))
    exponents = random.integers(-reach, 1, 4096)
    values = np.array(table + [-v for v in table])
    ones = jnp.ones((1, 1))
    q = QTensor(
        jnp.asarray(codes, jnp.uint8), jaxq.qtensor.Grid(ones), fmt, exponents=jnp.asarray(exponents[:, None], jnp.int8)
    )
    grid = jaxq.qtensor.Grid(ones)
    tree = jaxq.Quantized({"w": q}, {"w": jaxq.InputQuant(grid=grid, format=fmt, sites=("w",))})
    x = jnp.asarray(values[x_codes] * unit, jnp.float32)
    want = (values[x_codes] * 2 ** (exponents[None] + reach)) @ values[codes]
    got = jax.jit(jaxq.execute(no_table, products))(jaxq.pack(tree), x)
    np.testing.assert_array_equal(np.asarray(got, np.float64), want * unit * unit / 2**reach)


def test_the_numbers_that_are_multiplied(quantized):
    packed = jaxq.pack(quantized)

    def types(how, platform):
        lowered = jax.jit(jaxq.execute(mlp, how)).trace(packed, X[0]).lower(lowering_platforms=(platform,))
        return [
            line.rsplit("tensor<", 1)[1].split(">")[0]
            for line in lowered.as_text().splitlines()
            if "dot_general" in line
        ]

    for platform in ("cpu", "tpu"):
        assert [t[-3:] for t in types("int8", platform)] == ["i32", "i32"]
    assert all(t.endswith("f32") for t in types("float", "tpu"))
    with pytest.raises(ValueError, match="products is 'int4'; possible are int8, xla, float"):
        jaxq.execute(mlp, "int4")  # pyright: ignore


@pytest.fixture(scope="module")
def quantized():
    return jaxq.calibrate(mlp, MLP, [X], jaxq.quantize(jaxq.Int(8), jaxq.Int(8, symmetric=False)))


@pytest.mark.parametrize("products", PRODUCTS)
def test_gradients_of_inputs_are_the_simulations(quantized, products):
    def loss(run, tree):
        return jax.grad(lambda x: jnp.sin(run(tree, x)).sum())(X)

    want = loss(jaxq.execute(mlp), quantized)
    got = loss(jax.jit(jaxq.execute(mlp, products)), jaxq.pack(quantized))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want).max() > 0


def test_vmap_and_eager(quantized):
    run, packed = jaxq.execute(mlp), jaxq.pack(quantized)
    many = normal(5, 4, 3, 5, 16)
    want = jax.vmap(run, in_axes=(None, 0))(quantized, many)
    for how in PRODUCTS:
        got = jax.vmap(jaxq.execute(mlp, how), in_axes=(None, 0))(packed, many)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(packed, X), run(quantized, X), rtol=1e-5, atol=1e-5)


@slow
def test_a_transposed_weight_and_several_readers():
    """Tied: one leaf, looked up by rows, multiplied by its transpose and as it is; heads split by a reshape."""

    def f(p, tokens):
        x = p["table"][tokens]
        y = jnp.einsum("btd,hdk->bthk", x, p["heads"])
        y = jnp.einsum("bthk,hkd->btd", y, p["out"])
        return y @ p["table"].T, jnp.einsum("vd,btd->vbt", p["table"], y)

    params = {"table": weight(0, 50, 16), "heads": weight(1, 2, 16, 8), "out": weight(2, 2, 8, 16)}
    tokens = jnp.arange(12).reshape(2, 6)
    for fmt in (jaxq.Int(8, symmetric=False), jaxq.Float(2, 1)):
        q = jaxq.calibrate(f, params, [tokens], jaxq.quantize(fmt, jaxq.Int(8, symmetric=False), embeddings=fmt))
        packed = jaxq.pack(q)
        assert packed.params["table"].planes[0].shape == (16 if fmt.bits == 8 else 8, 50)
        got, want = (jax.jit(jaxq.execute(f))(tree, tokens) for tree in (packed, q))
        assert distance(got, want) < 1e-2 * distance(want, f(params, tokens)) + 1e-6


def test_sums_are_those_of_the_axes_that_a_product_sums_over():
    """And not of those that the weight is packed along, which a grid does not always tell."""
    asymmetric = jaxq.quantize(jaxq.per_tensor(jaxq.Int(8)), jaxq.per_tensor(jaxq.Int(8, symmetric=False)))

    def check(f, *operands):
        *inputs, w = (a + 1 for a in operands)
        q = jaxq.calibrate(f, {"w": w}, [tuple(inputs)], asymmetric)
        for how in PRODUCTS:
            found = (jax.jit(jaxq.execute(f, how))(tree, *inputs) for tree in (jaxq.pack(q), q))
            for got, want in zip(*map(jax.tree.leaves, found), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())

    def both(p, x, z):
        return jnp.einsum("bkc,kcn->bn", x, p["w"]), jnp.einsum("bc,kcn->bkn", z, p["w"])

    check(lambda p, x: x @ p["w"].T, normal(0, 5, 1), normal(1, 7, 1))
    check(lambda p, x: x @ p["w"], normal(0, 5, 1), normal(1, 1, 7))
    check(lambda p, x: jnp.einsum("bk,knd->bnd", x, p["w"]), normal(0, 5, 1), normal(1, 1, 7, 6))
    for columns in (1, 32):
        check(both, normal(0, 5, 4, 8), normal(1, 5, 8), normal(2, 4, 8, columns))


def test_exported_for_any_number_of_rows():
    x, w = normal(0, 3, 64), weight(1, 64, 6)
    packed = jaxq.pack(
        jaxq.calibrate(no_table, {"w": w}, [x], jaxq.quantize(jaxq.Int(4), jaxq.Int(8, symmetric=False)))
    )
    run = jax.jit(jaxq.execute(no_table))
    any_rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 64"), jnp.float32)
    exported = jax.export.export(run)(packed, any_rows)
    for rows in (1, 3):
        np.testing.assert_allclose(exported.call(packed, x[:rows]), run(packed, x[:rows]), rtol=1e-5, atol=1e-6)


BY_COLUMNS = [jaxq.Int(4), jaxq.Int(3, symmetric=False), jaxq.Int(8, symmetric=False), jaxq.AnyFloat(4), jaxq.mxfp4()]


@pytest.mark.parametrize("fmt", BY_COLUMNS, ids=named)
@pytest.mark.parametrize("activations", [None, jaxq.Int(8, symmetric=False), jaxq.Float(2, 1)], ids=named)
def test_a_weight_stored_by_columns_is_packed_along_its_rows(fmt, activations):
    def f(p, x):
        return x @ p["w"].T, jnp.einsum("nk,bk->nb", p["w"], x), jnp.einsum("hdk,bk->bhd", p["heads"], x)

    x, params = normal(0, 5, 64) + 0.3, {"w": weight(1, 6, 64) + 0.1, "heads": weight(2, 2, 3, 64)}
    q = jaxq.calibrate(f, params, [x], jaxq.quantize(fmt, activations))
    packed = jaxq.pack(q)
    assert [plane.shape[1] for plane in packed.params["w"].planes] == [6] * len(packed.params["w"].planes)
    assert same_tree(jaxq.unpack(packed), q) and packed.params["w"].shape == (6, 64)
    for how in PRODUCTS:
        for got, want in zip(jax.jit(jaxq.execute(f, how))(packed, x), jax.jit(jaxq.execute(f))(q, x)):
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("kind", "platform", "kernel"), [("TPU v6 lite", "tpu", "pallas_call"), ("NVIDIA H200", "gpu", "mgpu")]
)
@pytest.mark.parametrize("fmt", [jaxq.Int(4), jaxq.mxfp4()], ids=named)
def test_kernels_take_weights_stored_by_columns(kind, platform, kernel, fmt):
    """A table that is looked up too among them."""

    def times(p, x):
        return x @ p["w"].T

    def tied(p, tokens):
        return p["w"][tokens] @ p["w"].T

    x, w = normal(0, 4, 512).astype(jnp.bfloat16), weight(1, 256, 512).astype(jnp.bfloat16)
    device = AbstractDevice(kind, None, platform)
    for f, given in ((times, x), (tied, jnp.arange(4))):
        packed = jaxq.pack(jaxq.calibrate(f, {"w": w}, [given], jaxq.quantize(fmt, None)))
        with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)):
            found = [kernel in str(jax.make_jaxpr(jaxq.execute(f, how))(packed, given)) for how in ("int8", "xla")]
        assert found == [True, False]


def test_layers_stored_by_columns_are_scanned():
    def f(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w["square"].T) * (x @ w["vector"])[:, None], None

        return lax.scan(layer, x, p)[0]

    x, params = normal(0, 5, 16), {"square": weight(1, 8, 16, 16), "vector": weight(2, 8, 16)}
    packed = jaxq.pack(q := jaxq.calibrate(f, params, [x], jaxq.quantize(jaxq.Int(4), jaxq.Int(8))))
    assert packed.params["square"].rows_last and packed.params["square"].lead == 1
    for run in (jaxq.execute(f), jax.jit(jaxq.execute(f))):
        np.testing.assert_allclose(run(packed, x), run(q, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [jaxq.Int(8), jaxq.per_tensor(jaxq.Int(4))], ids=named)
def test_layers_of_nested_scans(weights):
    def f(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w["square"]) * (x @ w["vector"])[:, None], None

        return lax.scan(lambda x, w: (lax.scan(layer, x, w)[0], None), x, p)[0]

    x, params = normal(0, 5, 16), {"square": weight(1, 2, 3, 16, 16), "vector": weight(2, 2, 3, 16)}
    packed = jaxq.pack(q := jaxq.calibrate(f, params, [x], jaxq.quantize(weights, jaxq.Int(8))))
    assert packed.params["square"].lead == 2
    got, want = (jax.jit(jaxq.execute(f))(tree, x) for tree in (packed, q))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_token_multiplies_eight_bits_as_they_are_stored(symmetric):
    """Transposed or not, and on CPU: no copy of a weight, in 8 or in 32 bits."""

    def f(p, x):
        return x @ p["w"], x @ p["table"].T

    x, params = normal(0, 1, 512), {"w": weight(1, 512, 384), "table": weight(2, 384, 512)}
    q = jaxq.calibrate(f, params, [x], jaxq.quantize(jaxq.Int(8, symmetric), jaxq.Int(8, symmetric=False)))
    packed, run = jaxq.pack(q), jax.jit(jaxq.execute(f))
    assert same_tree(jaxq.unpack(packed), q)
    for got, want in zip(run(packed, x), run(q, x)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    assert run.lower(packed, x).compile().memory_analysis().temp_size_in_bytes < 512 * 384


@pytest.mark.parametrize("fmt", [jaxq.per_tensor(jaxq.Int(3)), jaxq.Int(4, symmetric=False), jaxq.mxfp6()], ids=named)
@pytest.mark.parametrize("mode", ["fill", "clip", pytest.param("wrap", marks=slow)])
def test_look_ups_decode_rows_alone(fmt, mode):
    def f(p, tokens):
        return jnp.take(p["table"], tokens, axis=0, mode=mode)

    tokens = jnp.array([[0, 7, 30, 500]])
    q = jaxq.calibrate(f, {"table": weight(0, 31, 64)}, [tokens], jaxq.quantize(embeddings=fmt))
    by_columns = jax.tree.map(lambda leaf: replace(leaf, looked_up=False), q, is_leaf=lambda a: isinstance(a, QTensor))
    run = jax.jit(jaxq.execute(f))
    for tree in (q, by_columns):
        packed = jaxq.pack(tree)
        np.testing.assert_array_equal(run(packed, tokens), run(q, tokens))
        if fmt in (jaxq.Int(4, symmetric=False), jaxq.mxfp6()):
            assert packed.params["table"].rows_last != tree.params["table"].looked_up


def test_stacked_layers_are_scanned_packed():
    """No decoded copy of all layers: the program's temporaries are smaller than one would be."""

    def f(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    x = normal(0, 8, 256)
    q = jaxq.calibrate(f, {"w": weight(1, 16, 256, 256)}, [x], jaxq.quantize(jaxq.Int(4), jaxq.Int(8)))
    packed, run = jaxq.pack(q), jax.jit(jaxq.execute(f))
    np.testing.assert_allclose(run(packed, x), run(q, x), atol=1e-2)
    memory = run.lower(packed, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * 256 * 256 * 4 / 2


# Trees ----------------------------------------------------------------------------------------------------------------


def test_pack_of_packed_is_the_same(quantized):
    packed = jaxq.pack(quantized)
    assert jaxq.pack(packed) is not None and same_tree(jaxq.pack(packed), packed)
    assert same_tree(jaxq.unpack(jaxq.unpack(packed)), quantized)


def test_no_tokens(quantized):
    assert jax.eval_shape(jaxq.execute(mlp), jaxq.pack(quantized), X[:0]).shape[0] == 0


def test_bytes(quantized):
    w = {"w": weight(0, 512, 256)}
    for fmt in (jaxq.Int(3), jaxq.Int(4), jaxq.Float(2, 1), jaxq.Float(3, 2), jaxq.Int(7)):
        q = jaxq.calibrate(no_table, w, [normal(0, 2, 512)], jaxq.quantize(fmt, jaxq.Int(8)))
        scale = 32 / 512
        assert jaxq.bits_per_weight(jaxq.pack(q).params) == fmt.bits + scale
        assert jaxq.bits_per_weight(q.params) == 8 + scale
    assert np.isnan(jaxq.bits_per_weight(w))


def test_saved_and_loaded(quantized, tmp_path):
    packed = jaxq.pack(quantized)
    storage.save(tmp_path / "packed", packed, {})
    loaded, _ = storage.load(tmp_path / "packed")
    assert same_tree(loaded, packed)
    assert same_tree(jaxq.unpack(loaded), quantized)


def test_exported_with_the_tree_as_argument(quantized):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers, which JAX does not install")
    packed, run = jaxq.pack(quantized), jax.jit(jaxq.execute(mlp))
    data = jax.export.export(run, platforms=("cpu", "tpu", "cuda"))(packed, X).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(packed, X), run(packed, X))


def test_damaged_leaves_are_refused(quantized):
    packed = jaxq.pack(quantized)
    leaf = packed.params["a"]["kernel"]
    with pytest.raises(ValueError, match="not those of 16 codes of 8 bits"):
        replace(leaf, planes=(leaf.planes[0][:7],)).unpack()
    kernel, run = leaf, jaxq.execute(mlp)

    def stored(**parts: Any) -> Packed:
        return replace(kernel, stored=replace(kernel.stored, **parts))

    damaged = {
        r"a/kernel: planes int8\[8, \d+\] are not": replace(kernel, planes=(kernel.planes[0][:8],)),
        r"a/kernel: planes none are not": replace(kernel, planes=()),
        r"a/kernel: planes float32": replace(kernel, planes=(kernel.planes[0].astype(jnp.float32),)),
        r"a/kernel: .* without its scale": stored(scale=None),
        r"a/kernel: .* or one too many": stored(zero=jnp.zeros((1, 1), jnp.uint8)),
        r"a/kernel: numbers \[1, 5\] do not divide": stored(scale=jnp.ones((1, 5))),
        r"a/kernel: its scale \(real scales\) is uint8, not float32": stored(scale=jnp.ones((1, 1), jnp.uint8)),
    }
    for message, wrong in damaged.items():
        params = {**packed.params, "a": {**packed.params["a"], "kernel": wrong}}
        with pytest.raises(ValueError, match=message):
            run(replace(packed, params=params), X)
    with pytest.raises(TypeError, match="call it outside"):
        jax.jit(jaxq.pack)(quantized)
