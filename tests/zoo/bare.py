"""Linear layers in every spelling that JAX has."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.specimen import Specimen, linear, linear_params, normal, tokens, weight


def one(forward, w, *inputs, path="w", **kwargs) -> Specimen:
    return Specimen(forward, {"w": w}, inputs, frozenset({path}), **kwargs)


def matmul() -> Specimen:
    return one(lambda p, x: x @ p["w"], weight(0, 16, 12), normal(1, 2, 5, 16))


def transposed() -> Specimen:
    return one(lambda p, x: x @ p["w"].T, weight(0, 12, 16, fan_in=16), normal(1, 2, 5, 16))


def vector() -> Specimen:
    return one(lambda p, x: x @ p["w"], normal(0, 64), normal(1, 40, 64))


def einsum_heads_in() -> Specimen:
    return one(
        lambda p, x: jnp.einsum("bthd,hdo->bto", x, p["w"]), weight(0, 4, 8, 16, fan_in=32), normal(1, 2, 5, 4, 8)
    )


def einsum_heads_out() -> Specimen:
    return one(lambda p, x: jnp.einsum("btc,chd->bthd", x, p["w"]), weight(0, 16, 4, 8, fan_in=16), normal(1, 2, 5, 16))


def einsum_transposed_output() -> Specimen:
    return one(lambda p, x: jnp.einsum("btc,oc->otb", x, p["w"]), weight(0, 12, 16, fan_in=16), normal(1, 2, 5, 16))


def einsum_batched() -> Specimen:
    return one(lambda p, x: jnp.einsum("bec,eco->ebo", x, p["w"]), weight(0, 3, 16, 8), normal(1, 5, 3, 16))


def param_on_the_left() -> Specimen:
    def forward(p, x):
        return lax.dot_general(p["w"], x, (((1,), (0,)), ((), ())))

    return one(forward, weight(0, 12, 16, fan_in=16), normal(1, 16, 7))


def permuted_contraction() -> Specimen:
    def forward(p, x):  # sums over (a, b) of x [n, a, b] with w [b, o, a]
        return lax.dot_general(x, p["w"], (((2, 1), (0, 2)), ((), ())))

    return one(forward, weight(0, 6, 10, 4, fan_in=24), normal(1, 9, 4, 6))


def reshaped_weight() -> Specimen:
    def forward(p, x):
        return x @ p["w"].reshape(16, 24)

    return one(forward, weight(0, 16, 4, 6, fan_in=16), normal(1, 5, 16))


def conv1d() -> Specimen:
    def forward(p, x):
        y = lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return y + p["b"][None, None]

    params = {"w": weight(0, 3, 8, 6, fan_in=24), "b": normal(2, 6)}
    return Specimen(forward, params, (normal(1, 2, 10, 8),), frozenset({"w"}))


def conv2d_nhwc() -> Specimen:
    def forward(p, x):
        return lax.conv_general_dilated(x, p["w"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    return one(forward, weight(0, 3, 3, 4, 6, fan_in=36), normal(1, 2, 8, 8, 4))


def conv2d_nchw() -> Specimen:
    def forward(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))

    return one(forward, weight(0, 6, 4, 3, 3, fan_in=36), normal(1, 2, 4, 8, 8))


def conv2d_grouped() -> Specimen:
    def forward(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    return one(forward, weight(0, 3, 3, 2, 6, fan_in=18), normal(1, 2, 6, 6, 4))


def embedding_take() -> Specimen:
    return one(lambda p, t: jnp.take(p["w"], t, axis=0), normal(0, 40, 16), tokens(1, 2, 5))


def embedding_indexing() -> Specimen:
    return one(lambda p, t: p["w"][t], normal(0, 40, 16), tokens(1, 2, 5))


def embedding_one_hot() -> Specimen:
    return one(lambda p, t: jax.nn.one_hot(t, 40) @ p["w"], normal(0, 40, 16), tokens(1, 2, 5))


def tied_embeddings() -> Specimen:
    def forward(p, t):
        return jax.nn.gelu(p["embed"][t] @ p["w"]) @ p["embed"].T

    params = {"embed": normal(0, 40, 16), "w": weight(2, 16, 16)}
    return Specimen(forward, params, (tokens(1, 2, 5),), frozenset({"embed", "w"}), bound=0.06)


def weight_used_twice() -> Specimen:
    return Specimen(
        lambda p, x: jax.nn.gelu(x @ p["w"]) @ p["w"],
        {"w": weight(0, 16, 16)},
        (normal(1, 5, 16),),
        frozenset({"w", "w#1"}),
    )


@jax.jit
def _helper(x, p):
    return jax.nn.gelu(linear(x, p))


def jitted_helper_twice() -> Specimen:
    params = {"a": linear_params(0, 16, 16), "b": linear_params(1, 16, 16)}
    return Specimen(
        lambda p, x: _helper(_helper(x, p["a"]), p["b"]),
        params,
        (normal(1, 5, 16),),
        frozenset({"a/kernel", "b/kernel"}),
    )


def nested_jit_with_static() -> Specimen:
    @partial(jax.jit, static_argnums=0)
    def outer(act, x, p):
        return act(_helper(x, p["a"])) @ p["b"]["kernel"]

    params = {"a": linear_params(0, 16, 16), "b": linear_params(1, 16, 16, bias=False)}
    return Specimen(
        lambda p, x: outer(jnp.tanh, x, p), params, (normal(1, 5, 16),), frozenset({"a/kernel", "b/kernel"})
    )


def vmapped_experts() -> Specimen:
    def expert(p, x):
        return linear(jax.nn.relu(linear(x, p["up"])), p["down"])

    params = {"experts": {"up": linear_params(0, 3, 16, 32), "down": linear_params(1, 3, 32, 16)}}
    return Specimen(
        lambda p, x: jax.vmap(expert)(p["experts"], x),
        params,
        (normal(1, 3, 7, 16),),
        frozenset({"experts/up/kernel", "experts/down/kernel"}),
    )


def vmapped_batch() -> Specimen:
    return one(lambda p, x: jax.vmap(lambda r: p["w"].T @ r)(x), weight(0, 16, 12), normal(1, 7, 16))


def ragged() -> Specimen:
    def forward(p, x, sizes):
        return lax.ragged_dot(x, p["w"], sizes)

    return one(forward, weight(0, 3, 16, 8), normal(1, 10, 16), jnp.array([4, 0, 6], jnp.int32))


def bfloat16() -> Specimen:
    params = {"w": weight(0, 32, 16).astype(jnp.bfloat16), "b": normal(2, 16, dtype=jnp.bfloat16)}
    x = normal(1, 5, 32, dtype=jnp.bfloat16)
    return Specimen(lambda p, x: x @ p["w"] + p["b"][None], params, (x,), frozenset({"w"}))


def converted_before_dot() -> Specimen:
    def forward(p, x):
        x = x.astype(jnp.bfloat16)
        y = jax.nn.gelu(x @ p["a"].astype(jnp.bfloat16))
        return (y @ p["b"].astype(jnp.bfloat16)).astype(jnp.float32)

    params = {"a": weight(0, 32, 16), "b": weight(1, 16, 16)}
    return Specimen(forward, params, (normal(1, 5, 32),), frozenset({"a", "b"}))


def accumulate_in_float32() -> Specimen:
    def forward(p, x):
        return lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    w = weight(0, 32, 16).astype(jnp.bfloat16)
    return one(forward, w, normal(1, 5, 32, dtype=jnp.bfloat16))


def lora() -> Specimen:
    def forward(p, x):
        return (x @ (p["w"] + p["a"] @ p["b"])) @ p["v"]

    params = {"w": weight(0, 16, 16), "a": weight(1, 16, 4), "b": weight(2, 4, 16), "v": weight(3, 16, 8)}
    rows = {"a, b": "both operands are parameters", "a, b, w": "computed from parameters (by add)"}
    return Specimen(forward, params, (normal(4, 5, 16),), frozenset({"v"}), rows)


def lora_beside() -> Specimen:
    def forward(p, x):
        return x @ p["w"] + (x @ p["a"]) @ p["b"]

    params = {"w": weight(0, 16, 16), "a": weight(1, 16, 4), "b": weight(2, 4, 16)}
    return Specimen(forward, params, (normal(4, 5, 16),), frozenset({"w", "a", "b"}))


def scaled_weight() -> Specimen:
    def forward(p, x):
        return (x @ (p["m"]["w"] * jnp.float32(0.25))) @ p["v"]

    params = {"m": {"w": weight(0, 16, 16)}, "v": weight(3, 16, 8)}
    return Specimen(
        forward, params, (normal(4, 5, 16),), frozenset({"v"}), {"m/w": "computed from parameters (by mul)"}
    )


def closed_over() -> Specimen:
    w = weight(0, 16, 16)
    return Specimen(
        lambda p, x: jnp.tanh(x @ w) @ p["v"],
        {"v": weight(1, 16, 8)},
        (normal(4, 5, 16),),
        frozenset({"v"}),
        {"(closed over)": "pass it in the params"},
    )


def closed_over_in_scan() -> Specimen:
    w = weight(0, 16, 16)

    def forward(p, x):
        x, _ = lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=2)
        return x @ p["v"]

    return Specimen(
        forward,
        {"v": weight(1, 16, 8)},
        (normal(4, 5, 16),),
        frozenset({"v"}),
        {"(closed over)": "pass it in the params"},
    )


def constant_activation() -> Specimen:
    def forward(p, x):
        positions = jnp.sin(jnp.arange(5, dtype=jnp.float32)[:, None] * jnp.arange(16, dtype=jnp.float32)[None])
        return (x + positions @ p["rel"]) @ p["v"]

    params = {"rel": weight(0, 16, 16), "v": weight(1, 16, 8)}
    return Specimen(forward, params, (normal(4, 5, 16),), frozenset({"v"}), {"rel": "constant"})


def integer_weight() -> Specimen:
    def forward(p, x):
        return (
            lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32).astype(jnp.float32)
            @ p["v"]
        )

    params = {"w": jnp.arange(32, dtype=jnp.int8).reshape(8, 4), "v": weight(1, 4, 8)}
    return Specimen(
        forward,
        params,
        (jnp.arange(24, dtype=jnp.int8).reshape(3, 8),),
        frozenset({"v"}),
        {"w": "int8, not a float"},
        differentiable=False,
    )


BARE = [
    matmul, transposed, vector, einsum_heads_in, einsum_heads_out, einsum_transposed_output, einsum_batched,
    param_on_the_left, permuted_contraction, reshaped_weight, conv1d, conv2d_nhwc, conv2d_nchw, conv2d_grouped,
    embedding_take, embedding_indexing, embedding_one_hot, tied_embeddings, weight_used_twice, jitted_helper_twice,
    nested_jit_with_static, vmapped_experts, vmapped_batch, ragged, bfloat16, converted_before_dot,
    accumulate_in_float32, lora, lora_beside, scaled_weight, closed_over, closed_over_in_scan, constant_activation,
    integer_weight,
]  # fmt: skip
