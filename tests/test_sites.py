import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxq
from jaxq import sites
from tests.tiny import LLAMA, OPT, tiny_model

TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


def report(config: dict, **changes: object):
    model = tiny_model(config, **changes)
    return sites(model.forward, jax.eval_shape(lambda: model.params), TOKENS)


def row(found, path: str, kind: str = "linear"):
    return next(r for r in found if r.path == path and r.kind == kind)


def test_opt():
    found = report(OPT)
    q, k = (row(found, f"layers/1/attn/{name}/kernel") for name in "qk")
    assert q.group == k.group == "layers/1/attn/q/kernel" and q.shapes == ((1, 8, 16), (16, 16), (1, 8, 16))
    assert q.scale_into == ("layers/1/attn_norm/scale", "layers/1/attn_norm/bias") and q.bias == "layers/1/attn/q/bias"
    assert q.shift_into == ("layers/1/attn_norm/bias",) and not q.scale_reason and not q.left_out
    down = row(found, "layers/0/mlp/down/kernel")
    assert down.scale_into == ("layers/0/mlp/up/kernel", "layers/0/mlp/up/bias")
    assert down.shift_into == () and "max" in down.shift_reason
    assert row(found, "layers/0/attn/dot0:lhs", "attention").shapes[0] == (1, 8, 2, 8)
    assert row(found, "embed/embedding", "lookup") and "2 places" in row(found, "embed/embedding").scale_reason
    assert len(found) == len(found.rows) == 2 + 2 * (6 + 4) + 1


def test_post_norm_says_why_not():
    q = row(report(OPT, do_layer_norm_before=False), "layers/1/attn/q/kernel")
    assert not q.scale_into and "read" in q.scale_reason


def test_llama():
    found = report(LLAMA)
    gate, up = (row(found, f"layers/0/mlp/{name}/kernel") for name in ("gate", "up"))
    assert gate.group == up.group and gate.scale_into == ("layers/0/mlp_norm/scale",) and not gate.shift_into
    assert row(found, "layers/0/mlp/down/kernel").scale_into == ("layers/0/mlp/up/kernel",)


def test_printed_and_as_json():
    found = report(OPT)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 160 and len(lines) < 40
    assert any(
        "layers/*/attn/q/kernel" in line and " 2 " in line and "layers/*/attn_norm/{scale,bias}" in line
        for line in lines
    )
    content = json.loads(json.dumps(found.as_dict()))
    assert len(content["sites"]) == len(found) and content["left_out"] == []


def test_what_is_left_out_is_said():
    closed = jnp.ones((4, 4))

    def forward(params, x):
        x = x @ params["good"]
        x = jnp.tanh(x @ (params["a"] * params["b"]))
        return x @ closed + params["added"]

    params = {name: jnp.ones((4, 4)) for name in ("good", "a", "b", "added", "unused")}
    found = sites(forward, params, jnp.ones((4, 4)))
    left_out = {r.path: r.left_out for r in found if r.left_out}
    assert any("computed from parameters" in why for why in left_out.values())
    assert any("closed over" in why for why in left_out.values())
    assert "no contraction" in left_out["added"] and "no contraction" in left_out["unused"]
    assert [r.path for r in found if not r.left_out] == ["good"]
    assert "left out: the weight is closed over" in " ".join(str(found).split())


def test_errors_of_the_function_come_through():
    with pytest.raises(KeyError, match="missing"):
        sites(lambda params, x: x @ params["missing"], {}, jnp.ones((2, 2)))


def test_a_tied_head_is_not_as_above_its_lookup():
    params = {"embed": jnp.ones((40, 8))}
    found = sites(lambda p, t: jnp.tanh(p["embed"][t]) @ p["embed"].T, params, jnp.ones((2, 3), jnp.int32))
    assert [r.kind for r in found] == ["lookup", "linear"]
    assert "as above" not in str(found) and "used in 2 places" in " ".join(str(found).split())


def test_biases_of_any_rank_are_not_left_out():
    model = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=True)
    x = jnp.ones((1, 4, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    assert params["params"]["query"]["bias"].shape == (2, 4)
    found = sites(model.apply, params, x)
    assert [r.path for r in found if r.left_out] == [] and ", 0 left out" in str(found)


def test_of_a_quantized_tree_it_is_the_report_of_the_function():
    def forward(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    x = jnp.ones((4, 8))
    params = {name: jax.random.normal(jax.random.key(i), (8, 8)) for i, name in enumerate("ab")}
    quantized = jaxq.calibrate(forward, params, [x], jaxq.quantize(jaxq.Int(4), jaxq.Int(8)))
    for tree in (quantized, jaxq.pack(quantized)):
        assert sites(forward, tree, x) == sites(forward, params, x)


def test_weights_cast_in_the_function_are_the_same_sites():
    model = tiny_model(OPT)
    half = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))

    def cast(params, tokens):
        return model.forward(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), tokens)

    assert sites(cast, half, TOKENS) == report(OPT)
