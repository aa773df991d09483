"""The error of a contraction's output as a quadratic form in one of its operands.

With Y = X W and quantized operands, the squared error of output channel o, summed over tokens, is a quadratic form in
that channel's weights: it costs the same for any number of tokens. So is the error of a token, summed over output
channels, in that token's activations. Both are stated in the quantization error e = v_hat - v, not in v_hat: all terms
are then as small as the error itself, and float32 suffices.

    E(v_hat) = e H e' - 2 e g + constant

    weights:      v = W[:, o],  H = X_hat' X_hat,  g = X_hat' (X - X_hat) W[:, o]
    activations:  v = X[t, :],  H = W_hat W_hat',  g = X[t, :] (W - W_hat) W_hat'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.qtensor import pytree


@pytree
class Problem:
    """Vectors to quantize, and what an error in them costs.

    Attributes:
      v: [blocks, rows, n]. Each row of a block has a grid of its own (weights per channel: one block; per group: a
        block for each group of input channels, priced as if the other groups were exact up to `gradient`), or all
        rows share one.
      hessian: [blocks, n, n], or its diagonal [blocks, n].
      gradient: [blocks, rows, n], or None for none.
      energy: [blocks, rows], the squared size of the outputs in full precision.
      real: [rows], 0 for rows that do not count (padding), 1 for others.
    """

    v: jax.Array
    hessian: jax.Array
    gradient: jax.Array | None
    energy: jax.Array
    real: jax.Array


Metric = Callable[[Problem, jax.Array], jax.Array]


def output_error(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """The squared error of the output, [blocks, rows], up to a constant (LLM-FP4's L2 norm)."""
    e = v_hat - problem.v
    if problem.hessian.ndim == 2:
        return _diagonal(problem, e)
    cost = e @ problem.hessian
    return ((cost if problem.gradient is None else cost - 2 * problem.gradient) * e).sum(-1)


def diagonal_hessian(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """Each element's squared error, weighted by the diagonal of the output error's Hessian, [blocks, rows]: no
    products of matrices, but blind to errors that cancel each other."""
    return _diagonal(problem, v_hat - problem.v)


def _diagonal(problem: Problem, e: jax.Array) -> jax.Array:
    h = problem.hessian
    diagonal = h if h.ndim == 2 else jnp.diagonal(h, axis1=1, axis2=2)
    return (e * e * diagonal[:, None, :]).sum(-1)


def cosine(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """1 - the cosine between the output in full precision and the quantized one, [blocks, rows]: 1 where only the
    quantized one is zero, 0 where nothing but zero was wanted."""
    assert problem.hessian.ndim == 3
    reach = problem.v @ problem.hessian
    towards = reach if problem.gradient is None else reach + problem.gradient
    along = (v_hat * towards).sum(-1)
    size = ((v_hat @ problem.hessian) * v_hat).sum(-1)
    norm = jnp.sqrt(jnp.maximum(size, 0)) * jnp.sqrt(problem.energy)
    return jnp.where(problem.energy > 0, 1 - along / jnp.where(norm > 0, norm, 1), jnp.float32(0))


def weight_problem(
    w: jax.Array, x: jax.Array, real: jax.Array, quantized: Callable[[jax.Array], jax.Array], blocks: int
) -> Problem:
    """What weights cost, given what their inputs are quantized to.

    Args:
      w: [out, in].
      x: [batches, tokens, in].
      real: [batches, tokens], 0 for padding, else 1.
      quantized: what the contraction reads in place of some tokens of x, [tokens, in].
      blocks: into how many groups the input channels are split.
    """
    (out, channels), n = w.shape, w.shape[1] // blocks
    direct = 2 * out < channels  # W (X - X_hat)' X_hat by two products a batch, or by one and W at the end

    def accumulate(sums: tuple, batch: tuple) -> tuple[tuple, None]:
        hessian, slope, energy = sums
        x, valid = batch
        x_hat = quantized(x) * valid[:, None]
        x = x * valid[:, None]
        split = x_hat.reshape(-1, blocks, n)
        hessian += jnp.einsum("tbi,tbj->bij", split, split)
        lost = x - x_hat
        slope += (lost @ w.T if direct else lost).T @ x_hat
        return (hessian, slope, energy + jnp.square(x @ w.T).sum(0)), None

    shapes = (blocks, n, n), (out if direct else channels, channels), (out,)
    start = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    (hessian, slope, energy), _ = jax.lax.scan(accumulate, start, (_merged(x), _merged(real)))
    gradient = slope if direct else w @ slope
    energy = jnp.broadcast_to(energy, (blocks, out))
    return Problem(blocks_of(w, blocks), hessian, blocks_of(gradient, blocks), energy, jnp.ones(out, jnp.float32))


def _merged(a: jax.Array, tokens: int = 1024) -> jax.Array:
    """[batches, tokens, ...] with as many batches in one as make `tokens` at most: products of few tokens are slow."""
    count, each = a.shape[:2]
    several = max(k for k in range(1, count + 1) if count % k == 0 and (k == 1 or k * each <= tokens))
    return a.reshape(count // several, several * each, *a.shape[2:])


def activation_problem(
    x: jax.Array, real: jax.Array, ws: tuple[jax.Array, ...], w_hats: tuple[jax.Array, ...]
) -> Problem:
    """What activations cost, given what the weights that read them are quantized to; the errors of all of these add.

    Args:
      x: [tokens, in].
      real: [tokens], 0 for padding, else 1.
      ws, w_hats: for each weight [out, in], in full precision and quantized.
    """
    hessian: Any = sum(w.T @ w for w in w_hats)
    slope: Any = sum((w - w_hat).T @ w_hat for w, w_hat in zip(ws, w_hats, strict=True))
    energy: Any = sum(jnp.square(x @ w.T).sum(1) for w in ws)
    return Problem(x[None], hessian[None], (x @ slope)[None], energy[None], real)


def plain_problem(v: jax.Array, weight: jax.Array, real: jax.Array) -> Problem:
    """The squared error of the vectors themselves, element i weighted by `weight[..., i]`: v [blocks, rows, n]."""
    return Problem(v, jnp.broadcast_to(weight, (v.shape[0], v.shape[2])), None, jnp.square(v).sum(-1), real)


def blocks_of(w: jax.Array, blocks: int) -> jax.Array:
    """[rows, n * blocks] as [blocks, rows, n]."""
    return w.reshape(w.shape[0], blocks, -1).transpose(1, 0, 2)


def total_error(
    x: jax.Array,
    real: jax.Array,
    quantized: Callable[[jax.Array], jax.Array],
    ws: tuple[jax.Array, ...],
    w_hats: tuple[jax.Array, ...],
) -> jax.Array:
    """The squared error of all outputs, computed directly. Shapes as above; x: [batches, tokens, in]."""

    def accumulate(total: jax.Array, batch: tuple) -> tuple[jax.Array, None]:
        x, valid = batch
        x_hat = quantized(x)
        for w, w_hat in zip(ws, w_hats, strict=True):
            total += (jnp.square(x @ w.T - x_hat @ w_hat.T).sum(1) * valid).sum()
        return total, None

    return jax.lax.scan(accumulate, jnp.float32(0), (x, real))[0]
