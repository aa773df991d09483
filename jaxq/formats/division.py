"""Division as IEEE has it, whatever XLA is compiling."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, correctly rounded in every context; equal ranks.

    XLA turns a division by a broadcast or constant into a multiplication by the reciprocal, and `(a / b) / c` into
    `a / (b * c)`, depending on what it is compiled with. That moves values across rounding ties, so that the codes of
    the same `x` would differ between eager and jit, or between a scale and its repetition. Operands that are selected
    elementwise are left alone.
    """
    return jnp.where(b == b, a, b) / jnp.where(a == a, b, jnp.ones_like(b))
