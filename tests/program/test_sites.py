"""Sites and groups: names, biases, what is shared; the zoo has the full catalogue."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxq.program.groups import skipped_in
from jaxq.program.trace import named_leaves, path_name, replace_leaves, trace
from tests.zoo.specimen import attend, linear, linear_params, norm, norm_params, normal, weight

X = normal(0, 2, 5, 16)


def plans(f, params, *inputs):
    return [g for part in trace(f, params, *inputs).layout.all() for g in part.groups]


def test_what_reads_one_activation_is_one_group():
    def f(p, x):
        h = norm(x, p["ln"])
        q, k, v = (linear(h, p[n]) for n in "qkv")
        return attend(q, k, v, 2) @ p["o"] + h @ p["side"]

    params = {n: linear_params(i, 16, 16) for i, n in enumerate("qkv")}
    params |= {"o": weight(3, 16, 16), "side": weight(4, 16, 16), "ln": norm_params(5, 16)}
    found = plans(f, params, X)
    assert found[0].sites == ("q/kernel", "k/kernel", "v/kernel", "side")
    assert [m.bias.path if m.bias else None for m in found[0].members] == ["q/bias", "k/bias", "v/bias", None]
    assert [g.name for g in found if g.kind == "attention"] == ["dot0:lhs", "dot0:rhs", "dot1:lhs", "dot1:rhs"]


@pytest.mark.parametrize(
    ("add", "expected"),
    [
        (lambda y, p: y + p["b"][None, None], "b"),
        (lambda y, p: p["b"][None, None] + y, "b"),
        (lambda y, p: y.astype(jnp.bfloat16).astype(jnp.float32) + p["b"][None, None], "b"),
        (lambda y, p: (y.reshape(2, 5, 4, 4) + p["b"].reshape(4, 4)[None, None]).reshape(2, 5, 16), "b"),
        (lambda y, p: y + p["full"][None], None),  # one value for each token: no bias
        (lambda y, p: y + p["scalar"], None),
        (lambda y, p: y + p["b"][None, None] * 2.0, None),
        (lambda y, p: y - p["b"][None, None], None),
        (lambda y, p: jnp.tanh(y) + p["b"][None, None], None),
        (lambda y, p: (y + p["b"][None, None]) * y, None),  # the output before the bias is read too
        (lambda y, p: y + p["b"][None, None] + p["b"][None, None], None),  # used twice
        (lambda y, p: y + y, None),
    ],
)
def test_the_bias_of_a_site(add, expected):
    params = {"w": weight(0, 16, 16), "b": normal(1, 16), "full": normal(2, 5, 16), "scalar": jnp.float32(1)}
    (group,) = plans(lambda p, x: add(x @ p["w"], p), params, X)
    bias = group.members[0].bias
    assert (bias.path if bias else None) == expected


def test_names_are_unique_in_all_bodies():
    def f(p, x):
        x, _ = lax.scan(lambda x, w: (x + attend(x @ w, x @ w, x, 2), None), x, p["w"])
        x, _ = lax.scan(lambda x, w: (x @ w, None), x, p["w"])
        return attend(x, x @ p["v"], x, 2)

    names = [g.name for g in plans(f, {"w": weight(0, 2, 16, 16), "v": weight(1, 16, 16)}, X)]
    assert len(names) == len(set(names))


def test_rows_say_what_was_left_out_and_why():
    def f(p, x):
        y = x @ (p["a"] * 2.0) + x @ p["c"][:, :16]
        return y @ jnp.ones((16, 4)) + (p["a"] @ p["b"]).sum()

    params = {"a": weight(0, 16, 16), "b": weight(1, 16, 16), "c": weight(2, 16, 32)}
    rows = {row.path: row.reason for row in skipped_in(trace(f, params, X).layout)}
    assert set(rows) == {"a", "c", "a, b"}
    assert "by mul" in rows["a"] and "by slice" in rows["c"] and "both operands" in rows["a, b"]


def test_a_closed_over_weight_is_found_behind_operations():
    w = weight(0, 16, 16)
    for forward in (
        lambda p, x: x @ w,
        lambda p, x: x @ w.T,
        lambda p, x: x @ (w * 2.0),
        lambda p, x: x @ np.asarray(w),
        lambda p, x: jax.jit(lambda x: x @ w)(x),
        lambda p, x: lax.scan(lambda x, _: (x @ w, None), x, length=2)[0],
        lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, jnp.stack([w, w]))[0],
        lambda p, x: lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: x, x),
        lambda p, x: jax.vmap(lambda x: x @ w)(x),
    ):
        (row,) = skipped_in(trace(forward, {"unused": X}, X).layout)
        assert row.path == "(closed over)"


def test_shapes_alone_are_traced():
    params = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    (group,) = plans(lambda p, x: x @ p["w"], params, jax.ShapeDtypeStruct((2, 16), jnp.float32))
    assert group.name == "w"


def test_two_parameters_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two parameters share the path 'a/b'"):
        trace(lambda p, x: x @ p["a"]["b"], {"a": {"b": weight(0, 16, 8)}, "a/b": weight(1, 16, 8)}, X)


def test_paths_name_and_replace_leaves():
    tree = {"a": [jnp.ones(2), {"b": jnp.zeros(3)}], "c": None}
    assert [path for path, _ in named_leaves(tree)] == ["a/0", "a/1/b"]
    new = replace_leaves(tree, {"a/1/b": jnp.ones(3)})
    np.testing.assert_array_equal(new["a"][1]["b"], 1)
    assert new["a"][0] is tree["a"][0]
    assert path_name((jax.tree_util.DictKey("x"), jax.tree_util.GetAttrKey("value"))) == "x"
