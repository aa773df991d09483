"""The arrays of a model: where they are, and what is wrong where they hold no numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class NotFinite(ValueError):
    """What a model computes holds NaN or infinity."""


def widened(params: Any) -> Any:
    """Half-precision leaves as float32, the others as they are."""
    return jax.tree.map(lambda a: jnp.asarray(a).astype(jnp.float32) if a.dtype in HALF else a, params)


def on_device(params: Any) -> Any:
    """Parameters that may be memory-mapped files as arrays of JAX, so that they are not copied at every call.

    Put and not converted: `jnp.asarray` compiles a program for each shape.
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf, params)
