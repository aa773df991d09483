"""Products of an activation with packed weights on the TPU, and what they mean in plain jnp.

One kernel for all of them. With c[k, n] the carriers of the weight's codes and groups g of the summed axis:

    y[m, n] = rows[m] * sum_g scale[g, n] * (sum_{k in g} x[m, k] c[k, n] / unit - sum_r left[r, m, g] right[r, g, n])

| x        | weights          | carrier    | product        |                                                       |
|----------|------------------|------------|----------------|-------------------------------------------------------|
| int8     | integers         | int8       | int32, exact   | W4A8, and W4A4 of integers                            |
| bfloat16 | integers, floats | e4m3, e5m2 | float32        | W4A16                                                 |
| bfloat16 | floats           | e5m2       | float32, exact | W4A4 of floats: x holds elements times powers of two  |
| e4m3fn   | floats           | e4m3fn     | float32, exact | the same, where the machine multiplies e4m3fn         |

and of weights of 8 bits:

| x        | weights          | carrier            | product      |                                                 |
|----------|------------------|--------------------|--------------|-------------------------------------------------|
| int8     | int8             | int8               | int32, exact | W8A8                                            |
| bfloat16 | int8             | bfloat16           | float32      | W8A16                                           |
| bfloat16 | e4m3fn, e5m2     | the machine's own  | float32      | FP8 with 16 bits, or with FP8                   |
| e4m3fn   | e4m3fn           | e4m3fn             | float32      | FP8 with FP8, where the machine multiplies both |

Zero points are the corrections `left * right`: an activation's times the weight's column sums, a weight's (with the
carrier's offset) times the activation's row sums. LLM-FP4's elements, times powers of two for the weights' exponents,
are small integers in units of the smallest one: any order of summation gives the same float32 while the sum stays below
2**24 units, for E2M1 with exponents 0 to 3 whenever K <= 14563.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxq.kernels.carrier import Carrier
from jaxq.kernels.layout import HALF
from jaxq.kernels.tiles import carriers, tiled, whole_depth

X_BYTES = 4 << 20  # a block of x


class Operands(NamedTuple):
    """Of a product [M, K] x [K, N], with G groups of K/G successive channels; 1 is per channel.

    x: [M, K] int8, bfloat16 or an 8-bit float.
    w: packed 4-bit codes, uint8 [K/2, N], as in `jaxq.kernels.layout`; or of 8 bits [K, N]: int8, or the codes of
        a machine's floats, uint8.
    scale: [G, N] float32.
    rows: [M, 1] float32, the activation's scales; None is 1.
    left, right: [R, M, G] and [R, G, N], int32 where x is int8, else float32; None is no correction.
    """

    x: jax.Array
    w: jax.Array
    scale: jax.Array
    rows: jax.Array | None = None
    left: jax.Array | None = None
    right: jax.Array | None = None


def packed_matmul(
    operands: Operands, carrier: Carrier, *, dtype: Any = jnp.float32, interpret: Any = False
) -> jax.Array:
    """The product above as one kernel. `plain_packed_matmul` is its meaning: the same integers, before they are scaled.

    Args:
        carrier: what the weights become.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: as `jaxq.kernels.tiles.tiled`.
    """
    (m, k), n = operands.x.shape, operands.w.shape[1]
    tile, name = whole_depth(m, k, n, X_BYTES // operands.x.dtype.itemsize), "jaxq_packed_matmul"
    return tiled(_kernel, plain_packed_matmul, operands, carrier, tile, dtype=dtype, name=name, interpret=interpret)


def _kernel(refs: dict, out: Any, *, carrier: Carrier) -> None:
    small = refs["x"].shape[1] // refs["scale"].shape[0] < HALF
    weights = carriers(refs["w"], carrier)
    total = (_small_groups if small else _groups)(refs, weights, carrier)
    if "rows" in refs:
        total = total * refs["rows"][...]
    out[...] = jnp.asarray(total).astype(out.dtype)


def _groups(refs: dict, weights: tuple[jax.Array, ...], carrier: Carrier) -> jax.Array:
    groups = refs["scale"].shape[0]
    size = refs["x"].shape[1] // groups
    scale = refs["scale"][...] * jnp.float32(1 / carrier.unit)  # exact, the unit being a power of two
    total = jnp.float32(0)
    for g in range(groups):
        a, b = _slices(refs["x"], weights, g * size, size)
        total = total + _corrected(_dot(a, b), refs, carrier, slice(g, g + 1)) * scale[g : g + 1, :]
    return jnp.asarray(total)


def _small_groups(refs: dict, weights: tuple[jax.Array, ...], carrier: Carrier) -> jax.Array:
    """Groups that a run of 128 channels consists of. The matrix unit, which holds a run of weights, is given x once for
    each of its groups, the other groups' channels being 0: the weights are pushed once and never scaled."""
    x, scale = refs["x"], refs["scale"][...]
    (rows, k), parts = x.shape, HALF * scale.shape[0] // x.shape[1]
    member = jax.lax.broadcasted_iota(jnp.int32, (rows, HALF), 1) >> (HALF // parts).bit_length() - 1
    total = jnp.zeros((rows, scale.shape[1]), jnp.float32)
    for run in range(k // HALF):
        a, b = _slices(x, weights, HALF * run, HALF)
        alone = jnp.concatenate([jnp.where(member == part, a.astype(jnp.float32), 0) for part in range(parts)], 0)
        sums = _dot(alone.astype(x.dtype), b).astype(jnp.float32)
        for part in range(parts):
            g = run * parts + part
            total = total + sums[rows * part : rows * (part + 1)] * scale[g : g + 1, :]
    total = total * jnp.float32(1 / carrier.unit)
    for r in range(refs["left"].shape[0] if "left" in refs else 0):
        left, right = refs["left"][r].astype(jnp.float32), refs["right"][r].astype(jnp.float32) * scale
        total = total - jnp.dot(left, right, precision="highest", preferred_element_type=jnp.float32)
    return total


def _slices(x: Any, weights: tuple[jax.Array, ...], start: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The channels from `start` of both, in one order: of packed codes first the low nibbles' runs of 128."""
    if len(weights) == 1:
        return x[:, start : start + size], weights[0][start : start + size]
    first, last = start // HALF, (start + size) // HALF
    runs = [*range(first + first % 2, last, 2), *range(first + 1 - first % 2, last, 2)]
    a = [x[:, HALF * run : HALF * (run + 1)] for run in runs]
    b = [half[HALF * ((first + 1 - odd) // 2) : HALF * ((last + 1 - odd) // 2)] for odd, half in enumerate(weights)]
    return jnp.concatenate(a, 1), jnp.concatenate([part for part in b if part.shape[0]], 0)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=kind)


def _corrected(part: jax.Array, refs: dict, carrier: Carrier, group: slice) -> jax.Array:
    """The sum less its corrections, all times the unit."""
    for r in range(refs["left"].shape[0] if "left" in refs else 0):
        right = refs["right"][r, group, :]
        part = part - refs["left"][r, :, group] * (right * jnp.asarray(carrier.unit, right.dtype))
    return part.astype(jnp.float32)


def plain_packed_matmul(operands: Operands, carrier: Carrier, *, dtype: Any = jnp.float32) -> jax.Array:
    """What `packed_matmul` means, in plain jnp, for any K and any size of groups that divides it."""
    x, w, scale, rows, left, right = operands
    c = carrier.of_packed(w, x.shape[1]) if carrier.fields else carrier.of_numbers(w)
    groups = scale.shape[0]
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    a, b = x.reshape(x.shape[0], groups, -1), c.reshape(groups, -1, c.shape[1])
    part = jnp.einsum("mgk,gkn->gmn", a.astype(kind), b.astype(kind), precision="highest")
    part = part >> int(carrier.unit).bit_length() - 1 if kind == jnp.int32 else part * jnp.float32(1 / carrier.unit)
    if left is not None and right is not None:
        part = part - jnp.einsum("rmg,rgn->gmn", left, right, precision="highest")
    total = (part.astype(jnp.float32) * scale[:, None, :]).sum(0)
    return (total if rows is None else total * rows).astype(dtype)
