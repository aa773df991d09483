"""Scales of blocks: repeated over what they scale, and as bytes, by their bits: not every backend has types for them.

| scales         | stored  | what a byte stands for                      | no number |
|----------------|---------|---------------------------------------------|-----------|
| "real"         | float32 |                                             |           |
| "power_of_two" | E8M0    | 2**(byte - 127)                             | 255       |
| "e4m3"         | E4M3    | what a code of `Float(4, 3, reserved=1)` is | 127       |

Scales are positive: E4M3's bytes from 128 on stand for none here.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxq.formats import floating
from jaxq.formats.floating import Float

Scales = Literal["real", "power_of_two", "e4m3"]

E4M3 = Float(4, 3, reserved=1)


def expand_blocks(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats each axis of `a` that is neither 1 nor full, so that `a` broadcasts against `shape`."""
    if a.ndim != len(shape):
        a = a.reshape((1,) * (len(shape) - a.ndim) + a.shape)
    for axis, (have, want) in enumerate(zip(a.shape, shape)):
        if have not in (1, want):
            runs = (*a.shape[: axis + 1], want // have, *a.shape[axis + 1 :])
            a = jnp.broadcast_to(jnp.expand_dims(a, axis + 1), runs)  # not jnp.repeat, which XLA makes a gather of
            a = a.reshape(*runs[:axis], want, *runs[axis + 2 :])
    return a


def to_bytes(scales: Scales, scale: jax.Array) -> jax.Array:
    """Normal float32 numbers that are such scales, of any shape, as they are stored: uint8 unless they are real."""
    if scales == "real":
        return scale
    if scales == "e4m3":
        return floating.encode(E4M3, scale, jnp.ones((1,) * scale.ndim, jnp.float32), None)
    return jnp.right_shift(jax.lax.bitcast_convert_type(scale, jnp.int32), 23).astype(jnp.uint8)


def from_bytes(scales: Scales, stored: jax.Array) -> jax.Array:
    """The float32 numbers that are stored, of any shape; NaN where a byte stands for no number."""
    if scales == "real":
        return stored
    bits = stored.astype(jnp.int32)
    if scales == "power_of_two":
        special = (bits == 0) | (bits == 255)  # 2**-127 is subnormal; NaN in place of infinity
        quiet = jnp.where(special, jnp.int32(1 << 22), jnp.int32(0))
        return jax.lax.bitcast_convert_type(jnp.left_shift(bits, 23) | quiet, jnp.float32)
    tiny = bits < 8  # E4M3's subnormal numbers: as (1 + k/8) * 2**-6, and 2**-6 taken off
    raised = jnp.left_shift(bits, 20) + jnp.where(tiny, jnp.int32(121 << 23), jnp.int32(120 << 23))
    number = jax.lax.bitcast_convert_type(raised, jnp.float32) - jnp.where(tiny, jnp.float32(2**-6), jnp.float32(0))
    return jnp.where(bits < 127, number, jnp.float32(jnp.nan))
