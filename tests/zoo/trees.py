"""Parameters in every container, with leaves that are no weights; inputs and outputs in every shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from tests.zoo.specimen import Specimen, linear, linear_params, normal, weight


def lists_and_tuples() -> Specimen:
    def forward(p, x):
        for layer in p[0]:
            x = jnp.tanh(x @ layer[0] + layer[1][None])
        return x @ p[1]

    params = ([(weight(i, 16, 16), normal(i + 9, 16)) for i in range(2)], weight(5, 16, 8))
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"0/0/0", "0/1/0", "1"}))


def frozen_dict() -> Specimen:
    params = FrozenDict({"a": linear_params(0, 16, 16), "b": linear_params(1, 16, 8)})
    return Specimen(
        lambda p, x: linear(jnp.tanh(linear(x, p["a"])), p["b"]),
        params,
        (normal(1, 5, 16),),
        frozenset({"a/kernel", "b/kernel"}),
    )


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any = None


class Both(NamedTuple):
    first: Layer
    second: Layer


def dataclasses() -> Specimen:
    def forward(p, x):
        x = jnp.tanh(x @ p.first.kernel + p.first.bias[None])
        return x @ p.second.kernel

    params = Both(Layer(weight(0, 16, 16), normal(1, 16)), Layer(weight(2, 16, 8)))
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"first/kernel", "second/kernel"}))


def none_keys_and_counters() -> Specimen:
    """A PRNG key, a counter, a flag, a Python float and None beside the weights."""

    def forward(p, x):
        noise = jax.random.normal(p["key"], (1, 16)) * p["eps"]
        return (x + noise + p["step"].astype(jnp.float32)) @ p["w"]

    params = {
        "w": weight(0, 16, 8),
        "key": jax.random.key(3),
        "old_key": jax.random.PRNGKey(3),
        "step": jnp.int32(2),
        "flag": jnp.bool_(True),
        "eps": 0.01,
        "none": None,
    }
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"w"}), differentiable=False)


def numpy_leaves() -> Specimen:
    params = jax.tree.map(np.asarray, {"a": linear_params(0, 16, 16), "b": linear_params(1, 16, 8)})
    return Specimen(
        lambda p, x: linear(jnp.tanh(linear(x, p["a"])), p["b"]),
        params,
        (normal(1, 5, 16),),
        frozenset({"a/kernel", "b/kernel"}),
    )


def dict_inputs_many_outputs() -> Specimen:
    def forward(p, inputs):
        h = jnp.tanh(inputs["x"] @ p["w"])
        return {"h": h, "out": (h @ p["v"], inputs["scale"], None), "params": p["w"].shape[0]}

    params = {"w": weight(0, 16, 16), "v": weight(1, 16, 8)}
    inputs = {"x": normal(2, 5, 16), "scale": jnp.float32(2), "none": None}
    return Specimen(forward, params, (inputs,), frozenset("wv"), batches=((inputs,),))


def unused_and_returned() -> Specimen:
    """A parameter nobody reads, one that is an output itself, an input that is an output."""
    params = {"w": weight(0, 16, 8), "unused": normal(1, 3, 3), "table": normal(2, 4, 4)}
    return Specimen(lambda p, x: (x @ p["w"], p["table"], x), params, (normal(1, 5, 16),), frozenset({"w"}))


TREES = [
    lists_and_tuples, frozen_dict, dataclasses, none_keys_and_counters, numpy_leaves, dict_inputs_many_outputs,
    unused_and_returned,
]  # fmt: skip
