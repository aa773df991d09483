"""Products of many tokens with packed weights in groups on the TPU: decoded in the kernel, multiplied in bfloat16.

Scaling each group's sum, as `jaxq.kernels.packed_matmul` does, takes a pass over the result for every group. Here the
weights are scaled, once for each block of tokens, and rounded to bfloat16: what a program in bfloat16 makes of a
quantized weight, too. With c[k, n] the carriers of the codes and g the group of k:

    y[m, n] = rows[m] * sum_k x[m, k] bfloat16(scale[g, n] * (c[k, n] / unit - center[g, n]))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxq.kernels.carrier import Carrier
from jaxq.kernels.layout import BLOCK, HALF
from jaxq.kernels.tiles import Tile, carriers, tiled, whole_depth

WHOLE, DEPTH = 13824, 4096  # channels that a step has at most: all of them, or a part
MOST = 5 << 20  # numbers of a block of x with all of them


class Scaled(NamedTuple):
    """Operands of a product [M, K] x [K, N], with G groups of K/G successive channels.

    x: [M, K] bfloat16.
    w: packed 4-bit codes, uint8 [K/2, N], as in `jaxq.kernels.layout`; or of 8 bits [K, N]: int8, or the codes of
        a machine's floats, uint8.
    scale: [G, N] float32.
    center: [G, N] float32; None is 0.
    rows: [M, 1] float32, the activation's scales; None is 1.
    """

    x: jax.Array
    w: jax.Array
    scale: jax.Array
    center: jax.Array | None = None
    rows: jax.Array | None = None


def decoded_matmul(
    operands: Scaled, carrier: Carrier, *, dtype: Any = jnp.float32, interpret: Any = False
) -> jax.Array:
    """The product above as one kernel; `plain_decoded_matmul` is its meaning.

    Args:
        carrier: what the codes become first.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: as `jaxq.kernels.tiles.tiled`, or there is no `tile_of` these shapes.
    """
    (m, k), (groups, n) = operands.x.shape, operands.scale.shape
    tile, name = tile_of(m, k, groups, n), "jaxq_decoded_matmul"
    if tile is None:
        raise ValueError(f"{k} channels in {groups} groups: beyond {WHOLE} blocks of 8 groups are to divide them")
    return tiled(_kernel, plain_decoded_matmul, operands, carrier, tile, dtype=dtype, name=name, interpret=interpret)


def tile_of(m: int, k: int, groups: int, n: int) -> Tile | None:
    """Many rows for each decoding: so beyond `WHOLE` channels only some of them for a step, and many columns, for each
    of which x is read again; None where blocks of 8 groups do not divide those channels."""
    if k <= WHOLE:
        return whole_depth(m, k, n, MOST)
    unit = 8 * max(k // groups, BLOCK // 8)
    if k % unit:
        return None
    depth = max(d for d in range(unit, max(unit, DEPTH) + 1, unit) if k % d == 0)
    return Tile(min(-(-m // 8) * 8, 512), depth, min(n, 1024))


def _kernel(refs: dict, out: Any, *sums: Any, carrier: Carrier) -> None:
    y = jnp.dot(refs["x"][...], _weights(refs, carrier), preferred_element_type=jnp.float32)
    if not sums:
        _finish(refs, out, y)
        return
    (total,), step = sums, pl.program_id(2)
    total[...] = jnp.where(step == 0, jnp.float32(0), total[...]) + y

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        _finish(refs, out, total[...])


def _finish(refs: dict, out: Any, y: jax.Array) -> None:
    out[...] = (y * refs["rows"][...] if "rows" in refs else y).astype(out.dtype)


def _weights(refs: dict, carrier: Carrier) -> jax.Array:
    """The block's weights, bfloat16 [K, N]."""
    halves, k = carriers(refs["w"], carrier), refs["x"].shape[1]
    scale = refs["scale"][...] * jnp.float32(1 / carrier.unit)  # exact, the unit being a power of two
    center = refs["center"][...] * jnp.float32(carrier.unit) if "center" in refs else None
    size = k // scale.shape[0]
    weights = []
    for start in range(0, k, min(size, HALF)):
        run, inside = divmod(start, HALF)
        block, half = divmod(run, len(halves))
        g, at = start // size, HALF * block + inside
        values = halves[half][at : at + min(size, HALF)].astype(jnp.float32)
        values = values if center is None else values - center[g : g + 1, :]
        weights.append((values * scale[g : g + 1, :]).astype(jnp.bfloat16))
    return jnp.concatenate(weights, 0)


def plain_decoded_matmul(operands: Scaled, carrier: Carrier, *, dtype: Any = jnp.float32) -> jax.Array:
    """What `decoded_matmul` means, in plain jnp, for any K and any size of groups that divides it."""
    x, w, scale, center, rows = operands
    c = carrier.of_packed(w, x.shape[1]) if carrier.fields else carrier.of_numbers(w)
    values = c.astype(jnp.float32).reshape(scale.shape[0], -1, c.shape[1]) * jnp.float32(1 / carrier.unit)
    values = values if center is None else values - center[:, None, :]
    weights = (values * scale[:, None, :]).astype(jnp.bfloat16).reshape(c.shape)
    y = jnp.dot(x, weights, preferred_element_type=jnp.float32)
    return (y if rows is None else y * rows).astype(dtype)
