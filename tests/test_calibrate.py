"""`calibrate`: one walk over real batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq.calibration import walk
from jaxq.formats import fake_quant, grid_from_range
from jaxq.steps import Group
from tests.zoo.specimen import block, block_params, linear, linear_params, norm, norm_params, normal, tokens, weight

ALL = jaxq.quantize(attention=jaxq.Int(8))


def model(p, t):
    x = p["embed"][t]
    for layer in p["layers"]:
        x = block(layer, x)
    return norm(x, p["ln"]) @ p["head"]


def params_of(layers: int, width: int = 16) -> dict[str, Any]:
    return {
        "embed": normal(0, 40, width),
        "layers": [block_params(20 * i, width) for i in range(layers)],
        "ln": norm_params(1, width),
        "head": weight(2, width, 40),
    }


def same(a: Any, b: Any, **tolerance: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.slow
def test_microbatches_are_one_big_batch():
    params, t = params_of(2), tokens(3, 6, 7)
    recipe = jaxq.chain(jaxq.smooth_quant(), ALL)
    small = jaxq.calibrate(model, params, [t[:2], t[2:4], t[4:]], recipe)
    same(small, jaxq.calibrate(model, params, [t], recipe), rtol=1e-4, atol=1.01)  # a code may lie on a tie
    same(small.inputs, jaxq.calibrate(model, params, [t], recipe).inputs, rtol=1e-3)


def test_propagation_is_what_it_says():
    """The second layer's range is that of the quantized, or of the original, first layer's output."""

    def f(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    params, x = {"a": weight(0, 16, 16), "b": weight(1, 16, 8)}, normal(2, 4, 16)
    fmt = jaxq.Int(3)
    for propagate in ("quantized", "full_precision"):
        q = jaxq.calibrate(f, params, [x], jaxq.quantize(fmt, fmt), propagate=propagate)
        h = jnp.tanh(x @ params["a"])
        if propagate == "quantized":
            grid = q.inputs["a"].grid
            h = jnp.tanh(fake_quant(fmt, x, grid.scale, grid.zero) @ q.params["a"].dequantize())
        np.testing.assert_allclose(q.inputs["b"].grid.scale, grid_from_range(fmt, h.min(), h.max())[0], rtol=1e-6)


PAD, LENGTHS = 39, (8, 5, 6)


def padded() -> tuple[dict, list[jax.Array], jax.Array, jax.Array]:
    """Sequences of unlike length, padded with a token whose embedding is enormous."""
    params = params_of(2)
    params["embed"] = params["embed"].at[PAD].set(50 * normal(8, 16))
    samples = [tokens(10 + i, 1, n, vocabulary=PAD) for i, n in enumerate(LENGTHS)]
    batch = jnp.concatenate([jnp.pad(s, ((0, 0), (0, 8 - s.shape[1])), constant_values=PAD) for s in samples])
    return params, samples, batch, jnp.arange(8)[None] < jnp.array(LENGTHS)[:, None]


@pytest.mark.parametrize(
    "split", [pytest.param(False, marks=pytest.mark.slow), True], ids=["one batch", "microbatches"]
)
def test_padding_changes_nothing(split):
    """Ranges and scales are those of the samples without padding, attention's operands in heads layouts included."""
    params, samples, batch, mask = padded()
    recipe = jaxq.chain(jaxq.smooth_quant(), jaxq.quantize(weights=None, attention=jaxq.Int(8)))
    batches, masks = (
        ([batch], [mask]) if not split else ([batch[:1], batch[1:2], batch[2:]], [mask[:1], mask[1:2], mask[2:]])
    )
    got = jaxq.calibrate(model, params, batches, recipe, masks=masks, propagate="full_precision")
    alone = [jaxq.calibrate(model, params, [s], recipe, propagate="full_precision") for s in samples]
    assert len(got.transforms) >= 5
    for name, transform in got.transforms.items():
        want = jnp.stack([q.transforms[name].scale for q in alone]).max(0)  # monotonic in the range
        np.testing.assert_allclose(transform.scale, want, rtol=1e-4, err_msg=name)
    without = jaxq.calibrate(model, params, batches, recipe, propagate="full_precision")
    different = [n for n in got.inputs if not np.allclose(got.inputs[n].grid.scale, without.inputs[n].grid.scale)]
    assert len(different) >= 2  # the test would notice padding
    plain = jaxq.quantize(weights=None, attention=jaxq.Int(8))
    got = jaxq.calibrate(model, params, batches, plain, masks=masks, propagate="full_precision")
    alone = [jaxq.calibrate(model, params, [s], plain, propagate="full_precision") for s in samples]
    for name, quant in got.inputs.items():
        want = max(float(q.inputs[name].grid.scale) for q in alone)
        np.testing.assert_allclose(quant.grid.scale, want, rtol=1e-4, err_msg=name)


def test_padding_is_left_out_in_a_scan_and_under_a_checkpoint():
    params, _, batch, mask = padded()
    stacked = {**params, "layers": jax.tree.map(lambda *a: jnp.stack(a), *params["layers"])}

    def scanned(p, t):
        x, _ = lax.scan(lambda x, layer: (jax.checkpoint(block)(layer, x), None), p["embed"][t], p["layers"])
        return norm(x, p["ln"]) @ p["head"]

    one = jaxq.calibrate(model, params, [batch], ALL, masks=[mask])
    other = jaxq.calibrate(scanned, stacked, [batch], ALL, masks=[mask])
    for name, quant in other.inputs.items():
        layers = [one.inputs[name.replace("layers", f"layers/{i}")] for i in range(2)] if "layers" in name else None
        want = jnp.stack([q.grid.scale for q in layers]) if layers else one.inputs[name].grid.scale
        np.testing.assert_allclose(quant.grid.scale, want, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_stack_and_its_layers_one_by_one_give_the_same():
    params, t = params_of(2), tokens(3, 2, 6)
    stacked = {**params, "layers": jax.tree.map(lambda *a: jnp.stack(a), *params["layers"])}

    def scanned(p, t):
        x, _ = lax.scan(lambda x, layer: (block(layer, x), None), p["embed"][t], p["layers"])
        return norm(x, p["ln"]) @ p["head"]

    recipe = jaxq.chain(jaxq.smooth_quant(), ALL)
    one, other = jaxq.calibrate(model, params, [t], recipe), jaxq.calibrate(scanned, stacked, [t], recipe)
    layers = jax.tree.map(lambda *a: jnp.stack(a), *one.params["layers"])
    same(other.params["layers"], layers, rtol=1e-4, atol=1.01)
    codes = jax.tree.leaves(
        jax.tree.map(lambda a, b: (a != b).mean() if a.dtype == jnp.int8 else 0.0, layers, other.params["layers"])
    )
    assert max(map(float, codes)) < 0.01
    for name, quant in other.inputs.items():
        if name.startswith("layers"):
            parts = [one.inputs[name.replace("layers", f"layers/{i}")] for i in range(2)]
            for field in ("grid", "scale"):
                if getattr(quant, field) is not None:
                    want = jax.tree.map(lambda *a: jnp.stack(a), *(getattr(p, field) for p in parts))
                    same(getattr(quant, field), want, rtol=1e-3)
    np.testing.assert_allclose(jaxq.execute(scanned)(other, t), jaxq.execute(model)(one, t), rtol=0.02, atol=0.05)


def test_members_that_read_casts_of_one_input():
    def hidden(p, x):
        h = jnp.tanh(x).astype(jnp.bfloat16)
        return h.astype(jnp.float32) @ p["a"] + h.astype(jnp.float32) @ p["b"]

    params = {name: weight(i, 16, 16) for i, name in enumerate("abc")}
    x = normal(3, 2, 5, 16)
    q = jaxq.calibrate(lambda p, x: hidden(p, x) @ p["c"], params, [x], ALL)
    assert set(q.inputs) == {"a", "c"} and q.inputs["a"].sites == ("a", "b")
    seen = jaxq.execute(hidden)(q, x)
    scale, _ = grid_from_range(jaxq.Int(8), seen.min(), seen.max())
    np.testing.assert_allclose(q.inputs["c"].grid.scale, scale, rtol=1e-6)


# Memory and compilation ---------------------------------------------------------------------------------------------


class OnDisk:
    """An array that notes when it is read."""

    def __init__(self, array: Any, path: str, log: list[str]):
        self.array, self.path, self.log = np.asarray(array), path, log
        self.shape, self.dtype, self.ndim, self.size = array.shape, array.dtype, array.ndim, array.size

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.log.append(self.path)
        return self.array


def test_a_parameter_is_read_when_its_equation_runs():
    params, log, seen = params_of(4), [], {}
    lazy = jax.tree_util.tree_map_with_path(
        lambda k, a: OnDisk(a, jax.tree_util.keystr(k, simple=True, separator="/"), log), params
    )

    def on_group(group: Group) -> None:
        seen[group.plan.name] = set(log)

    recipe = jaxq.skip(["layers/1/*"], ALL)
    q = jaxq.calibrate(model, lazy, [tokens(3, 2, 6)], recipe, on_group=on_group)
    for name, read in seen.items():
        if name.startswith("layers/"):
            assert {p for p in read if p.startswith("layers/")} <= {
                p for p in log if p.split("/")[:2] <= name.split("/")[:2]
            }
            assert not {p for p in read if p.startswith("head")}
    assert all(isinstance(leaf, OnDisk) for leaf in jax.tree.leaves(q.params["layers"][1]))
    assert q.params["layers"][1]["fc1"]["kernel"] is lazy["layers"][1]["fc1"]["kernel"]
    counts = {p: log.count(p) for p in log if p.endswith("kernel")}
    assert max(counts.values()) <= 6, counts


def test_memory_mapped_parameters_stay_so(tmp_path):
    params = params_of(1)
    mapped = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        file = tmp_path / f"{len(mapped)}.npy"
        np.save(file, leaf)
        mapped[path] = np.load(file, mmap_mode="r")
    tree = jax.tree_util.tree_map_with_path(lambda path, _: mapped[path], params)
    q = jaxq.calibrate(model, tree, [tokens(3, 2, 6)], jaxq.skip(["head"], ALL))
    assert q.params["embed"] is tree["embed"] and isinstance(q.params["head"], np.memmap)
    assert isinstance(q.params["layers"][0]["ln1"]["scale"], np.memmap)
    same(q.inputs, jaxq.calibrate(model, params, [tokens(3, 2, 6)], jaxq.skip(["head"], ALL)).inputs, rtol=0)


def compilations(layers: int, recipe, commit: bool = False) -> int:
    jax.clear_caches()
    count = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            count.append(event)

    params, t = params_of(layers), tokens(3, 2, 6)
    params = jax.device_put(params, jax.devices()[0]) if commit else params
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jaxq.calibrate(model, params, [t], recipe)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(count)


def test_more_layers_compile_nothing_more():
    recipe = jaxq.chain(jaxq.smooth_quant(), ALL)
    assert compilations(2, recipe) == compilations(4, recipe)


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_is_run(monkeypatch):
    recipe = jaxq.chain(jaxq.smooth_quant(), ALL)
    ahead, committed = compilations(2, recipe), compilations(2, recipe, commit=True)
    with jax.default_matmul_precision("float32"):
        under_a_context = compilations(2, recipe)
    monkeypatch.setattr(walk, "rehearse", lambda *_: None)
    assert ahead == committed == under_a_context == compilations(2, recipe)


@pytest.mark.slow
def test_more_layers_compile_nothing_more_in_a_search():
    recipe = jaxq.chain(jaxq.os_plus(), ALL)
    assert compilations(3, recipe) == compilations(12, recipe)


# What can be wrong ----------------------------------------------------------------------------------------------------


def two(p, x):
    return jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]


TWO = {"a": linear_params(0, 16, 16, bias=False), "b": linear_params(1, 16, 8, bias=False)}
X = normal(2, 4, 16)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_damaged_weight_is_named(bad):
    broken = {**TWO, "b": {"kernel": TWO["b"]["kernel"].at[3, 3].set(bad)}}
    with pytest.raises(ValueError, match="b/kernel: the weight has NaN or infinite values"):
        jaxq.calibrate(two, broken, [X], jaxq.quantize())


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_a_bad_activation_is_named_with_its_batch(bad):
    with pytest.raises(ValueError, match="a/kernel: the activation.*batch 1"):
        jaxq.calibrate(two, TWO, [X, X.at[0, 0].set(bad)], jaxq.quantize())


def test_overflow_in_the_middle_is_named():
    def f(p, x):
        return jnp.exp(x @ p["a"]["kernel"] * 100.0) @ p["b"]["kernel"]

    with pytest.raises(ValueError, match="b/kernel: the activation.*overflow"):
        jaxq.calibrate(f, TWO, [X], jaxq.quantize())


@pytest.mark.parametrize(
    ("batches", "masks", "message"),
    [
        ([], None, "no batches"),
        ([X[:0]], None, "batch 0 is empty"),
        ([X, X[:2]], None, r"batch 1 has inputs .*\(2, 16\).*batch 0 has .*\(4, 16\)"),
        ([X, X.astype(jnp.bfloat16)], None, "batch 1 has inputs .*bfloat16"),
        ([X], [np.ones((4, 16), bool)] * 2, "2 masks for 1 batches"),
        ([X], [np.ones((4, 7), bool)], r"mask 0 has shape \(4, 7\)"),
        ([X], [np.ones(4, bool)], r"mask 0 has shape \(4,\)"),
        ([X], [np.zeros((4, 16), bool)], "mask 0 marks every token as padding"),
    ],
)
def test_unusable_batches_and_masks(batches, masks, message):
    with pytest.raises(ValueError, match=message):
        jaxq.calibrate(two, TWO, batches, jaxq.quantize(), masks=masks)


def test_batches_of_unlike_structure_are_refused():
    def f(p, inputs):
        return inputs["x"] @ p["a"]["kernel"]

    with pytest.raises(ValueError, match="batch 1"):
        jaxq.calibrate(f, TWO, [{"x": X}, {"y": X}], jaxq.quantize())


def test_a_rule_that_matches_nothing_names_its_neighbours():
    with pytest.raises(ValueError, match=r"'a/kernle' matches no site; near it are a/kernel"):
        jaxq.calibrate(two, TWO, [X], jaxq.skip(["a/kernle"], jaxq.quantize()))


def test_a_group_size_that_does_not_divide_names_the_site():
    with pytest.raises(ValueError, match="a/kernel.*groups of 5 do not divide .*16"):
        jaxq.calibrate(two, TWO, [X], jaxq.quantize(jaxq.per_group(jaxq.Int(4), 5)))
    with pytest.raises(ValueError, match="a/kernel.*groups of 5 do not divide .*16"):
        jaxq.calibrate(two, TWO, [X], jaxq.quantize(activations=jaxq.per_group(jaxq.Int(4), 5)))


def test_groups_along_the_last_of_several_axes_that_do_not_divide_name_the_site():
    def heads(p, x):
        return jnp.einsum("bthd,hdo->bto", jnp.einsum("btc,chd->bthd", x, p["q"]), p["o"])

    params, x = {"q": normal(0, 32, 4, 8), "o": normal(1, 4, 8, 32)}, normal(2, 2, 3, 32)
    for recipe in (jaxq.quantize(jaxq.mxfp4(), None), jaxq.quantize(None, jaxq.mxfp4())):
        with pytest.raises(ValueError, match=r"o: groups of 32 do not divide its [48] channels.*skip"):
            jaxq.calibrate(heads, params, [x], recipe)
    image = normal(3, 2, 32, 5, 5)
    with pytest.raises(ValueError, match="k: groups of 32 do not divide its 3 channels"):
        jaxq.calibrate(
            lambda p, x: lax.conv(x, p["k"], (1, 1), "SAME"), {"k": normal(4, 8, 32, 3, 3)}, [image],
            jaxq.quantize(jaxq.mxfp4(), None),
        )  # fmt: skip


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"recipe": None}, TypeError, "recipe is None, not a step"),
        ({"recipe": [jaxq.quantize()]}, TypeError, "not a step"),
        ({"propagate": "quantised"}, ValueError, "propagate is 'quantised'; possible are quantized, full_precision"),
        ({"params": jaxq.Quantized(TWO)}, TypeError, "params is a Quantized"),
    ],
)
def test_wrong_arguments(change, error, message):
    right = {"params": TWO, "batches": [X], "recipe": jaxq.quantize()}
    with pytest.raises(error, match=message):
        jaxq.calibrate(two, **right | change)


def test_an_activation_of_integers_is_named():
    named = pytest.raises(ValueError, match=r"a/kernel: the activation it reads has dtype int32.*cast.*skip")
    with jax.numpy_dtype_promotion("standard"), named:
        jaxq.calibrate(two, TWO, [jnp.ones(X.shape, jnp.int32)], jaxq.quantize())


def test_a_path_that_reads_like_a_second_use_is_refused():
    params = {"w": normal(0, 16, 8), "w#1": normal(1, 16, 8)}
    with pytest.raises(ValueError, match="'w#1' has a #"):
        jaxq.calibrate(lambda p, x: x @ p["w"] + x @ p["w#1"] + jnp.tanh(x) @ p["w"], params, [X], jaxq.quantize())


def test_a_while_loop_is_named_and_can_be_left_out():
    def f(p, x, n):
        x = lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["a"]["kernel"])), (0, x))[1]
        return x @ p["b"]["kernel"]

    with pytest.raises(ValueError, match="a/kernel: inside a while loop.*skip"):
        jaxq.calibrate(f, TWO, [(X, jnp.int32(2))], jaxq.quantize())
    q = jaxq.calibrate(f, TWO, [(X, jnp.int32(2))], jaxq.skip(["a/*"], jaxq.quantize()))
    assert list(q.inputs) == ["b/kernel"]
    got, want = jaxq.execute(f)(q, X, jnp.int32(2)), f(TWO, X, 2)
    assert 0 < float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.03


def test_a_branch_that_no_batch_takes_is_named():
    def f(p, x, flag):
        return lax.cond(flag, lambda x: x @ p["a"]["kernel"], lambda x: x * 2.0, x) @ p["b"]["kernel"]

    with pytest.raises(ValueError, match="a/kernel: no calibration batch takes branch 1"):
        jaxq.calibrate(f, TWO, [(X, jnp.bool_(False))], jaxq.quantize())
    q = jaxq.calibrate(f, TWO, [(X, jnp.bool_(False)), (X, jnp.bool_(True))], jaxq.quantize())
    assert set(q.inputs) == {"a/kernel", "b/kernel"}


def test_one_weight_in_two_branches_has_two_inputs():
    def f(p, x, flag):
        return lax.cond(flag, lambda x: x @ p["w"], lambda x: (x * 100.0) @ p["w"], x)

    q = jaxq.calibrate(f, {"w": weight(0, 16, 16)}, [(X, jnp.bool_(b)) for b in (True, False)], jaxq.quantize())
    scales = sorted(float(quant.grid.scale) for quant in q.inputs.values())
    np.testing.assert_allclose(scales[1], 100 * scales[0], rtol=1e-5)


def test_groups_are_reported_in_program_order():
    names = []
    jaxq.calibrate(two, TWO, [X], jaxq.quantize(), on_group=lambda g: names.append(g.plan.name))
    assert names == ["a/kernel", "b/kernel"]


def test_calibrating_in_two_passes_keeps_what_is_quantized():
    """A tree whose first layer is already codes is calibrated further."""
    first = jaxq.calibrate(two, TWO, [X], jaxq.quantize(activations=None))
    second = jaxq.calibrate(two, first.params, [X], jaxq.quantize(weights=None))
    both = jaxq.calibrate(two, TWO, [X], jaxq.quantize())
    a, b = jaxq.execute(two)(replace(second, params=first.params), X), jaxq.execute(two)(both, X)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_inputs_of_every_container():
    def f(p, inputs, pair):
        return linear(inputs["x"] + pair[0] * pair[1], {"kernel": p["a"]["kernel"]})

    batch = ({"x": X}, [X, jnp.float32(2)])
    q = jaxq.calibrate(f, TWO, [batch, batch], jaxq.quantize())
    assert list(q.inputs) == ["a/kernel"]


def test_padding_that_cannot_be_followed_is_an_error_not_a_statistic():
    """Heads merged into the batch axis: the mask no longer says which rows are real."""

    def forward(params, x):
        b, t, c = x.shape
        q, k = (jnp.moveaxis((x @ params[n]).reshape(b, t, 2, c // 2), 2, 1).reshape(b * 2, t, c // 2) for n in "qk")
        return jnp.einsum("bth,bsh->bts", q, k)

    params = {n: jnp.eye(4) + i for i, n in enumerate("qk")}
    x, mask = jnp.arange(24.0).reshape(2, 3, 4), np.array([[1, 1, 0], [1, 1, 1]], bool)
    attention = jaxq.quantize(attention=jaxq.Int(8))
    with pytest.raises(ValueError, match="dot0.*padding"):
        jaxq.calibrate(forward, params, [x], attention, masks=[mask])
    assert len(jaxq.calibrate(forward, params, [x], attention).inputs) == 3
    assert len(jaxq.calibrate(forward, params, [x], jaxq.quantize(), masks=[mask]).inputs) == 1
