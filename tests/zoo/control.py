"""Models with control flow and custom derivatives."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tests.zoo.specimen import (
    Specimen,
    block,
    block_params,
    block_sites,
    linear,
    linear_params,
    norm,
    norm_params,
    normal,
    row,
    tokens,
    weight,
)  # fmt: skip


def scan_stacked() -> Specimen:
    def forward(p, x):
        return lax.scan(lambda x, layer: (x + jnp.tanh(linear(x, layer)), None), x, p["layers"])[0]

    return Specimen(forward, {"layers": linear_params(0, 3, 16, 16)}, (normal(1, 5, 16),), frozenset({"layers/kernel"}))


def scan_blocks() -> Specimen:
    """Pre-norm layers stacked under a scan, as MaxText has them."""

    def forward(p, t):
        x = lax.scan(lambda x, layer: (block(layer, x), None), p["embed"][t], p["layers"])[0]
        return norm(x, p["ln"]) @ p["head"]

    params = {
        "embed": normal(0, 40, 16),
        "layers": block_params(1, 16, 3),
        "ln": norm_params(2, 16),
        "head": weight(3, 16, 40),
    }
    return Specimen(
        forward, params, (tokens(4, 2, 6),), frozenset({"embed", "head", *block_sites("layers")}), bound=0.06
    )


def scan_reverse_with_outputs() -> Specimen:
    def forward(p, x):
        def body(x, layer):
            x = x + jnp.tanh(linear(x, layer))
            return x, x.sum(-1)

        return lax.scan(body, x, p["layers"], reverse=True)

    return Specimen(forward, {"layers": linear_params(0, 3, 16, 16)}, (normal(1, 5, 16),), frozenset({"layers/kernel"}))


def scan_nested() -> Specimen:
    def forward(p, x):
        def inner(x, w):
            return x + jnp.tanh(x @ w), None

        def outer(x, layer):
            x, _ = lax.scan(inner, x, layer["inner"])
            return jnp.tanh(linear(x, layer["outer"])), None

        return lax.scan(outer, x, p)[0]

    params = {"inner": weight(0, 2, 3, 16, 16), "outer": linear_params(1, 2, 16, 16)}
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"inner", "outer/kernel"}))


def scan_shared() -> Specimen:
    """An ALBERT: one weight in every iteration, beside stacked ones."""

    def forward(p, x):
        def body(x, w):
            return x + jnp.tanh(linear(x, p["shared"])) @ w, None

        return lax.scan(body, x, p["own"])[0]

    params = {"shared": linear_params(0, 16, 16), "own": weight(1, 3, 16, 16)}
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"shared/kernel", "own"}))


def scan_converted() -> Specimen:
    """The whole stack cast before the scan."""

    def forward(p, x):
        layers = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p["layers"])
        body = lambda x, layer: (x + jnp.tanh(linear(norm(x, layer["ln"]), layer["fc"])), None)  # noqa: E731
        return lax.scan(body, x.astype(jnp.bfloat16), layers)[0].astype(jnp.float32)

    params = {"layers": {"ln": norm_params(3, 2, 16), "fc": linear_params(0, 2, 16, 16)}}
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"layers/fc/kernel"}))


def scan_twice() -> Specimen:
    """The same stack walked through twice: every layer's weight has two inputs."""

    def forward(p, x):
        body = lambda x, w: (x + jnp.tanh(x @ w), None)  # noqa: E731
        x, _ = lax.scan(body, x, p["w"])
        return lax.scan(body, x * 3.0, p["w"])[0]

    return Specimen(forward, {"w": weight(0, 2, 16, 16)}, (normal(1, 5, 16),), frozenset({"w", "w#1"}))


def scan_weight_in_carry() -> Specimen:
    """A weight handed through the carry, unchanged."""

    def forward(p, x):
        def body(carry, _):
            x, w = carry
            return (x + jnp.tanh(x @ w), w), None

        return lax.scan(body, (x, p["w"]), length=2)[0][0]

    return Specimen(forward, {"w": weight(0, 16, 16)}, (normal(1, 5, 16),), frozenset({"w"}))


def scan_second_axis() -> Specimen:
    """Layers stacked along axis 1, beside others along axis 0 and the last: the scan sees transposed parameters."""

    def forward(p, x):
        def layer(x, own):
            first, (w, b), turned = own
            return x + jnp.tanh((jnp.tanh(x @ first) @ w + row(b, 2)) @ turned.T), None

        stacks = p["first"], (jnp.moveaxis(p["w"], 1, 0), p["b"].T), jnp.moveaxis(p["turned"], -1, 0)
        return lax.scan(layer, x, stacks)[0]

    params = {
        "first": weight(0, 3, 16, 12),
        "w": weight(1, 12, 3, 16, fan_in=12),
        "b": normal(2, 16, 3),
        "turned": weight(3, 16, 16, 3, fan_in=16),
    }
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"first", "w", "turned"}))


def scan_reshaped() -> Specimen:
    """A reshape merges the layers with others before the scan."""

    def forward(p, x):
        x, _ = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"].reshape(4, 16, 16))
        return x @ p["v"]

    params = {"w": weight(0, 2, 32, 16, fan_in=16), "v": weight(1, 16, 8)}
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"v"}), {"w": "a reshape merges"})


def fori_static() -> Specimen:
    def forward(p, x):
        return lax.fori_loop(0, 3, lambda i, x: x + jnp.tanh(x @ p["w"]), x)

    return Specimen(forward, {"w": weight(0, 16, 16)}, (normal(1, 5, 16),), frozenset({"w"}))


def fori_picked() -> Specimen:
    def forward(p, x):
        x = lax.fori_loop(0, 3, lambda i, x: x + jnp.tanh(x @ p["m"]["w"][i]), x)
        return x @ p["v"]

    params = {"m": {"w": weight(0, 3, 16, 16)}, "v": weight(1, 16, 8)}
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"v"}), {"m/w": "picked by a traced index"})


def picked_statically() -> Specimen:
    def forward(p, x):
        for i in range(2):
            x = x + jnp.tanh(x @ p["m"]["w"][i])
        return x @ p["v"]

    params = {"m": {"w": weight(0, 2, 16, 16)}, "v": weight(1, 16, 8)}
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"v"}), {"m/w": "computed from parameters"})


def conditional() -> Specimen:
    def forward(p, x, flag):
        return lax.cond(flag, lambda x: jnp.tanh(x @ p["a"]), lambda x: jax.nn.relu(x @ p["b"]), x) @ p["c"]

    params = {n: weight(i, 16, 16) for i, n in enumerate("abc")}
    x = normal(5, 5, 16)
    return Specimen(
        forward,
        params,
        (x, jnp.bool_(True)),
        frozenset("abc"),
        batches=((x, jnp.bool_(True)), (x * 0.5, jnp.bool_(False))),
    )


def conditional_shared() -> Specimen:
    """One weight in both branches, on inputs of very different size."""

    def forward(p, x, flag):
        return lax.cond(flag, lambda x: jnp.tanh(x @ p["w"]), lambda x: (x * 100.0) @ p["w"], x)

    x = normal(5, 5, 16)
    return Specimen(
        forward,
        {"w": weight(0, 16, 16)},
        (x, jnp.bool_(True)),
        frozenset({"w", "w#1"}),
        batches=((x, jnp.bool_(True)), (x, jnp.bool_(False))),
    )


def switch() -> Specimen:
    def forward(p, x, i):
        return lax.switch(i, [partial(lambda n, x: jnp.tanh(x @ p[n]), n) for n in "abc"], x)

    x = normal(5, 5, 16)
    return Specimen(
        forward,
        {n: weight(i, 16, 16) for i, n in enumerate("abc")},
        (x, jnp.int32(1)),
        frozenset("abc"),
        batches=tuple((x, jnp.int32(i)) for i in range(3)),
    )


def cond_in_scan() -> Specimen:
    """Layers of two kinds, chosen by the layer's number; branch statistics exist only where a layer takes them."""

    def forward(p, x):
        def body(x, layer):
            flag, w = layer
            return lax.cond(flag, lambda x: x + jnp.tanh(x @ w), lambda x: x - jnp.tanh(x @ w), x), None

        return lax.scan(body, x, (jnp.arange(4) % 2 == 0, p["w"]))[0] @ p["v"]

    params = {"w": weight(0, 4, 16, 16), "v": weight(1, 16, 8)}
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"w", "w#1", "v"}))


@jax.custom_vjp
def _straight(x, w):
    return jnp.tanh(x @ w)


_straight.defvjp(lambda x, w: (_straight(x, w), (x, w)), lambda r, g: (g @ r[1].T, 2.0 * (r[0].T @ g)))


@jax.custom_jvp
def _forward_rule(x, w):
    return jnp.tanh(x @ w)


_forward_rule.defjvp(lambda p, t: (_forward_rule(*p), 3.0 * (t[0] @ p[1]) + p[0] @ t[1]))


def custom_vjp() -> Specimen:
    params = {"a": weight(0, 16, 16), "b": weight(1, 16, 16)}
    return Specimen(lambda p, x: _straight(x, p["a"]) @ p["b"], params, (normal(1, 5, 16),), frozenset("ab"))


def custom_jvp() -> Specimen:
    params = {"a": weight(0, 16, 16), "b": weight(1, 16, 16)}
    return Specimen(lambda p, x: _forward_rule(x, p["a"]) @ p["b"], params, (normal(1, 5, 16),), frozenset("ab"))


def checkpointed() -> Specimen:
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def layer(x, p):
        return x + jnp.tanh(linear(x, p))

    params = [linear_params(0, 16, 16), linear_params(1, 16, 16)]
    return Specimen(
        lambda p, x: layer(layer(x, p[0]), p[1]), params, (normal(1, 5, 16),), frozenset({"0/kernel", "1/kernel"})
    )


def scan_of_checkpoint() -> Specimen:
    @jax.checkpoint
    def layer(x, p):
        return x + jnp.tanh(linear(x, p)), None

    return Specimen(
        lambda p, x: lax.scan(layer, x, p)[0], linear_params(0, 3, 16, 16), (normal(1, 5, 16),), frozenset({"kernel"})
    )


def sharded() -> Specimen:
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec()

    def forward(p, x):
        inner = jax.shard_map(lambda x, w: jnp.tanh(x @ w), mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        return inner(x, p["w"]) @ p["v"]

    params = {"w": weight(0, 16, 16), "v": weight(1, 16, 8)}
    return Specimen(forward, params, (normal(1, 5, 16),), frozenset({"v"}), {"w": "inside shard_map"})


CONTROL = [
    scan_stacked, scan_blocks, scan_reverse_with_outputs, scan_nested, scan_shared, scan_converted, scan_twice,
    scan_weight_in_carry, scan_second_axis, scan_reshaped, fori_static, fori_picked, picked_statically, conditional,
    conditional_shared, switch, custom_vjp, custom_jvp, checkpointed, scan_of_checkpoint, sharded,
]  # fmt: skip
