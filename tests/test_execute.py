"""`execute`: what it computes, and how it behaves under JAX's transformations."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq.contraction import quantize_activation
from jaxq.formats import fake_quant
from jaxq.qtensor import PerToken
from tests.zoo.specimen import block, block_params, linear, linear_params, norm, norm_params, normal, tokens, weight


def mlp(p, x):
    return linear(jax.nn.relu(linear(x, p["a"])), p["b"])


MLP = {"a": linear_params(0, 16, 32), "b": linear_params(1, 32, 8)}
X = normal(2, 3, 5, 16)


@pytest.fixture(scope="module")
def quantized():
    return jaxq.calibrate(mlp, MLP, [X], jaxq.quantize())


def by_hand(q: jaxq.Quantized, x: jax.Array) -> jax.Array:
    def layer(x, name):
        quant = q.inputs[f"{name}/kernel"]
        assert quant.grid.zero is None
        x = fake_quant(quant.format, x, quant.grid.scale.reshape(1, 1, 1), None)
        w, b = q.params[name]["kernel"].dequantize(), q.params[name]["bias"]
        return x @ w + b[None, None]

    return layer(jax.nn.relu(layer(x, "a")), "b")


def test_equals_the_same_model_quantized_by_hand(quantized):
    got = jaxq.execute(mlp)(quantized, X)
    np.testing.assert_array_equal(got, by_hand(quantized, X))
    assert not np.array_equal(got, mlp(MLP, X))


def test_dynamic_ranges_are_each_tokens_own():
    q = jaxq.calibrate(mlp, MLP, [X], jaxq.quantize(activations=jaxq.per_token(jaxq.Int(8, symmetric=False))))
    assert all(quant.grid is None for quant in q.inputs.values())
    x = X.at[0, 0].mul(1000.0)  # one token's outlier leaves the other tokens alone
    got = jaxq.execute(mlp)(q, x)
    np.testing.assert_array_equal(got[1:], jaxq.execute(mlp)(q, X)[1:])
    h = quantize_activation(x, jaxq.Int(8, symmetric=False), PerToken(), None, (2,))
    first = h @ q.params["a"]["kernel"].dequantize() + MLP["a"]["bias"][None, None]
    h = quantize_activation(jax.nn.relu(first), jaxq.Int(8, symmetric=False), PerToken(), None, (2,))
    np.testing.assert_array_equal(got, h @ q.params["b"]["kernel"].dequantize() + MLP["b"]["bias"][None, None])


def test_a_group_reads_one_quantized_activation():
    """q, k and v: one input, quantized once in the traced program."""

    def f(p, x):
        return sum(x @ p[n] for n in "qkv")

    q = jaxq.calibrate(f, {n: weight(i, 16, 8) for i, n in enumerate("qkv")}, [X], jaxq.quantize())
    assert list(q.inputs) == ["q"]
    assert q.inputs["q"].sites == ("q", "k", "v")
    rounds = str(jax.make_jaxpr(jaxq.execute(f))(q, X)).count("round")
    q = jaxq.calibrate(lambda p, x: x @ p["q"], {"q": weight(0, 16, 8)}, [X], jaxq.quantize())
    assert rounds == str(jax.make_jaxpr(jaxq.execute(lambda p, x: x @ p["q"]))(q, X)).count("round")


def test_jit_of_jit_gives_the_same(quantized):
    run = jaxq.execute(mlp)
    once = jax.jit(run)(quantized, X)
    np.testing.assert_array_equal(jax.jit(lambda q, x: jax.jit(run)(q, x))(quantized, X), once)
    np.testing.assert_allclose(once, run(quantized, X), rtol=1e-5, atol=1e-5)


def test_vmap_over_inputs(quantized):
    run = jaxq.execute(mlp)
    many = normal(5, 4, 3, 5, 16)
    got = jax.vmap(run, in_axes=(None, 0))(quantized, many)
    np.testing.assert_allclose(got, jnp.stack([run(quantized, x) for x in many]), rtol=1e-5, atol=1e-5)


def with_scale(q: jaxq.Quantized, name: str, scale) -> jaxq.Quantized:
    quant = q.inputs[name]
    return replace(q, inputs={**q.inputs, name: replace(quant, grid=replace(quant.grid, scale=scale))})


def test_vmap_over_a_clip_range(quantized):
    run, name = jaxq.execute(mlp), "b/kernel"
    scales = quantized.inputs[name].grid.scale * jnp.linspace(0.2, 1.0, 5)
    axes = with_scale(jax.tree.map(lambda _: None, quantized), name, 0)
    got = jax.vmap(run, in_axes=(axes, None))(with_scale(quantized, name, scales), X)
    want = jnp.stack([run(with_scale(quantized, name, s), X) for s in scales])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert len({np.asarray(y).tobytes() for y in got}) == 5


def test_gradient_of_a_clip_range_is_lsqs(quantized):
    """d fq(x) / ds = rint(x / s) - x / s inside the range, the last code outside (LSQ, eq. 3)."""

    def f(p, x):
        return x @ p["w"]

    w = weight(3, 16, 4)
    q = jaxq.calibrate(f, {"w": w}, [X], jaxq.quantize(weights=None))
    s = q.inputs["w"].grid.scale * 0.5  # some values are clipped
    got = jax.grad(lambda s: jaxq.execute(f)(with_scale(q, "w", s), X).sum())(s)
    ratio = X / s
    slope = jnp.where(jnp.abs(jnp.rint(ratio)) > 127, jnp.sign(ratio) * 127, jnp.rint(ratio) - ratio)
    np.testing.assert_allclose(got, (slope * w.sum(1)[None, None]).sum(), rtol=1e-4)


def test_gradients_pass_straight_through_to_inputs_weights_and_scales(quantized):
    run = jaxq.execute(mlp)
    low, high = (jax.grad(lambda x, f=f, p=p: f(p, x).sum())(X) for f, p in ((run, quantized), (mlp, MLP)))
    assert jnp.linalg.norm(low - high) < 0.1 * jnp.linalg.norm(high)
    low = jax.grad(lambda p: run(replace(quantized, params=p), X).sum())(MLP)
    high = jax.grad(lambda p: mlp(p, X).sum())(MLP)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) < 0.1 * jnp.linalg.norm(b), low, high)))
    step = quantized.params["b"]["kernel"].grid.scale

    def of_weight_scale(s):
        b = quantized.params["b"]
        kernel = replace(b["kernel"], grid=replace(b["kernel"].grid, scale=s))
        return run(replace(quantized, params={**quantized.params, "b": {**b, "kernel": kernel}}), X).sum()

    grad = jax.grad(of_weight_scale)(step)
    # The output is linear in a weight's scale.
    np.testing.assert_allclose((grad * step).sum() + of_weight_scale(step * 0), of_weight_scale(step), rtol=1e-3)


def test_export_and_call(quantized):
    run = jax.jit(jaxq.execute(mlp))
    exported = jax.export.export(run)(quantized, X)
    np.testing.assert_array_equal(exported.call(quantized, X), run(quantized, X))


def test_export_serialized_with_the_tree_as_argument(quantized):
    """Serialized and loaded again, arguments in their own containers."""
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers, which JAX does not install")
    run = jax.jit(jaxq.execute(mlp))
    want = run(quantized, X)
    exported = jax.export.export(run)(quantized, X)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == jax.tree.structure(((quantized, X), {}))
    np.testing.assert_array_equal(again.call(quantized, X), want)


def test_export_knows_every_format_and_granularity():
    pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers, which JAX does not install")

    def f(p, x):
        return x @ p["w"]

    recipe = jaxq.quantize(jaxq.per_group(jaxq.Int(4), 8), jaxq.per_token(jaxq.Int(6, symmetric=False)))
    params = {"w": weight(0, 16, 8).astype(jnp.bfloat16)}
    x = X.astype(jnp.bfloat16)
    q = jaxq.calibrate(f, params, [x], jaxq.chain(jaxq.smooth_quant(where=lambda _: True), recipe))
    exported = jax.export.export(jax.jit(jaxq.execute(f)))(q, x)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    np.testing.assert_array_equal(again.call(q, x), exported.call(q, x))


def transformer(p, t):
    x = p["embed"][t]
    for layer in p["layers"]:
        x = block(layer, x)
    return norm(x, p["ln"]) @ p["head"]


def transformer_params(layers: int = 2):
    return {
        "embed": normal(0, 40, 16),
        "layers": [block_params(20 * i, 16) for i in range(layers)],
        "ln": norm_params(1, 16),
        "head": weight(2, 16, 40),
    }


@pytest.fixture(scope="module")
def small_transformer():
    params, t = transformer_params(), tokens(3, 2, 8)
    return params, t, jaxq.calibrate(transformer, params, [t], jaxq.quantize(attention=jaxq.Int(8)))


@pytest.mark.parametrize("shape", [(1, 8), (3, 13)])
@pytest.mark.slow
def test_one_tree_serves_other_batch_sizes_and_lengths(small_transformer, shape):
    params, _, q = small_transformer
    t = tokens(9, *shape)
    got, want = jaxq.execute(transformer)(q, t), transformer(params, t)
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert 1e-4 < error < 0.1
    # A sequence's outputs do not depend on the others in its batch.
    np.testing.assert_allclose(jaxq.execute(transformer)(q, t[:1]), got[:1], rtol=1e-3, atol=1e-3)


def test_one_tree_serves_a_part_of_the_model(small_transformer):
    """The first layers alone, by hand and as the calibrated function has them."""
    _, t, q = small_transformer

    def part(p, t):
        return block(p["layers"][0], p["embed"][t])

    def both(p, t):
        x = block(p["layers"][0], p["embed"][t])
        return x, norm(block(p["layers"][1], x), p["ln"]) @ p["head"]

    inner, last = jaxq.execute(both)(q, t)
    np.testing.assert_array_equal(jaxq.execute(part)(q, t), inner)
    np.testing.assert_array_equal(jaxq.execute(transformer)(q, t), last)
    assert not np.array_equal(jaxq.execute(part)(q, t), part(jaxq.qtensor.logical(q.params), t))


def test_generation_with_a_cache_equals_the_whole_sequence(small_transformer):
    """Decoding token by token with cached keys and values: another function over the same parameters."""
    _, t, q = small_transformer
    q = replace(q, inputs={k: v for k, v in q.inputs.items() if "dot" not in k})
    whole = jaxq.execute(transformer)(q, t)

    def one_layer(p, x, cache, i):
        h = norm(x, p["ln1"])
        query, key, value = (linear(h, p["attn"][n]).reshape(-1, 1, 2, 8) for n in "qkv")
        keys, values = (lax.dynamic_update_slice(c, n, (0, i, 0, 0)) for c, n in zip(cache, (key, value)))
        scores = jnp.einsum("bthd,bshd->bhts", query / np.float32(8**0.5), keys)
        seen = (jnp.arange(keys.shape[1]) <= i)[None, None, None]
        p_ = jax.nn.softmax(jnp.where(seen, scores, jnp.float32(-1e9)), -1)
        x = x + linear(jnp.einsum("bhts,bshd->bthd", p_, values).reshape(x.shape), p["attn"]["o"])
        return x + linear(jax.nn.relu(linear(norm(x, p["ln2"]), p["fc1"])), p["fc2"]), (keys, values)

    def decode(p, token, caches, i):
        x, new = p["embed"][token], []
        for layer, cache in zip(p["layers"], caches):
            x, cache = one_layer(layer, x, cache, i)
            new.append(cache)
        return norm(x, p["ln"]) @ p["head"], new

    run = jax.jit(jaxq.execute(decode))
    empty = jnp.zeros((2, 8, 2, 8), jnp.float32)
    caches = [(empty, empty), (empty, empty)]
    for i in range(t.shape[1]):
        logits, caches = run(q, t[:, i : i + 1], caches, jnp.int32(i))
        np.testing.assert_allclose(logits[:, 0], whole[:, i], rtol=2e-3, atol=2e-3)


def test_runs_inside_a_while_loop():
    """A tree calibrated on a function without a loop runs where the same parameters are read inside one."""

    def step(p, x):
        return jnp.tanh(x @ p["w"])

    def looped(p, x, n):
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, step(p, c[1])), (0, x))[1]

    params = {"w": weight(0, 16, 16)}
    q = jaxq.calibrate(step, params, [X], jaxq.quantize())
    got = jax.jit(jaxq.execute(looped))(q, X, 3)
    want = X
    for _ in range(3):
        want = jaxq.execute(step)(q, want)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(got, looped(params, X, 3), atol=1e-4)


def test_checkpoint_keeps_its_meaning():
    """With something quantized inside, `jax.checkpoint` still saves only what its policy allows."""

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def layer(x, w):
        return jnp.sin(jnp.sin(x @ w))

    def f(p, x):
        return layer(x, p["w"]).sum()

    params = {"w": weight(0, 16, 16)}
    q = jaxq.calibrate(f, params, [X], jaxq.quantize())
    assert "prevent_cse" in str(jax.make_jaxpr(lambda x: jaxq.execute(f)(q, x))(X))
    grad = jax.grad(lambda x: jaxq.execute(f)(q, x))(X)
    np.testing.assert_allclose(grad, jax.grad(lambda x: f(params, x))(X), atol=0.05)


def test_a_calibrated_weight_that_is_read_in_another_way_is_an_error(quantized):
    """Not a silent skip: the activation would run in full precision."""
    with pytest.raises(ValueError, match="a/kernel.*computed from parameters .by mul."):
        jaxq.execute(lambda p, x: x @ (p["a"]["kernel"] * jnp.float32(2)))(quantized, X)


def test_traces_once_for_a_set_of_shapes():
    traced = []

    def f(p, x):
        traced.append(x.shape)
        return x @ p["w"]

    run, params = jaxq.execute(f), {"w": weight(0, 16, 8)}
    for x in (X, X, X[:1], X[:1]):
        run(params, x)
    assert len(traced) == 2


SHARDED = """
    import numpy as np, jax, jax.numpy as jnp, jaxq
    from jax.sharding import NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    def f(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (16, 64)), "down": jax.random.normal(keys[1], (64, 16))}
    x = jax.random.normal(keys[2], (8, 16))
    q = jaxq.calibrate(f, params, [x], jaxq.quantize())
    want = jax.jit(jaxq.execute(f))(q, x)
    def place(path, a):
        spec = P(None, "model") if "up" in str(path) and a.ndim == 2 and a.shape[1] == 64 else P()
        return jax.device_put(a, NamedSharding(mesh, spec))
    sharded = jax.tree_util.tree_map_with_path(place, q)
    got = jax.jit(jaxq.execute(f))(sharded, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert len(sharded.params["up"].codes.sharding.device_set) == 8 and len(got.sharding.device_set) == 8
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    local = jax.shard_map(jaxq.execute(f), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(local)(q, x), want, rtol=1e-5, atol=1e-4)
    column = jax.shard_map(
        lambda q, x: jax.lax.psum(jaxq.execute(f)(q, x), "model"), mesh=mesh,
        in_specs=({"up": P(None, "model"), "down": P("model")}, P("data")), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(column)(params, x), f(params, x), rtol=1e-5, atol=1e-4)
    print("sharded")
"""


def test_runs_sharded_over_eight_devices():
    root = Path(__file__).parents[1]
    eight = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    env = {**os.environ, **eight, "PYTHONPATH": str(root)}
    code = textwrap.dedent(SHARDED)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded" in done.stdout
