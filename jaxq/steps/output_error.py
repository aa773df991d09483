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

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxq.qtensor import pytree
from jaxq.steps.parts import MOST, Part, Reader, add_products, in_parts, rows_within


@pytree
class Problem:
    """Vectors to quantize, and what an error in them costs.

    Attributes:
      v: [rows, blocks * n]. Each row of a block has a grid of its own (weights per channel: one block; per group: a
        block for each group of input channels, priced as if the other groups were exact up to `gradient`), or all
        rows share one.
      hessian: [blocks, n, n], its diagonal [blocks, n], or None where there is a factor of it.
      factor: [blocks, n, outputs] or None, A' above.
      gradient: [rows, blocks * n]; with a factor [rows, outputs], r above; None for none.
      energy: [rows, 1] or [rows, blocks], the squared size of the outputs in full precision.
      real: [rows], 0 for rows that do not count (padding), 1 for others.
    """

    v: jax.Array
    hessian: jax.Array | None
    factor: jax.Array | None
    gradient: jax.Array | None
    energy: jax.Array
    real: jax.Array

    def of(self, part: Part) -> Problem:
        """The same of some of the rows."""
        gradient = None if self.gradient is None else part.of(self.gradient)
        v, energy, real = map(part.of, (self.v, self.energy, self.real))
        return Problem(v, self.hessian, self.factor, gradient, energy, real)

    @property
    def blocks(self) -> int:
        return len(_hessian(self) if self.factor is None else self.factor)

    @property
    def made(self) -> int:
        """The bytes of what was made to state it: of all but the vectors, which were there before."""
        return sum(a.nbytes for a in (self.hessian, self.factor, self.gradient) if a is not None)


Metric = Callable[[Problem, jax.Array], jax.Array]


def output_error(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """The squared error of the output, [rows, blocks], up to a constant (LLM-FP4's L2 norm)."""
    if problem.factor is None and _hessian(problem).ndim == 2:
        return diagonal_hessian(problem, v_hat)
    cost, along = _products(problem, v_hat - problem.v)
    return _row_sums((cost if problem.gradient is None else cost - 2 * _gradient(problem)) * along)


def diagonal_hessian(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """Each element's squared error, weighted by the diagonal of the output error's Hessian, [rows, blocks]: no
    products of matrices, but blind to errors that cancel each other."""
    if problem.factor is not None:
        diagonal = jnp.square(problem.factor).sum(2)
    else:
        h = _hessian(problem)
        diagonal = h if h.ndim == 2 else jnp.diagonal(h, axis1=1, axis2=2)
    return _row_sums(blocks_of(jnp.square(v_hat - problem.v), problem.blocks) * diagonal[None])


def cosine(problem: Problem, v_hat: jax.Array) -> jax.Array:
    """1 - the cosine between the output in full precision and the quantized one, [rows, blocks]: 1 where only the
    quantized one is zero, 0 where nothing but zero was wanted."""
    reach, _ = _products(problem, problem.v)
    towards = reach if problem.gradient is None else reach + _gradient(problem)
    cost, along = _products(problem, v_hat)
    norm = jnp.sqrt(jnp.maximum(_row_sums(cost * along), 0)) * jnp.sqrt(problem.energy)
    found = 1 - _row_sums(towards * along) / jnp.where(norm > 0, norm, 1)
    return jnp.where(problem.energy > 0, found, jnp.float32(0))


def _hessian(problem: Problem) -> jax.Array:
    assert problem.hessian is not None
    return problem.hessian


def _gradient(problem: Problem) -> jax.Array:
    """[rows, blocks, n]; with a factor [rows, 1, outputs]."""
    assert problem.gradient is not None
    return blocks_of(problem.gradient, problem.blocks if problem.factor is None else 1)


def _products(problem: Problem, e: jax.Array) -> tuple[jax.Array, jax.Array]:
    """e H and e, [rows, blocks, n]; with a factor e A', twice, [rows, blocks, outputs]. The inner product of the two is
    e H e', that of the gradient and the second one the linear term."""
    e = blocks_of(e, problem.blocks)
    if problem.factor is None:
        return _by_block(e, _hessian(problem)), e
    outputs = _by_block(e, problem.factor)
    return outputs, outputs


def _by_block(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of a [rows, blocks, m] and b [blocks, m, n], as [rows, blocks, n]."""
    return (a.transpose(1, 0, 2) @ b).transpose(1, 0, 2)


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
    reads: jax.Array | None = None,
    budget: int = 2**30,
) -> Problem:
    """What weights cost, given what their inputs are quantized to.

    Sums over all tokens, or, where there are fewer of them than inputs, the tokens themselves. If the sums take more
    than three quarters of the budget it is as many tokens, evenly spaced, as half of it holds.

    Args:
      w: [out, in].
      x: [batches, tokens, in].
      real: [batches, tokens], 0 for padding, else 1.
      quantized: what the contraction reads in place of some tokens of x, [tokens, in].
      blocks: into how many groups the inputs are split.
      reads: int32 [in], which channel of x each input of the weight is; None for the same order.
      budget: bytes that the search may take.
    """
    (out, channels), n = w.shape, w.shape[1] // blocks
    direct = 2 * out < channels  # W (X - X_hat)' X_hat by two products a part, or by one and W at the end
    x, real = x.reshape(-1, channels), real.ravel()
    sums = 4 * channels * (n + out + (0 if direct else channels))

    def seen(part: Part) -> tuple[jax.Array, jax.Array]:
        """Some tokens and what is read in their place; zeros for padding."""
        some, valid = part.of(x), part.of(real)[:, None]
        some, hat = some * valid, quantized(some) * valid
        return (some, hat) if reads is None else (some[:, reads], hat[:, reads])

    if len(x) < n or sums > budget * 3 // 4:
        every = -(-len(x) // rows_within(budget // 2, channels + out))
        return _problem_of_tokens(w, len(x), seen, blocks, every, budget // 2)
    size = min(MOST, rows_within(budget - sums, TOKEN_INPUTS * channels + TOKEN_OUTPUTS * out))

    def add(state: tuple, part: Part) -> tuple:
        hessian, slope, energy = state
        x, x_hat = seen(part)
        x, x_hat = x * part.new[:, None], x_hat * part.new[:, None]
        lost, by_block = x - x_hat, x_hat.reshape(-1, blocks, n)
        return (
            add_products(hessian, by_block, by_block, size),
            add_products(slope, (lost @ w.T if direct else lost)[:, None], x_hat[:, None], size),
            energy + jnp.square(x @ w.T).sum(0),
        )

    shapes = (blocks, n, n), (1, out if direct else channels, channels), (out,)
    hessian, slope, energy = in_parts(len(x), size, add, tuple(jnp.zeros(s, jnp.float32) for s in shapes))
    gradient = slope[0] if direct else w @ slope[0]
    return Problem(w, hessian, None, gradient, energy[:, None], _ones(out))


# What a token takes, at most, while it is added: arrays of its inputs, and of its outputs.
TOKEN_INPUTS, TOKEN_OUTPUTS = 8, 3


def _problem_of_tokens(
    w: jax.Array,
    count: int,
    seen: Callable[[Part], tuple[jax.Array, jax.Array]],
    blocks: int,
    every: int,
    budget: int,
) -> Problem:
    (out, channels), taken = w.shape, -(-count // every)
    size = min(MOST, rows_within(budget, TOKEN_INPUTS * channels + TOKEN_OUTPUTS * out))

    def add(state: tuple, part: Part) -> tuple:
        factor, gradient, energy = state
        x, x_hat = seen(part)
        columns = blocks_of(x_hat, blocks).transpose(1, 2, 0)
        more = jnp.square(w @ (x * part.new[:, None]).T).sum(1)
        return part.put(factor, columns, 2), part.put(gradient, w @ (x - x_hat).T, 1), energy + more

    shapes = (blocks, channels // blocks, taken), (out, taken), (out,)
    zeros = tuple(jnp.zeros(s, jnp.float32) for s in shapes)
    factor, gradient, energy = in_parts(count, size, add, zeros, every)
    return Problem(w, None, factor, gradient, energy[:, None], _ones(out))


def _ones(count: int) -> jax.Array:
    return jnp.ones(count, jnp.float32)


def activation_problem(x: jax.Array, real: jax.Array, readers: Sequence[Reader], budget: int = 2**30) -> Problem:
    """What activations cost, given what the weights that read them are quantized to; the errors of all of these add.

    Args:
      x: [tokens, in].
      real: [tokens], 0 for padding, else 1.
      readers: the weights.
      budget: bytes that may be taken beside what the problem holds.
    """
    (tokens, channels), outputs = x.shape, sum(r.outputs for r in readers)
    factored = outputs < channels
    size = min(MOST, rows_within(budget, ROW_INPUTS * channels + ROW_TOKENS * tokens))

    def add(first: int, rows: Callable, state: tuple, part: Part) -> tuple:
        whole, gradient, energy = state
        w, w_hat = rows(part)
        lost, energy = (w - w_hat) @ x.T, energy + (jnp.square(w @ x.T) * part.new[:, None]).sum(0)
        if factored:
            here = replace(part, begin=first + part.begin)
            return here.put(whole, w_hat.T, 1), here.put(gradient, lost.T, 1), energy
        w_hat = (w_hat * part.new[:, None])[:, None]
        whole = add_products(whole, w_hat, w_hat, size)
        return whole, add_products(gradient, lost[:, None], w_hat, size), energy

    shapes = [(channels, outputs), (tokens, outputs)] if factored else [(1, channels, channels), (1, tokens, channels)]
    state, first = tuple(jnp.zeros(s, jnp.float32) for s in (*shapes, (tokens,))), 0
    for reader in readers:
        state = in_parts(reader.outputs, size, partial(add, first, reader.rows), state)
        first += reader.outputs
    whole, gradient, energy = state
    if factored:
        return Problem(x, None, whole[None], gradient, energy[:, None], real)
    return Problem(x, whole, None, gradient[0], energy[:, None], real)


# What a row of a weight takes, at most, while it is added: arrays of its inputs, and of the tokens.
ROW_INPUTS, ROW_TOKENS = 8, 3


def plain_problem(v: jax.Array, weight: jax.Array, real: jax.Array) -> Problem:
    """The squared error of the vectors themselves, [rows, blocks * n], weighted by `weight`, [blocks, n]."""
    return Problem(v, weight, None, None, jnp.square(blocks_of(v, len(weight))).sum(-1), real)


def blocks_of(w: jax.Array, blocks: int) -> jax.Array:
    """[rows, n * blocks] as [rows, blocks, n]."""
    return w.reshape(len(w), blocks, -1)


def total_error(
    x: jax.Array,
    real: jax.Array,
    quantized: Callable[[jax.Array], jax.Array],
    readers: Sequence[Reader],
    budget: int = 2**30,
) -> jax.Array:
    """The squared error of all outputs, computed directly. Arguments as above; x: [batches, tokens, in]."""
    x, real = x.reshape(-1, x.shape[2]), real.ravel()
    size = min(MOST, rows_within(budget, (TOKEN_INPUTS + ROW_INPUTS) * x.shape[1] + ROW_TOKENS * MOST))

    def add(total: jax.Array, tokens: Part) -> jax.Array:
        some, valid = tokens.of(x), tokens.of(real) * tokens.new
        hat = quantized(some)

        def more(rows: Callable, total: jax.Array, part: Part) -> jax.Array:
            w, w_hat = rows(part)
            return total + (jnp.square(some @ w.T - hat @ w_hat.T).sum(1, where=part.new[None] > 0) * valid).sum()

        for reader in readers:
            total = in_parts(reader.outputs, size, partial(more, reader.rows), total)
        return total

    return in_parts(len(x), size, add, jnp.float32(0))
