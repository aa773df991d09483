import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from jaxq.formats import Int
from jaxq.pack import pack
from jaxq.qtensor import Grid, InputQuant, PerGroup, PerTensor, PerToken, QTensor, Quantized, quantize_array
from jaxq.storage import load, save


def model() -> Quantized:
    """One of everything that a quantized model may hold."""
    w = jax.random.normal(jax.random.key(0), (8, 4))
    symmetric = quantize_array(w, Int(8), Grid(jnp.full((1, 4), 0.02)))
    grouped = quantize_array(
        w.astype(jnp.bfloat16), Int(4, symmetric=False), Grid(jnp.ones((2, 4)), jnp.full((2, 4), 7.0))
    )
    params = {
        "layers": {0: {"q": {"kernel": symmetric}}, 1: {"q": {"kernel": grouped}}, 10: {}},
        "listed": [jnp.arange(3), (np.float16(2.5), None), ()],
        "odd types": {name: jnp.arange(6).astype(name) for name in ("bool", "uint4", "int4", "float8_e4m3fn", "int16")},
        "a/b": jnp.float32(1),
        "a": {"b": jnp.float32(2), "": jnp.float32(3)},
        "empty": jnp.zeros((0, 3), jnp.int8),
        "special": jnp.array([jnp.nan, jnp.inf, -0.0]),
        "wide": np.array([1e300, 2**-1000]),
    }
    inputs = {
        "layers/0/q": InputQuant(grid=Grid(jnp.full((1, 1, 1), 0.1)), format=Int(8), sites=("layers/0/q/kernel",)),
        "layers/1/q": InputQuant(
            shift=jnp.ones(8),
            scale=jnp.full(8, 2.0),
            bias={"layers/1/q/kernel": jnp.zeros(4)},
            format=Int(4, symmetric=False),
            granularity=PerToken(),
            sites=("layers/1/q/kernel", "layers/1/k/kernel"),
        ),
        "layers/1/up": InputQuant(format=Int(6), granularity=PerGroup(4)),
        "plain": InputQuant(),
    }
    return Quantized(params, inputs)


def assert_same(a: Any, b: Any) -> None:
    """Equal containers, static fields, types and bits (NaN and -0.0 included)."""
    leaves_a, structure_a = jax.tree.flatten(a)
    leaves_b, structure_b = jax.tree.flatten(b)
    assert structure_a == structure_b
    for x, y in zip(leaves_a, leaves_b):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip_is_bit_exact(tmp_path):
    about = {"recipe": {"name": "a test"}, "perplexity": np.float32(2.5), "steps": (1, 2), "note": None, "ok": True}
    save(tmp_path / "deep" / "model", model(), about)
    loaded, read = load(str(tmp_path / "deep" / "model"))
    assert_same(loaded, model())
    assert read == {"recipe": {"name": "a test"}, "perplexity": 2.5, "steps": [1, 2], "note": None, "ok": True}
    assert list(loaded.params["layers"]) == [0, 1, 10]
    kernel = loaded.params["layers"][1]["q"]["kernel"]
    assert isinstance(kernel, QTensor) and isinstance(kernel.codes, jax.Array) and kernel.dtype == jnp.bfloat16
    assert isinstance(loaded.params["wide"], np.ndarray), "float64 would lose its bits as a JAX array"
    assert loaded.inputs["layers/1/q"].granularity == PerToken() and loaded.inputs["plain"].granularity == PerTensor()
    np.testing.assert_array_equal(kernel.dequantize(), model().params["layers"][1]["q"]["kernel"].dequantize())


def test_structure_is_readable(tmp_path):
    save(tmp_path / "model", model(), {"recipe": "os_plus-w8a8"})
    document = json.loads((tmp_path / "model" / "jaxq.json").read_text())
    assert document["version"] == 3 and document["about"] == {"recipe": "os_plus-w8a8"}
    kernel = document["tree"]["Quantized"]["params"]["dict"]["layers"]["dict by int"]["0"]["dict"]["q"]["dict"][
        "kernel"
    ]
    assert kernel["QTensor"]["format"] == {"Int": {"bits": 8, "symmetric": True}}
    assert kernel["QTensor"]["codes"]["array"][1:3] == ["int8", [8, 4]]


def test_version_2_is_read(tmp_path):
    """Which did not say in which order codes lie, as there was one."""
    saved = Quantized({"w": model().params["layers"][1]["q"]["kernel"]})
    saved = Quantized({**saved.params, "packed": pack(saved).params["w"]})
    save(tmp_path / "model", saved, {})
    file = tmp_path / "model" / "jaxq.json"
    document = json.loads(file.read_text())
    for leaf in document["tree"]["Quantized"]["params"]["dict"].values():
        for name in {"looked_up", "rows_last"} & (parts := next(iter(leaf.values()))).keys():
            del parts[name]
    file.write_text(json.dumps({**document, "version": 2}))
    assert_same(load(tmp_path / "model")[0], saved)


def test_no_arrays_at_all(tmp_path):
    save(tmp_path / "model", Quantized({}), {})
    assert_same(load(tmp_path / "model")[0], Quantized({}))


def test_memory_mapped_leaves(tmp_path):
    np.save(tmp_path / "w.npy", np.arange(12, dtype=np.float32).reshape(3, 4))
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    save(tmp_path / "model", Quantized({"w": mapped.T}), {})
    np.testing.assert_array_equal(load(tmp_path / "model")[0].params["w"], mapped.T)


DTYPES = st.sampled_from(["int8", "uint8", "uint4", "float32", "bfloat16", "int32", "bool"])
ARRAYS = st.tuples(DTYPES, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 255)).map(
    lambda drawn: jnp.asarray(np.full(drawn[1], drawn[2] % 2 if drawn[0] == "bool" else drawn[2] % 15, drawn[0]))
)
TREES = st.recursive(
    st.none() | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.dictionaries(st.integers(-3, 99), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(tree=TREES)
def test_any_tree_survives(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("storage") / "model"
    save(path, Quantized(tree), {})
    assert_same(load(path)[0], Quantized(tree))


class Pair(NamedTuple):
    a: jax.Array


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"a": [Pair(jnp.ones(1))]}, r"params/a/0: .*Pair cannot be stored.*dicts with keys all str or all int"),
        ({"a": {1: None, "1": None}}, r"params/a: builtins.dict with keys \[1, '1'\] cannot be stored"),
        ({"a": {(0, 1): None}}, r"params/a: builtins.dict with keys \[\(0, 1\)\]"),
        ({"a": {True: None}}, r"params/a: builtins.dict with keys \[True\]"),
        ({"a": {1, 2}}, r"params/a: builtins.set cannot be stored"),
        ({"a": object()}, r"params/a: builtins.object cannot be stored"),
        ({"key": jax.random.key(0)}, r"params/key: .*jax.random.key_data"),
        ({"a": np.array([None])}, r"params/a: object cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, params, expected):
    with pytest.raises(ValueError, match=expected):
        save(tmp_path / "model", Quantized(params), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("about", "expected"), [({"a": [object()]}, r"about\.a\.0: .*object"), ({1: 2}, "about: ")])
def test_about_that_json_cannot_say(tmp_path, about, expected):
    with pytest.raises(ValueError, match=expected):
        save(tmp_path / "model", Quantized({}), about)
    assert not list(tmp_path.iterdir())


def test_existing_target_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="choose another path"):
        save(tmp_path / "model", model(), {})
    assert [path.name for path in tmp_path.rglob("*")] == ["model"]


@pytest.mark.parametrize("culprit", ["rename", "arrays", "interrupt"])
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, culprit):
    full = OSError(errno.ENOSPC, "No space left on device")
    error = KeyboardInterrupt() if culprit == "interrupt" else full

    def fail(path: str | Path, *_: object, **__: object) -> None:
        if culprit != "rename":  # half of the work is there already
            (Path(path) / "half").mkdir(parents=True)
        raise error

    monkeypatch.setattr(*((os, "rename") if culprit == "rename" else (ocp, "save")), fail)
    with pytest.raises(type(error)):
        save(tmp_path / "model", model(), {})
    assert not list(tmp_path.iterdir())


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no such directory"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"jaxq\.json is missing"):
        load(tmp_path)


def edit(document: dict[str, Any], where: list[str], value: Any) -> str:
    node = document
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    return json.dumps(document)


W = ["tree", "Quantized", "params", "dict", "w"]


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        (["version"], 4, r"jaxq\.json: version 4, this jaxq reads versions 1, 2, 3"),
        (["version"], [1], r"jaxq\.json: version \[1\], this jaxq reads versions 1, 2, 3"),
        (["tree"], None, "holds a NoneType where a Quantized was expected"),
        (["tree"], {"Quantised": {}}, "unknown type 'Quantised'; known are Quantized"),
        (["tree"], {"a": 1, "b": 2}, "do not make a model"),
        (["tree", "Quantized", "other"], 1, "unexpected keyword argument 'other'"),
        ([*W, "QTensor", "format", "Int", "bits"], 40, "bits is 40"),
        ([*W, "QTensor", "codes", "array", 0], "nowhere", "the array 'nowhere' is missing"),
        ([*W, "QTensor", "codes", "array", 1], "float32", r"is uint8\[8, 4\] where float32\[8, 4\] was saved"),
        ([*W, "QTensor", "codes", "array", 1], "float33", "float33"),
        ([*W, "QTensor", "codes", "array", 2], [4, 8], r"is int8\[8, 4\] where int8\[4, 8\] was saved"),
        ([*W, "QTensor", "codes", "array", 3], 1, "checksum differs"),
        ([*W, "QTensor", "codes", "array"], [], "do not make a model"),
    ],
)
def test_structure_that_does_not_fit(tmp_path, where, value, expected):
    path = tmp_path / "model"
    save(path, Quantized({"w": model().params["layers"][0]["q"]["kernel"]}), {})
    (path / "jaxq.json").write_text(edit(json.loads((path / "jaxq.json").read_text()), where, value))
    with pytest.raises(ValueError, match=f"(?s){path}.*{expected}"):
        load(path)


def test_truncated_structure(tmp_path):
    save(tmp_path / "model", model(), {})
    file = tmp_path / "model" / "jaxq.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"jaxq\.json: not valid JSON"):
        load(tmp_path / "model")
    file.write_text('{"version": 3}')
    with pytest.raises(ValueError, match="'about' and 'tree' are expected"):
        load(tmp_path / "model")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_damaged_arrays(tmp_path, damage):
    path = tmp_path / "model"
    save(path, Quantized({"w": jax.random.normal(jax.random.key(0), (64, 64))}), {})
    file = largest_file(path / "arrays")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{path}.*(damaged|missing)"):
        load(path)


def test_arrays_folder_missing(tmp_path):
    save(tmp_path / "model", Quantized({"w": jnp.ones(3)}), {})
    (tmp_path / "model" / "arrays").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"the array '0\.params\.w' is missing"):
        load(tmp_path / "model")


ELSEWHERE = """
import sys
import jax, numpy as np
from jaxq import storage

quantized, about = storage.load("model")
assert len(jax.devices()) == 4 and about == {"name": "a test"}
assert not [name for name in sys.modules if name.startswith(("jaxq.models", "flax", "transformers"))]
leaves = {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(quantized)}
np.savez("found.npz", **leaves)
mesh = jax.sharding.Mesh(jax.devices(), "x")
over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
kernel = quantized.params["up"]["kernel"]
apart = jax.tree.map(lambda a: jax.device_put(a, over) if a.ndim == 2 and a.shape[1] % 4 == 0 else a, kernel)
assert len(apart.dequantize().sharding.device_set) == 4
np.save("sharded.npy", apart.dequantize())
"""


@pytest.mark.parametrize(
    "packed", (pytest.param(False, marks=pytest.mark.slow), True), ids=("codes", "packed")
)  # of a process each
def test_restored_elsewhere(tmp_path, packed):
    """In another process with four devices, without a template, the model's code or Flax; there it can be sharded."""
    w = jax.random.normal(jax.random.key(0), (16, 8))
    leaf = quantize_array(w, Int(4, symmetric=False), Grid(jnp.full((2, 8), 0.4), jnp.full((2, 8), 7.0)))
    one = Quantized({"up": {"kernel": leaf, "bias": jnp.arange(8.0)}}, model().inputs)
    one = pack(one) if packed else one
    save(tmp_path / "model", one, {"name": "a test"})
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=env, check=True)
    found = np.load(tmp_path / "found.npz")
    want = jax.tree_util.tree_leaves_with_path(one)
    assert set(found.files) == {jax.tree_util.keystr(keys) for keys, _ in want}
    for keys, array in want:
        np.testing.assert_array_equal(found[jax.tree_util.keystr(keys)], array, strict=True)
    np.testing.assert_array_equal(np.load(tmp_path / "sharded.npy"), leaf.dequantize())


def test_only_a_quantized_tree_is_saved(tmp_path):
    with pytest.raises(TypeError, match="what `calibrate` or `pack` returns, not builtins.dict"):
        save(tmp_path / "model", {"w": jnp.ones(3)}, {})
    assert not list(tmp_path.iterdir())
