"""The real numbers of a group as matrices, for searches of its output error."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.program.groups import Member
from jaxq.qtensor import pytree, static
from jaxq.quantizer import rows_of
from jaxq.steps.group import Group, tokens_of, weight_spread


@pytree
class Layer:
    """The real numbers of a group.

    Attributes:
      x: [batches, tokens, channels], float32.
      real: [batches, tokens], 0 for padding, else 1.
      ws: each weight [out, in], its inputs in the order of its leaf.
      reads: for each weight which channel of x each input reads, int32 [in]; None where it is the same order.
      products: whether outputs are products of the matrices x and w; else (convolutions, experts) only the size of the
        channels is known to matter.
    """

    x: jax.Array
    real: jax.Array
    ws: tuple[jax.Array, ...]
    reads: tuple[jax.Array | None, ...]
    products: bool = static()


def layer_of(group: Group, members: Sequence[Member]) -> Layer:
    """A group's activation and those weights of it that are still to be quantized."""
    x, real = tokens_by_channels(group)
    leaves = [group.weights[m.site.path].astype(jnp.float32) for m in members]
    ws = tuple(rows_of(leaf, m.site.leaf_axes) for leaf, m in zip(leaves, members, strict=True))
    reads = tuple(_reads(m, group) for m in members)
    plain = all(_is_product(m) and w.shape[1] == x.shape[2] for m, w in zip(members, ws, strict=True))
    return Layer(x, real, ws, reads, products=plain)


def input_of(group: Group) -> Layer:
    """A group's activation alone: what reads it is no weight."""
    return Layer(*tokens_by_channels(group), (), (), products=False)


def tokens_by_channels(group: Group) -> tuple[jax.Array, jax.Array]:
    """The group's input as [batches, tokens, channels], and which tokens are real."""
    pairs = [tokens_of(x, valid, (), group.plan.x_axes) for x, valid in zip(group.x, group.valid, strict=True)]
    real = [jnp.ones(x.shape[1], jnp.float32) if valid is None else valid.astype(jnp.float32) for x, valid in pairs]
    return jnp.concatenate([x for x, _ in pairs]), jnp.stack(real)


def _is_product(member: Member) -> bool:
    """A matrix product without batch axes, along which each weight would meet tokens of its own."""
    return member.site.kind == "linear" and not member.site.experts


def _reads(member: Member, group: Group) -> jax.Array | None:
    """Which channel each of a leaf's inputs reads."""
    axes, shape = member.site.leaf_axes, group.weights[member.site.path].shape
    count = prod(group.channels)
    if not member.site.operands.w_axes:  # a grouped convolution
        return jnp.zeros(prod(shape[i] for i in axes), jnp.int32)
    spread = weight_spread(member, jnp.arange(count, dtype=jnp.int32).reshape(group.channels))
    whole = jnp.broadcast_to(spread, [n if i in axes else spread.shape[i] for i, n in enumerate(shape)])
    order = rows_of(whole, axes)[0]
    return None if np.array_equal(order, np.arange(count)) else order
