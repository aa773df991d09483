"""Law 1: folding an equivalent transform changes parameters and not the function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxq
from jaxq.calibration import handle
from jaxq.program.groups import GroupPlan
from jaxq.program.trace import named_leaves, trace
from jaxq.qtensor import Transform
from jaxq.quantizer import per_group, per_tensor
from jaxq.steps import Group, Spec, Step, fed_by_attention, transformed
from jaxq.steps.shift import touch
from tests.zoo.specimen import block, block_params, linear, linear_params, norm, norm_params, normal, tokens, weight

X = normal(99, 2, 5, 16)


def groups(forward, params, *inputs) -> dict[str, GroupPlan]:
    layout = trace(forward, params, *inputs).layout
    found = [(part, g) for part in layout.all() for g in part.groups]
    return {g.name: g for _, g in found if g.kind in ("linear", "conv", "ragged")}


def random_transforms(forward, params, *inputs, layers: tuple[int, ...] = (), seed: int = 0, shift: bool = True):
    """A transform for every group whose weights are its own."""
    found = {}
    for i, (name, g) in enumerate(groups(forward, params, *inputs).items()):
        if not g.shared:
            channels = (*layers, *(g.x_shape[a] for a in g.x_axes))
            s = jnp.exp2(normal(seed + 2 * i, *channels))
            z = normal(seed + 2 * i + 1, *channels) if shift and g.kind == "linear" else None
            found[name] = Transform(z, s)
    return found


def check(forward, params, *inputs, layers=(), plain: bool | None = None, seed: int = 0, shift: bool = True, tol=1e-4):
    """The function is unchanged; `plain`: everything was (or not everything was) folded into parameters."""
    transforms = random_transforms(forward, params, *inputs, layers=layers, seed=seed, shift=shift)
    folded = jaxq.fold(forward, params, transforms, *inputs)
    want = forward(params, *inputs)
    got = jaxq.execute(forward)(folded, *inputs)
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol * float(jnp.abs(want).max()))
    if not folded.inputs:
        np.testing.assert_array_equal(
            jax.jit(forward)(folded.params, *inputs), jax.jit(jaxq.execute(forward))(folded, *inputs)
        )
    if transforms:
        before, after = dict(named_leaves(params)), dict(named_leaves(folded.params))
        assert any(not np.array_equal(before[p], after[p]) for p in before)
    if plain is not None:
        assert (not folded.inputs) == plain, list(folded.inputs)
    return folded


def pre_norm(p, t):
    return norm(block(p["layer"], p["embed"][t]), p["ln"]) @ p["head"]


PRE_NORM = {
    "embed": normal(0, 40, 16), "layer": block_params(1, 16), "ln": norm_params(3, 16), "head": weight(4, 16, 40)
}  # fmt: skip


def test_pre_norm_takes_shift_and_scale():
    found = groups(pre_norm, PRE_NORM, tokens(0, 2, 5))
    folds = {name.removeprefix("layer/"): g.fold for name, g in found.items()}
    assert {e.path for e in folds["attn/q/kernel"].scale} == {"layer/ln1/scale", "layer/ln1/bias"}
    assert {e.path for e in folds["attn/q/kernel"].shift} == {"layer/ln1/bias"}
    assert {e.path for e in folds["fc1/kernel"].scale} == {"layer/ln2/scale", "layer/ln2/bias"}
    assert {e.path for e in folds["fc2/kernel"].scale} == {"layer/fc1/kernel", "layer/fc1/bias"}
    assert folds["fc2/kernel"].shift is None and "max" in folds["fc2/kernel"].shift_reason
    assert {e.path for e in folds["attn/o/kernel"].scale} == {"layer/attn/v/kernel", "layer/attn/v/bias"}
    assert {e.path for e in folds["attn/o/kernel"].shift} == {"layer/attn/v/bias"}
    assert {e.path for e in folds["head"].scale} == {"ln/scale", "ln/bias"}
    folded = check(pre_norm, PRE_NORM, tokens(0, 2, 5))
    # What stays: a shift before fc2, and the output bias of the head, which has none.
    assert set(folded.inputs) == {"layer/fc2/kernel", "head"}
    assert folded.inputs["layer/fc2/kernel"].scale is None
    assert folded.inputs["head"].shift is None and list(folded.inputs["head"].bias) == ["head"]


def llama_block(p, x):
    h = norm(x, p["ln1"])
    q, k, v = (linear(h, p[n]) for n in "qkv")
    x = x + linear(jax.nn.softmax(q * k, -1) * v, p["o"])
    h = norm(x, p["ln2"])
    return x + linear(jax.nn.silu(linear(h, p["gate"])) * linear(h, p["up"]), p["down"])


def llama_params(seed: int, *layers: int):
    square, wide = (*layers, 16, 16), (*layers, 16, 32)
    shapes = {"q": square, "k": square, "v": square, "o": square, "gate": wide, "up": wide, "down": (*layers, 32, 16)}
    weights = {n: linear_params(seed + i, *s, bias=False) for i, (n, s) in enumerate(shapes.items())}
    norms = {n: norm_params(seed + 20 + i, *layers, 16, bias=False) for i, n in enumerate(("ln1", "ln2"))}
    return {**weights, **norms}


def test_a_gated_product_folds_into_up_and_never_into_the_gate():
    params = llama_params(0)
    found = groups(llama_block, params, X)
    assert [e.path for e in found["q/kernel"].fold.scale] == ["ln1/scale"]
    assert found["gate/kernel"].sites == ("gate/kernel", "up/kernel")
    assert [e.path for e in found["down/kernel"].fold.scale] == ["up/kernel"]
    assert [e.path for e in found["o/kernel"].fold.scale] == ["v/kernel"]
    assert found["q/kernel"].fold.shift is None
    check(llama_block, params, X, plain=True, shift=False)
    check(llama_block, params, X, plain=False)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("act", [jax.nn.silu, jax.nn.gelu, lambda x: jnp.square(jax.nn.relu(x)), jax.nn.sigmoid])
def test_the_gate_is_refused_on_either_side_of_the_product(act, swapped):
    def f(p, x):
        a, b = act(x @ p["gate"]), x @ p["up"]
        return (b * a if swapped else a * b) @ p["down"]

    params = {"gate": weight(0, 16, 32), "up": weight(1, 16, 32), "down": weight(2, 32, 16)}
    assert [e.path for e in groups(f, params, X)["down"].fold.scale] == ["up"]
    check(f, params, X, shift=False)


def test_a_relu_is_passed_by_the_scale():
    def f(p, x):
        return linear(jax.nn.relu(linear(x, p["a"])), p["b"])

    params = {"a": linear_params(0, 16, 32), "b": linear_params(1, 32, 8)}
    assert [e.path for e in groups(f, params, X)["b/kernel"].fold.scale] == ["a/kernel", "a/bias"]
    check(f, params, X)


def test_post_norm_stays_at_run_time():
    """The norm is also the residual: neither shift nor scale may touch it."""

    def f(p, x):
        x = norm(x, p["ln1"])
        x = norm(x + linear(jax.nn.relu(linear(x, p["a"])), p["b"]), p["ln2"])
        return linear(x, p["c"]) + x

    params = {
        "ln1": norm_params(0, 16), "ln2": norm_params(1, 16), "a": linear_params(2, 16, 32),
        "b": linear_params(3, 32, 16), "c": linear_params(4, 16, 16),
    }  # fmt: skip
    found = groups(f, params, X)
    for name in ("a/kernel", "c/kernel"):
        fold = found[name].fold
        assert fold.producer == "norm" and fold.scale is None and fold.shift is None
        assert "outside the group" in fold.scale_reason
    folded = check(f, params, X, plain=False)
    assert set(folded.inputs) == {"a/kernel", "b/kernel", "c/kernel"}


def test_a_norm_read_by_two_groups_stays():
    """The second reads it through a reshape: not the same activation."""

    def f(p, x):
        h = norm(x, p["ln"])
        return jnp.einsum("bthd,hdo->bto", h.reshape(2, 5, 4, 4), p["a"]) + jnp.tanh(h @ p["b"])

    params = {"ln": norm_params(0, 16), "a": weight(1, 4, 4, 8, fan_in=16), "b": weight(2, 16, 8)}
    assert all(g.fold.scale is None for g in groups(f, params, X).values())
    check(f, params, X, plain=False)


def test_a_value_multiplied_with_itself_is_not_scaled_once():
    """h * h is divided by s^2 if its producer is divided by s; h + h and h / h are traps of the same kind."""
    for combine in (lambda h: h * h, lambda h: h + h, lambda h: h / (1.0 + jnp.abs(h)), lambda h: h * (h + 1.0)):

        def f(p, x, combine=combine):
            return combine(linear(x, p["a"])) @ p["b"]

        params = {"a": linear_params(0, 16, 32), "b": weight(1, 32, 8)}
        check(f, params, X)


def test_tied_weights_are_not_folded_and_refused():
    def f(p, t):
        return norm(jnp.tanh(p["embed"][t]), p["ln"]) @ p["embed"].T

    params = {"embed": normal(0, 40, 16), "ln": norm_params(1, 16)}
    group = groups(f, params, tokens(0, 2, 5))["embed"]
    assert group.shared and group.fold.scale is None and "2 places" in group.fold.scale_reason
    with pytest.raises(ValueError, match="embed.*used in 2 places"):
        jaxq.fold(f, params, {"embed": Transform(None, jnp.ones(16))}, tokens(0, 2, 5))


def test_a_norm_shared_by_two_layers_stays():
    def f(p, x):
        x = x + norm(x, p["ln"]) @ p["a"]
        return x + norm(x, p["ln"]) @ p["b"]

    params = {"ln": norm_params(0, 16), "a": weight(1, 16, 16), "b": weight(2, 16, 16)}
    assert all("2 places" in g.fold.scale_reason for g in groups(f, params, X).values())
    check(f, params, X, plain=False)


@pytest.mark.parametrize("make, forward", [(block_params, block), (lambda s, w, n: llama_params(s, n), llama_block)])
def test_inside_a_scan_layer_by_layer(make, forward):
    def f(p, x):
        return lax.scan(lambda x, layer: (forward(layer, x), None), x, p["layers"])[0]

    params = {"layers": make(0, 16, 3)}
    found = groups(f, params, X)
    assert sum(g.fold.scale is not None for g in found.values()) >= 3
    folded = check(f, params, X, layers=(3,))
    assert all(
        leaf.shape == params_leaf.shape
        for leaf, params_leaf in zip(jax.tree.leaves(folded.params), jax.tree.leaves(params))
    )


def test_what_all_layers_of_a_scan_share_is_not_folded():
    def f(p, x):
        def body(x, own):
            h = norm(x, p["ln"]) @ own["a"]
            return x + jax.nn.relu(h) @ p["b"] + p["bias"][None, None], None

        return lax.scan(body, x, p["layers"])[0]

    params = {
        "ln": norm_params(0, 16), "b": weight(1, 16, 16), "bias": normal(2, 16), "layers": {"a": weight(3, 2, 16, 16)}
    }  # fmt: skip
    found = groups(f, params, X)
    assert "shared by all layers" in found["layers/a"].fold.scale_reason
    assert "shared by all layers" in found["b"].shared
    assert found["b"].members[0].bias is None
    check(f, params, X, layers=(2,), plain=False)


def test_identities_on_the_way_do_not_hide_the_producer():
    """Casts in every dense layer (as Flax has them), barriers, names and sharding constraints."""

    def f(p, x):
        h = norm(x, p["ln"])
        h = checkpoint_name(lax.optimization_barrier(h), "h")
        return sum((h.astype(jnp.bfloat16) @ p[n].astype(jnp.bfloat16)).astype(jnp.float32) for n in "ab")

    params = {"ln": norm_params(0, 16), "a": weight(1, 16, 8), "b": weight(2, 16, 8)}
    (group,) = groups(f, params, X).values()
    assert {e.path for e in group.fold.scale} == {"ln/scale", "ln/bias"}
    check(f, params, X, shift=False, plain=True, tol=3e-2)


@pytest.mark.slow
def test_heads_of_every_layout_fold_into_their_producer():
    """value projection [c, h, d] -> elementwise -> output projection [h, d, c]."""

    def f(p, x):
        v = jnp.einsum("btc,chd->bhtd", x, p["v"]) + p["vb"][None, :, None]
        return jnp.einsum("bhtd,hdo->bto", jax.nn.relu(v), p["o"])

    params = {"v": weight(0, 16, 4, 8, fan_in=16), "vb": normal(1, 4, 8), "o": weight(2, 4, 8, 16, fan_in=32)}
    assert [e.path for e in groups(f, params, X)["o"].fold.scale] == ["v", "vb"]
    check(f, params, X)


# Attention ------------------------------------------------------------------------------------------------------------

ATTENTION = {n: linear_params(i, 16, 16) for i, n in enumerate(("q", "k", "v", "o"))}
FUSED = {"qkv": linear_params(5, 16, 48), "o": linear_params(6, 16, 16)}


def attend(q, k, v, weigh=jax.nn.softmax):
    return jnp.einsum("bhts,bshd->bthd", weigh(jnp.einsum("bthd,bshd->bhts", q, k)), v)


def separate(p, x, weigh=jax.nn.softmax):
    q, k, v = (linear(x, p[n]).reshape(2, 5, 4, 4) for n in "qkv")
    return linear(attend(q, k, v, weigh).reshape(2, 5, 16), p["o"])


def fused(p, x):
    """As in BLOOM: q, k and v of each head side by side."""
    parts = jnp.split(linear(x, p["qkv"]).reshape(2, 5, 4, 3, 4), 3, axis=3)
    return linear(attend(*(part[:, :, :, 0] for part in parts)).reshape(2, 5, 16), p["o"])


def uneven(p, x):
    """q, k and v side by side, all heads of each, of different widths."""
    q, k, v = jnp.split(linear(x, p["qkv"]), [8, 16], axis=-1)
    return linear(attend(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0], p["o"])


@pytest.mark.parametrize("forward, params", [(separate, ATTENTION), (fused, FUSED)])
def test_the_values_take_what_attention_mixes(forward, params):
    path = "v" if "v" in params else "qkv"
    fold = groups(forward, params, X)["o/kernel"].fold
    assert [e.path for e in fold.scale] == [f"{path}/kernel", f"{path}/bias"]
    assert [e.path for e in fold.shift] == [f"{path}/bias"]
    assert fold.producer == "attention" and len(fold.mixed) == 1
    folded = check(forward, params, X, plain=False)
    assert list(folded.inputs) == [f"{'q' if path == 'v' else path}/kernel"]  # the input of the program


def test_values_of_another_width_than_keys():
    params = {"qkv": linear_params(5, 16, 48), "o": linear_params(6, 32, 16)}
    assert [e.path for e in groups(uneven, params, X)["o/kernel"].fold.shift] == ["qkv/bias"]
    check(uneven, params, X)


def test_values_in_half_precision():
    """The softmax runs in float32, the sum in bfloat16."""

    def f(p, x):
        return separate(p, x, lambda s: jax.nn.softmax(s.astype(jnp.float32)).astype(jnp.bfloat16)).astype(jnp.float32)

    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), ATTENTION)
    assert groups(f, params, X.astype(jnp.bfloat16))["o/kernel"].fold.shift is not None
    check(f, params, X.astype(jnp.bfloat16), tol=0.1)


@pytest.mark.parametrize(
    "weigh",
    [
        jax.nn.sigmoid,
        lambda s: jax.nn.softmax(s, axis=-2),
        lambda s: jax.nn.softmax(s) * jnp.float32(0.5),
        lambda s: jnp.where(s > 0, jax.nn.softmax(s), jnp.float32(0)),
    ],
)
def test_weights_that_need_not_sum_to_one_take_a_scale_and_no_shift(weigh):
    def f(p, x):
        return separate(p, x, weigh)

    fold = groups(f, ATTENTION, X)["o/kernel"].fold
    assert fold.scale is not None and fold.shift is None and "sum to one" in fold.shift_reason
    check(f, ATTENTION, X)


def test_values_that_serve_two_queries_stay():
    """Grouped queries: two heads read each value, whose channels cannot have two scales."""

    def f(p, x):
        q = linear(x, p["q"]).reshape(2, 5, 4, 4)
        k, v = (jnp.repeat(linear(x, p[n]).reshape(2, 5, 2, 4), 2, axis=2) for n in "kv")
        return linear(attend(q, k, v).reshape(2, 5, 16), p["o"])

    params = {**ATTENTION, "k": linear_params(7, 16, 8), "v": linear_params(8, 16, 8)}
    fold = groups(f, params, X)["o/kernel"].fold
    assert fold.scale is None and fold.shift is None and "one value for several" in fold.scale_reason
    check(f, params, X)


def test_values_that_are_read_twice_stay():
    def f(p, x):
        v = linear(x, p["v"]).reshape(2, 5, 4, 4)
        return linear(attend(v, linear(x, p["k"]).reshape(2, 5, 4, 4), v).reshape(2, 5, 16), p["o"])

    fold = groups(f, ATTENTION, X)["o/kernel"].fold
    assert fold.scale is None and "read elsewhere" in fold.scale_reason
    check(f, {n: ATTENTION[n] for n in "kvo"}, X)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("forward, params", [(separate, ATTENTION), (fused, FUSED)])
def test_a_fold_through_attention_is_proved_in_the_walk(forward, params, scanned):
    if scanned:
        params = jax.tree.map(lambda a: jnp.stack([a, a * 0.9]), params)

    def f(p, x):
        return lax.scan(lambda x, p: (x + forward(p, x), None), x, p)[0] if scanned else forward(p, x)

    q = jaxq.calibrate(f, params, [X], random_step())
    assert not any("o/kernel" in name for name in q.inputs) and "o/kernel" in q.transforms
    np.testing.assert_allclose(jaxq.execute(f)(q, X), f(params, X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", [jaxq.Int(8), per_tensor(jaxq.Int(8)), per_group(jaxq.Int(8), 8)])
@pytest.mark.parametrize("attention", [None, jaxq.Int(8)])
def test_values_already_quantized_take_a_scale_unless_attention_is(weights, attention):
    """The grid of what attention reads was found for the values as they were."""

    def mild(group: Group) -> Group:
        if not fed_by_attention(group.plan):
            return group
        return transformed(group, 0.5 * normal(7, *group.channels), jnp.exp2(0.5 * normal(8, *group.channels)))

    recipe = jaxq.chain(Step(touch(fed_by_attention), mild), jaxq.quantize(weights, jaxq.Int(8), attention=attention))
    for forward, params in ((separate, ATTENTION), (fused, FUSED)):
        q = jaxq.calibrate(forward, params, [X], recipe)
        left = q.inputs["o/kernel"]
        assert (left.scale is None) == (left.shift is None) == (attention is None)
        want = forward(params, X)
        error = jnp.linalg.norm(jaxq.execute(forward)(q, X) - want) / jnp.linalg.norm(want)
        assert 1e-4 < error < 0.05


def test_experts_under_vmap():
    def f(p, x):
        return jax.vmap(lambda p, x: linear(jax.nn.relu(linear(x, p["up"])), p["down"]))(p, x)

    params = {"up": linear_params(0, 3, 16, 32), "down": linear_params(1, 3, 32, 16)}
    check(f, params, normal(2, 3, 7, 16))


def test_padding_of_a_convolution_refuses_a_shift():
    def f(p, x):
        dims = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(norm(x, p["ln"]), p["w"], (1,), "SAME", dimension_numbers=dims)

    params = {"ln": norm_params(0, 16), "w": weight(1, 3, 16, 8, fan_in=48)}
    fold = groups(f, params, X)["w"].fold
    assert fold.scale is not None and fold.shift is None and "padding" in fold.shift_reason
    check(f, params, X, plain=True)


def test_a_corrupted_fold_is_caught(monkeypatch):
    """The proof after each fold: the activation, made again, is the transformed one."""

    def corrupt(plan, leaves, transform):
        changed, rest = absorb(plan, leaves, transform)
        return {path: leaf * 1.01 for path, leaf in changed.items()}, rest

    absorb = handle.absorb
    monkeypatch.setattr(handle, "absorb", corrupt)
    with pytest.raises(jaxq.FoldError, match="ln1/scale.*changed the activation"):
        jaxq.calibrate(pre_norm, PRE_NORM, [tokens(0, 2, 5)], random_step())


def random_step(shift: bool = True) -> Step:
    """Every group that can be scaled gets a random transform."""

    def apply(group: Group) -> Group:
        if not group.can_scale():
            return group
        z = normal(7, *group.channels) if shift and group.can_shift() else None
        return transformed(group, z, jnp.exp2(normal(8, *group.channels)))

    return Step(lambda _, spec: Spec(spec.weights, spec.activations, touched=True), apply)


@pytest.mark.parametrize("propagate", ["quantized", pytest.param("full_precision", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_calibration_with_transforms_alone_keeps_the_function(propagate, scanned):
    def f(p, t):
        x = p["embed"][t]
        if scanned:
            x = lax.scan(lambda x, layer: (block(layer, x), None), x, p["layers"])[0]
        else:
            for layer in p["layers"]:
                x = block(layer, x)
        return norm(x, p["ln"]) @ p["embed"].T

    layers = block_params(0, 16, 2) if scanned else [block_params(0, 16), block_params(30, 16)]
    params, t = {"embed": normal(1, 40, 16), "layers": layers, "ln": norm_params(2, 16)}, tokens(3, 2, 6)
    q = jaxq.calibrate(f, params, [t, t + 1], random_step(), propagate=propagate)
    want = f(params, t)
    np.testing.assert_allclose(jaxq.execute(f)(q, t), want, rtol=1e-3, atol=1e-4 * float(jnp.abs(want).max()))
    again = jaxq.fold(f, params, q.transforms, t)
    np.testing.assert_allclose(jaxq.execute(f)(again, t), want, rtol=1e-3, atol=1e-4 * float(jnp.abs(want).max()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), again.params, q.params)
    assert again.inputs.keys() == q.inputs.keys()


def test_a_run_time_output_bias_is_scaled_with_its_columns():
    """Shifted without a bias of its own, `up` gets one at run time; then `down` scales the columns of `up`."""
    params = llama_params(0)

    def apply(group: Group) -> Group:
        return transformed(group, normal(7, *group.channels), jnp.exp2(normal(8, *group.channels)))

    step = Step(lambda _, spec: Spec(spec.weights, spec.activations, touched=True), apply)
    q = jaxq.calibrate(llama_block, params, [X], step)
    assert set(q.inputs["gate/kernel"].bias) == {"gate/kernel", "up/kernel"}
    want = llama_block(params, X)
    np.testing.assert_allclose(jaxq.execute(llama_block)(q, X), want, rtol=1e-3, atol=1e-4 * float(jnp.abs(want).max()))


def test_a_scan_shared_weight_keeps_the_function_under_transforms():
    def f(p, x):
        return lax.scan(lambda x, w: (x + jnp.tanh(x @ p["shared"]) @ w, None), x, p["own"])[0]

    params = {"shared": weight(0, 16, 16), "own": weight(1, 3, 16, 16)}
    q = jaxq.calibrate(f, params, [X], random_step())
    np.testing.assert_array_equal(q.params["shared"], params["shared"])
    np.testing.assert_allclose(jaxq.execute(f)(q, X), f(params, X), rtol=1e-4, atol=1e-4)


def test_fold_names_an_unknown_group():
    with pytest.raises(ValueError, match="no group 'nonsense'"):
        jaxq.fold(pre_norm, PRE_NORM, {"nonsense": Transform(None, jnp.ones(16))}, tokens(0, 2, 5))


# Random programs ------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "square": jnp.square,
    "negative": jnp.negative,
    "double": lambda x: x + x,
    "halve": lambda x: x * jnp.float32(0.5),
    "offset": lambda x: x + jnp.float32(1),
}


@dataclass(frozen=True)
class Op:
    name: str
    bias: bool = True
    back: int = 1
    share: bool = False


OPS = st.builds(
    Op,
    st.sampled_from(["norm", "linear", "linear", "norm", "residual", "gate", *ACTIVATIONS]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 5).map(lambda n: n == 0),
)


def random_program(ops: list[Op]) -> tuple[Any, dict]:
    params: dict[str, Any] = {}
    names: list[str] = []
    for i, op in enumerate(ops):
        earlier = [n for n, o in zip(names, ops) if o.name == op.name and n in params and o.bias == op.bias]
        name = earlier[-1] if op.share and earlier else f"{i}_{op.name}"
        names.append(name)
        if op.name == "norm":
            params.setdefault(name, norm_params(i, 8, bias=op.bias))
        if op.name == "linear":
            params.setdefault(name, linear_params(i, 8, 8, bias=op.bias))
        if op.name == "gate":
            params.setdefault(
                name, {"g": linear_params(i, 8, 8, bias=op.bias), "u": linear_params(i + 50, 8, 8, bias=op.bias)}
            )

    def forward(p, x):
        seen = [x]
        for op, name in zip(ops, names):
            if op.name == "norm":
                x = norm(x, p[name])
            elif op.name == "linear":
                x = linear(x, p[name])
            elif op.name == "gate":
                x = jax.nn.silu(linear(x, p[name]["g"])) * linear(x, p[name]["u"])
            elif op.name == "residual":
                x = x + seen[-min(op.back, len(seen))]
            else:
                x = ACTIVATIONS[op.name](x)
            seen.append(x)
        return linear(x, p["last"])

    return forward, {**params, "last": linear_params(77, 8, 8)}


@given(st.lists(OPS, min_size=1, max_size=7), st.booleans(), st.integers(0, 1000))
def test_random_programs_keep_their_function(ops, shift, seed):
    forward, params = random_program(ops)
    check(forward, params, normal(seed, 6, 8), seed=seed, shift=shift, tol=1e-3)
