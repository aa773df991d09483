"""The error of a contraction's output as a quadratic form in one of its operands.

With Y = X W and quantized operands, the squared error of output channel o, summed over tokens, is a quadratic form in
that channel's weights: it costs the same for any number of tokens. So is the error of a token, summed over output
channels, in that token's activations. Both are stated in the quantization error e = v_hat - v, not in v_hat: all terms
are then as small as the error itself, and float32 suffices.

    E(v_hat) = e H e' - 2 e g + constant

    weights:      v = W[:, o],  H = X_hat' X_hat,  g = X_hat' (X - X_hat) W[:, o]
    activations:  v = X[t, :],  H = W_hat W_hat',  g = X[t, :] (W - W_hat) W_hat'

Where fewer outputs than v has elements are summed over, it is smaller and faster not to multiply them out:

    E(v_hat) = |A e'|^2 - 2 (A e')' r + constant,  H = A' A,  g = A' r
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
      hessian: [blocks, n, n], its diagonal [blocks, n], or None where there is a factor of it.
      factor: [blocks, outputs, n] or None, A above.
      gradient: [blocks, rows, n]; with a factor [1, rows, outputs], r above; None for none.
      energy: [blocks, rows], the squared size of the outputs in full precision.
      real: [rows], 0 for rows that do not count (padding), 1 for others.
    """

    v: jax.Array
    hessian: jax.Array | None
    factor: jax.Array | None
    gradient: jax.Array | None
    energy: jax.Array
    real: jax.Array


Metric = Callable[[Problem, jax.Array], jax.Array]


def output_error(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """The squared error of the output, [blocks, rows], up to a constant (LLM-FP4's L2 norm)."""
    if problem.factor is None and _hessian(problem).ndim == 2:
        return diagonal_hessian(problem, v_hat)
    cost, along = _products(problem, v_hat - problem.v)
    return _row_sums((cost if problem.gradient is None else cost - 2 * problem.gradient) * along)


def diagonal_hessian(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """Each element's squared error, weighted by the diagonal of the output error's Hessian, [blocks, rows]: no
    products of matrices, but blind to errors that cancel each other."""
    if problem.factor is not None:
        diagonal = jnp.square(problem.factor).sum(1)
    else:
        h = _hessian(problem)
        diagonal = h if h.ndim == 2 else jnp.diagonal(h, axis1=1, axis2=2)
    return _row_sums(jnp.square(v_hat - problem.v) * diagonal[:, None, :])


def cosine(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """1 - the cosine between the output in full precision and the quantized one, [blocks, rows]: 1 where only the
    quantized one is zero, 0 where nothing but zero was wanted."""
    reach, _ = _products(problem, problem.v)
    towards = reach if problem.gradient is None else reach + problem.gradient
    cost, along = _products(problem, v_hat)
    norm = jnp.sqrt(jnp.maximum(_row_sums(cost * along), 0)) * jnp.sqrt(problem.energy)
    found = 1 - _row_sums(towards * along) / jnp.where(norm > 0, norm, 1)
    return jnp.where(problem.energy > 0, found, jnp.float32(0))


def _hessian(problem: Problem) -> jax.Array:
    assert problem.hessian is not None
    return problem.hessian


def _products(problem: Problem, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """e H and e; with a factor e A', twice. The inner product of the two is e H e', that of the gradient and the second
    one the linear term."""
    if problem.factor is None:
        return e @ _hessian(problem), e
    outputs = jnp.einsum("bri,boi->bro", e, problem.factor)
    return outputs, outputs


def _row_sums(a: jax.Array) -> jax.Array:
    """a.sum(-1), as a product: on CPU XLA merges a plain sum with what makes its terms into one slow loop."""
    ones = jnp.ones((a.shape[-1], 1), jnp.float32)
    return jnp.matmul(a.reshape(-1, a.shape[-1]), ones, precision="highest").reshape(a.shape[:-1])


def weight_problem(
    w: jax.Array,
    x: jax.Array,
    real: jax.Array,
    quantized: Callable[[jax.Array], jax.Array],
    blocks: int,
    budget: int = 2**30,
) -> Problem:
    """What weights cost, given what their inputs are quantized to.

    Sums over all tokens, or, where there are fewer of them than inputs, the tokens themselves. If the sums take more
    than the budget it is as many tokens, evenly spaced, as it holds.

    Args:
      w: [out, in].
      x: [batches, tokens, in].
      real: [batches, tokens], 0 for padding, else 1.
      quantized: what the contraction reads in place of some tokens of x, [tokens, in].
      blocks: into how many groups the inputs are split.
      budget: bytes that the search may take.
    """
    (out, channels), n = w.shape, w.shape[1] // blocks
    direct = 2 * out < channels  # W (X - X_hat)' X_hat by two products a part, or by one and W at the end
    x, real = x.reshape(-1, channels), real.ravel()
    sums = 4 * channels * (n + out + (0 if direct else channels))
    if len(x) < n or sums > budget * 3 // 4:
        every = -(-len(x) // tokens_within(budget, channels + out))
        return _problem_of_tokens(w, x[::every], real[::every], quantized, blocks)

    def add(sums: tuple, x: jax.Array, valid: jax.Array) -> tuple:
        hessian, slope, energy = sums
        x_hat = quantized(x) * valid[:, None]
        x = x * valid[:, None]
        lost = x - x_hat
        return (
            _plus(hessian, x_hat.reshape(-1, blocks, n), x_hat.reshape(-1, blocks, n)),
            _plus(slope, (lost @ w.T if direct else lost)[:, None], x_hat[:, None]),
            energy + jnp.square(x @ w.T).sum(0),
        )

    shapes = (blocks, n, n), (1, out if direct else channels, channels), (out,)
    hessian, slope, energy = _over_tokens(add, tuple(jnp.zeros(s, jnp.float32) for s in shapes), x, real)
    gradient = slope[0] if direct else w @ slope[0]
    energy = jnp.broadcast_to(energy, (blocks, out))
    ones = jnp.ones(out, jnp.float32)
    return Problem(blocks_of(w, blocks), hessian, None, blocks_of(gradient, blocks), energy, ones)


def tokens_within(budget: int, size: int) -> int:
    """How many tokens, with arrays of `size` elements each, a problem may be stated with: those take half the budget at
    most."""
    return max(1, budget // 2 // (4 * size))


def _problem_of_tokens(
    w: jax.Array, x: jax.Array, real: jax.Array, quantized: Callable[[jax.Array], jax.Array], blocks: int
) -> Problem:
    x, x_hat = (a * real[:, None] for a in (x, quantized(x)))
    factor = blocks_of(x_hat, blocks)
    gradient, energy = w @ (x - x_hat).T, jnp.square(w @ x.T).sum(1)
    energy = jnp.broadcast_to(energy, (blocks, len(w)))
    return Problem(blocks_of(w, blocks), None, factor, gradient[None], energy, jnp.ones(len(w), jnp.float32))


# How much is worked on at a time: tokens, of which few make slow products and many take memory, and rows of a sum of
# products, so that no second array of its size is made.
TOKENS, ROWS = 1024, 1024


def _in_parts(count: int, size: int, step: Callable, start: Any) -> Any:
    """`step(state, begin, new)` for some of `count` indices after the other: from `begin` on, [size]; `new` is 0 for
    those that were in the part before."""
    size = min(size, count)

    def one(state: Any, first: jax.Array) -> tuple[Any, None]:
        begin = jnp.minimum(first, count - size)
        new = begin + jnp.arange(size, dtype=jnp.int32) >= first
        return step(state, begin, new.astype(jnp.float32)), None

    return jax.lax.scan(one, start, jnp.arange(0, count, size, dtype=jnp.int32))[0]


def _over_tokens(add: Callable, start: Any, x: jax.Array, real: jax.Array) -> Any:
    """`add(sums, x, real)` for some tokens after the other."""
    size = min(TOKENS, len(x))

    def step(sums: Any, begin: jax.Array, new: jax.Array) -> Any:
        some, valid = (jax.lax.dynamic_slice_in_dim(a, begin, size) for a in (x, real))
        return add(sums, some, valid * new)

    return _in_parts(len(x), size, step, start)


def _plus(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """total [blocks, m, n] + a' b in place; a: [tokens, blocks, m], b: [tokens, blocks, n]."""
    size = min(ROWS, a.shape[2])

    def step(total: jax.Array, begin: jax.Array, new: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(a, begin, size, 2) * new[None, None]
        more = jax.lax.dynamic_slice_in_dim(total, begin, size, 1) + jnp.einsum("tbi,tbj->bij", rows, b)
        return jax.lax.dynamic_update_slice_in_dim(total, more, begin, 1)

    return _in_parts(a.shape[2], size, step, total)


def activation_problem(
    x: jax.Array, real: jax.Array, ws: tuple[jax.Array, ...], w_hats: tuple[jax.Array, ...]
) -> Problem:
    """What activations cost, given what the weights that read them are quantized to; the errors of all of these add.

    Args:
      x: [tokens, in].
      real: [tokens], 0 for padding, else 1.
      ws, w_hats: for each weight [out, in], in full precision and quantized.
    """
    lost = [x @ (w - w_hat).T for w, w_hat in zip(ws, w_hats, strict=True)]
    energy: Any = sum(jnp.square(x @ w.T).sum(1) for w in ws)
    if sum(map(len, ws)) < x.shape[1]:
        factor, gradient = jnp.concatenate(w_hats)[None], jnp.concatenate(lost, 1)[None]
        return Problem(x[None], None, factor, gradient, energy[None], real)
    hessian: Any = sum(w.T @ w for w in w_hats)
    gradient: Any = sum(r @ w for r, w in zip(lost, w_hats, strict=True))
    return Problem(x[None], hessian[None], None, gradient[None], energy[None], real)


def plain_problem(v: jax.Array, weight: jax.Array, real: jax.Array) -> Problem:
    """The squared error of the vectors themselves, element i weighted by `weight[..., i]`: v [blocks, rows, n]."""
    diagonal = jnp.broadcast_to(weight, (v.shape[0], v.shape[2]))
    return Problem(v, diagonal, None, None, jnp.square(v).sum(-1), real)


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

    def add(total: jax.Array, x: jax.Array, valid: jax.Array) -> jax.Array:
        x_hat = quantized(x)
        for w, w_hat in zip(ws, w_hats, strict=True):
            total += (jnp.square(x @ w.T - x_hat @ w_hat.T).sum(1) * valid).sum()
        return total

    return _over_tokens(add, jnp.float32(0), x.reshape(-1, x.shape[2]), real.ravel())
