"""Where the arrays of a model are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def on_device(params: Any) -> Any:
    """Parameters that may be memory-mapped files as arrays of JAX, so that they are not copied at every call."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, params)
