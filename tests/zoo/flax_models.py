"""Untouched Flax models, Linen and NNX."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen, nnx

from tests.zoo.specimen import Specimen, normal, tokens


def flat(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, **_) -> jax.Array:
    """Draws on one axis: the usual initializers' are in the kernel's own shape, which is slow to compile, and anew."""
    drawn = jax.random.normal(key, (4096,))[: math.prod(shape)].reshape(shape)
    return (drawn * math.prod(shape[:-1]) ** -0.5).astype(dtype)


class NnxBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs, dropout: bool = True):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        if dropout:
            self.drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        h = self.down(nnx.gelu(self.up(x)))
        return x + (self.drop(h) if hasattr(self, "drop") else h)


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(40, 16, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(16, rngs) for _ in range(2)])

    def __call__(self, t):
        x = self.embed(t)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


def nnx_transformer() -> Specimen:
    graph, state = nnx.split(NnxModel(nnx.Rngs(0)))
    names = [f"attention/{n}/kernel" for n in ("query", "key", "value", "out")]
    names += ["attention/dot0", "attention/dot1", "up/kernel", "down/kernel"]
    sites = {f"blocks/{i}/{n}" for i in range(2) for n in names} | {"embed/embedding"}
    return Specimen(
        lambda p, t: nnx.merge(graph, p)(t),
        state,
        (tokens(1, 2, 6),),
        frozenset(sites),
        bound=0.06,
        differentiable=False,
    )


def nnx_params_only() -> Specimen:
    """The parameters alone; other state stays with the graph."""
    graph, params, rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)
    found = nnx_transformer()
    return Specimen(lambda p, t: nnx.merge(graph, p, rest)(t), params, found.inputs, found.sites, bound=0.06)


class NnxStack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return NnxBlock(16, rngs, dropout=False)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x)

        return forward(x, self.blocks)


def nnx_scan() -> Specimen:
    graph, state = nnx.split(NnxStack(nnx.Rngs(0)))
    names = [f"attention/{n}/kernel" for n in ("query", "key", "value", "out")]
    names += ["attention/dot0", "attention/dot1", "up/kernel", "down/kernel"]
    return Specimen(
        lambda p, x: nnx.merge(graph, p)(x),
        state,
        (normal(1, 2, 6, 16),),
        frozenset(f"blocks/{n}" for n in names),
        bound=0.06,
    )


class NnxConv(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), kernel_init=flat, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.general = nnx.LinearGeneral((4, 8), 6, axis=(-2, -1), kernel_init=flat, rngs=rngs)
        self.einsum = nnx.Einsum("bc,cd->bd", (6, 5), (5,), kernel_init=flat, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.einsum(self.general(x.mean(1)))


def nnx_conv() -> Specimen:
    graph, params, rest = nnx.split(NnxConv(nnx.Rngs(0)), nnx.Param, ...)
    return Specimen(
        lambda p, x: nnx.merge(graph, p, rest)(x),
        params,
        (normal(1, 2, 4, 4, 3),),
        frozenset({"conv/kernel", "general/kernel", "einsum/kernel"}),
    )


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        h = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, deterministic=True)(h)
        h = linen.gelu(linen.Dense(32)(x))
        return x + linen.DenseGeneral(16, axis=-1)(h), None


LINEN_SITES = frozenset(
    [f"MultiHeadDotProductAttention_0/{n}/kernel" for n in ("query", "key", "value", "out")]
    + [f"MultiHeadDotProductAttention_0/dot{i}" for i in range(2)]
    + ["Dense_0/kernel", "DenseGeneral_0/kernel"]
)


class LinenStack(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x):
        if self.kind == "scan":
            return linen.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, length=3)(name="b")(x, None)[0]
        if self.kind == "remat_scan":
            block = linen.remat(LinenBlock, prevent_cse=False)
            return linen.scan(block, {"params": 1}, split_rngs={"params": True}, length=3)(name="b")(x, None)[0]
        block = linen.remat(LinenBlock) if self.kind == "remat" else LinenBlock
        return block(name="b")(x)[0]


def _linen(kind: str) -> Specimen:
    model, x = LinenStack(kind), normal(1, 2, 6, 16)
    params = model.init(jax.random.key(0), x)
    return Specimen(model.apply, params, (x,), frozenset(f"params/b/{s}" for s in LINEN_SITES), bound=0.06)


def linen_block() -> Specimen:
    return _linen("plain")


def linen_remat() -> Specimen:
    return _linen("remat")


def linen_scan() -> Specimen:
    return _linen("scan")


def linen_remat_scan() -> Specimen:
    """Layers along axis 1, as MaxText has them."""
    return _linen("remat_scan")


class LinenMixed(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Conv(8, (3,), dtype=jnp.bfloat16, kernel_init=flat)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.RMSNorm()(linen.relu(x).astype(jnp.float32))
        q, k, v = (linen.Dense(8, dtype=jnp.bfloat16, kernel_init=flat, name=n)(x) for n in "qkv")
        return linen.Dense(4, kernel_init=flat)((q * k + v).astype(jnp.float32))


def linen_mixed() -> Specimen:
    """Convolution, running statistics beside the parameters, bfloat16 compute on float32 parameters."""
    model, x = LinenMixed(), normal(1, 2, 6, 5)
    params = jax.jit(model.init)(jax.random.key(0), x)
    sites = {f"params/{n}/kernel" for n in ("Conv_0", "q", "k", "v", "Dense_0")}
    return Specimen(model.apply, params, (x,), frozenset(sites), bound=0.06)


FLAX = [
    nnx_transformer, nnx_params_only, nnx_scan, nnx_conv, linen_block, linen_remat, linen_scan, linen_remat_scan,
    linen_mixed,
]  # fmt: skip
