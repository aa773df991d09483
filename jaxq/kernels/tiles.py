"""What the TPU's products with packed weights share: their blocks, and codes that become carriers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxq.kernels.carrier import Carrier, without_negative_zeros
from jaxq.kernels.layout import fits

SMALLEST_GROUP = 16
W_BYTES = 1 << 20  # a block of packed weights; it, as one of x, is in fast memory twice
VMEM = 48 << 20  # the rest is for what other operations leave there


class Tile(NamedTuple):
    """What one step multiplies: rows of x, channels of the sum, and columns of the weight."""

    rows: int
    depth: int
    columns: int


def tiled(
    kernel: Callable,
    meaning: Callable,
    operands: Any,
    carrier: Carrier,
    tile: Tile,
    *,
    dtype: Any,
    name: str,
    interpret: Any,
) -> jax.Array:
    """A product [M, K] x [K, N] of `dtype` in one kernel.

    Args:
        kernel: of a dict of references, one for each operand that there is, of the result's, of one for sums, float32,
            if a step has not all of K, and of the carrier.
        meaning: the product in plain jnp, of the operands and the carrier, for its shape and its mesh.
        operands: a NamedTuple of x [M, K], w [K or K/2, N], scale [G, N] and, each possibly None, center [G, N],
            rows [M, 1] and, where a step has all of K, left [R, M, G] and right [R, G, N].

    Raises:
        ValueError: the shapes do not fit each other, or K is not of whole blocks of 256 in groups of 16, 32, 64 or a
            multiple of 128: there the plain meaning serves.
    """
    given = {field: a for field, a in operands._asdict().items() if a is not None}
    x, w, scale = given["x"], given["w"], given["scale"]
    (m, k), n = x.shape, w.shape[1]
    _check(x, w, scale, packed=bool(carrier.fields))
    steps = k // tile.depth

    def spec(field: str, a: jax.Array) -> pl.BlockSpec:
        if field == "x":
            return pl.BlockSpec((tile.rows, tile.depth), lambda i, j, s: (i, s))
        if field == "rows":
            return pl.BlockSpec((tile.rows, 1), lambda i, j, s: (i, 0))
        if field == "left":
            return pl.BlockSpec((a.shape[0], tile.rows, a.shape[2]), lambda i, j, s: (0, i, 0))
        if field == "right":
            return pl.BlockSpec((*a.shape[:2], tile.columns), lambda i, j, s: (0, 0, j))
        return pl.BlockSpec((a.shape[0] // steps, tile.columns), lambda i, j, s: (s, j))

    blocks = -(-m // tile.rows), -(-n // tile.columns)
    again = w.nbytes * (blocks[0] - 1) + (x.nbytes * (blocks[1] - 1) if steps > 1 else 0)
    moved = sum(a.nbytes for a in given.values()) + again + m * n * jnp.dtype(dtype).itemsize
    return pl.pallas_call(
        partial(kernel, carrier=carrier),
        grid=(*blocks, steps),
        in_specs=[{field: spec(field, a) for field, a in given.items()}],
        out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda i, j, s: (i, j)),
        out_shape=jax.eval_shape(partial(meaning, carrier=carrier, dtype=dtype), operands),
        scratch_shapes=[pltpu.VMEM((tile.rows, tile.columns), jnp.float32)] * (steps > 1),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=2 * m * k * n, transcendentals=0, bytes_accessed=moved),
        name=name,
        interpret=interpret,
    )(given)


def whole_depth(m: int, k: int, n: int, most: int) -> Tile:
    """A step over all of K: as many columns as the bytes above allow, and rows of x up to `most` numbers; all rows when
    tokens are decoded, so that weights are read once."""
    rows = max(most // k // 32 * 32, 32)
    columns = max(2 * W_BYTES // k // 256 * 256, 256)
    return Tile(min(-(-m // 8) * 8, rows, 512), k, min(n, columns))


def carriers(w: Any, carrier: Carrier) -> tuple[jax.Array, ...]:
    """The carriers of a block's low and of its high nibbles, [K/2, N] each; of weights of 8 bits all, [K, N]."""
    if w.dtype == jnp.int8:
        return (w[...].astype(carrier.dtype),)
    words = pltpu.bitcast(w[...], jnp.int32)
    if carrier.fields:
        return tuple(pltpu.bitcast(half, carrier.dtype) for half in carrier.halves(words))
    own = carrier.dtype != jnp.float8_e4m3b11fnuz
    return (pltpu.bitcast(words if own else without_negative_zeros(words), carrier.dtype),)


def _check(x: jax.Array, w: jax.Array, scale: jax.Array, packed: bool) -> None:
    k, groups = x.shape[1], scale.shape[0]
    if k != w.shape[0] * (1 + packed) or scale.shape[1] != w.shape[1]:
        raise ValueError(f"x {x.shape}, packed weights {w.shape} and scales {scale.shape} do not fit each other")
    if not fits(k, groups, SMALLEST_GROUP):
        raise ValueError(
            f"{k} channels in {groups} groups: the kernel takes whole blocks of 256 in groups of 16, 32, 64 or a "
            "multiple of 128; plain_packed_matmul takes any"
        )
