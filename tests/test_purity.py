"""Law 5: nothing that jaxq does changes what any other function computes."""

from __future__ import annotations

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from tests.zoo.specimen import linear, linear_params, normal


@jax.jit
def shared_helper(x, p):
    return jax.nn.relu(linear(x, p))


@jax.custom_jvp
def ruled(x):
    return jnp.tanh(x)


ruled.defjvp(lambda p, t: (ruled(*p), t[0] * (1 - jnp.square(jnp.tanh(p[0])))))


def make():
    """A function and an unrelated one that share a jitted helper, and plain `x @ w` of the same shapes."""

    def f(p, x):
        return ruled(shared_helper(x, p["a"])) @ p["b"]["kernel"]

    def g(p, x):
        return shared_helper(x, p["a"]) + x @ p["b"]["kernel"]

    params = {"a": linear_params(0, 16, 16), "b": linear_params(1, 16, 16, bias=False)}
    return f, g, params, normal(2, 5, 16)


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


ORDERS = list(permutations(["float", "quantized", "other"]))


@pytest.mark.parametrize(
    ("compiled", "order"),
    [
        *((False, order) for order in ORDERS),
        # Compiled, one order for each that is first.
        *(pytest.param(True, order, marks=pytest.mark.slow if i % 2 else ()) for i, order in enumerate(ORDERS)),
    ],
    ids=lambda part: "-".join(part) if isinstance(part, tuple) else "jit" if part else "eager",
)
def test_no_order_of_calls_changes_a_result(order, compiled):
    jax.clear_caches()
    f, g, params, x = make()
    wrap = jax.jit if compiled else (lambda fun: fun)
    q = jaxq.calibrate(f, params, [x], jaxq.quantize())
    run = {
        "float": lambda: wrap(f)(params, x),
        "quantized": lambda: wrap(jaxq.execute(f))(q, x),
        "other": lambda: wrap(g)(params, x),
    }
    first = {name: bits(run[name]()) for name in order}
    again = {name: bits(run[name]()) for name in reversed(order)}
    jax.clear_caches()
    alone = {}
    for name in order:
        alone[name] = bits(run[name]())
        jax.clear_caches()
    assert first == again == alone
    assert first["float"] != first["quantized"]


def test_calibrating_leaves_parameters_and_functions_alone():
    f, g, params, x = make()
    copies = jax.tree.map(np.array, params)
    before = bits(f(params, x)), bits(g(params, x)), bits(jax.jit(f)(params, x))
    grads = jax.tree.map(np.asarray, jax.grad(lambda p: f(p, x).sum())(params))
    jaxq.calibrate(f, params, [x], jaxq.chain(jaxq.smooth_quant(where=lambda _: True), jaxq.quantize()))
    assert (bits(f(params, x)), bits(g(params, x)), bits(jax.jit(f)(params, x))) == before
    jax.tree.map(np.testing.assert_array_equal, params, copies)
    jax.tree.map(np.testing.assert_array_equal, jax.grad(lambda p: f(p, x).sum())(params), grads)


def test_derivative_rules_of_a_model_stay_in_force():
    """The rule is wrong on purpose: its gradient tells whether it was used."""

    @jax.custom_vjp
    def double(x):
        return x * 1.0

    double.defvjp(lambda x: (double(x), None), lambda _, g: (g * 7.0,))

    def f(p, x):
        return (double(x @ p["w"]) @ p["v"]).sum()

    params = {"w": normal(0, 4, 4), "v": normal(1, 4, 4)}
    x = normal(2, 3, 4)
    q = jaxq.calibrate(f, params, [x], jaxq.quantize())
    plain = jax.grad(f)(params, x)["w"]
    assert bits(jax.grad(jaxq.execute(f))(params, x)["w"]) == bits(plain)
    low = jax.grad(lambda x: jaxq.execute(f)(q, x))(x)
    high = jax.grad(lambda x: f(params, x))(x)
    np.testing.assert_allclose(low, high, rtol=0.1, atol=0.05 * float(jnp.abs(high).max()))
