"""Matrix products of [M, K] and [K, N] by XLA."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.devices import on_accelerator, on_gpu
from jaxq.formats.integer import narrow

# From so many on GPUs' libraries are given what they multiply: 8-bit weights transposed, others as bfloat16. XLA's own
# products, which take weights as they are, took 1.4 to 2.1 times bfloat16's time for 2048 rows (H100, JAX 0.11.2); this
# number is an estimate from that and from what the passes over the weights should take.
ROWS_FOR_LIBRARIES = 512
# On CPU XLA's 8-bit products of few rows are slow if they sum over many channels, and faster in parts of up to 2048 (in
# `experiments/bench_packed.py --width 2048 --batch 1 --length 8` W8A8 takes 0.56 of float32's time, and 0.86 in whole
# products). The results of all parts are there at once: of more rows they would take over a quarter of the weight.
DEPTH, ROWS_IN_PARTS = 2048, 128


def dot(x: jax.Array, w: jax.Array, accumulate: Any = jnp.float32, precision: Any = None, k_axis: int = 0) -> jax.Array:
    """x [M, K] times w [K, N], or with `k_axis` 1 [N, K]."""
    dimensions = (((1,), (k_axis,)), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=accumulate)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def exact_dot(x: jax.Array, narrowed: jax.Array | None, w: jax.Array, k_axis: int) -> jax.Array:
    """x [M, K] of float32, whole numbers that fit int8 (`narrowed`, if they are there), times w of int8; differentiable
    by x.

    On CPU one row is padded to two, as XLA has fast 8-bit products of matrices there, none of vectors.
    """
    rows = x.shape[0]  # perhaps a symbol
    if k_axis == 0 and on_gpu() and rows >= ROWS_FOR_LIBRARIES:
        w, k_axis = lax.optimization_barrier(w.T), 1
    in_int32 = partial(dot, accumulate=jnp.int32, k_axis=k_axis)

    def at_once(x: jax.Array, w: jax.Array) -> jax.Array:
        return in_int32(x, w).astype(jnp.float32)

    def on_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 1), (0, 0))) if rows == 1 else x
        return (_in_parts if k_axis == 0 else in_int32)(x, w)[:rows].astype(jnp.float32)

    x = narrow(x, jnp.int8) if narrowed is None else narrowed
    few = isinstance(rows, int) and rows <= ROWS_IN_PARTS and not on_accelerator()
    return lax.platform_dependent(x, w, cpu=on_cpu, default=at_once) if few else at_once(x, w)


@exact_dot.defjvp
def _exact_dot_jvp(k_axis: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, narrowed, w = primals
    return exact_dot(x, narrowed, w, k_axis), dot(tangents[0], w.astype(jnp.float32), k_axis=k_axis)


def _in_parts(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, K] times w [K, N], of int8, in int32: as a batch of products of up to `DEPTH` channels."""
    k = x.shape[1]
    parts = next((n for n in range(-(-k // DEPTH), 17) if n and k % n == 0), 1)
    if parts == 1:
        return dot(x, w, jnp.int32)
    x, w = x.reshape(x.shape[0], parts, k // parts), w.reshape(parts, k // parts, w.shape[1])
    y = lax.dot_general(x, w, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32)
    return y.sum(0, dtype=jnp.int32)
