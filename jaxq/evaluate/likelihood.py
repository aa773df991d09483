"""How likely a language model finds the continuations of texts: what multiple-choice tasks are scored by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxq.arrays import NotFinite, on_device
from jaxq.evaluate.batches import by_width

Pair = tuple[Sequence[int], Sequence[int]]


def likelihoods(
    forward: Callable[..., jax.Array],
    params: Any,
    pairs: Sequence[Pair],
    context: int,
    batch_size: int = 8,
    progress: bool = False,
) -> list[tuple[float, bool]]:
    """For each (context, continuation), both tokens: the log-likelihood of the continuation, and whether it is what
    the model would have said, token by token.

    Args:
      forward: `forward(params, tokens [B, T]) -> logits [B, T, V]`, left to right.
      pairs: contexts and continuations are not empty.
      context: how many tokens the model reads; what is longer is cut on the left.

    Raises:
      ValueError: an empty context or continuation, or a continuation longer than `context`.
      NotFinite: of the logits.
    """
    rows = [_row(pair, context) for pair in pairs]
    run = jax.jit(_scored, static_argnums=0)
    params, sizes = on_device(params), np.array([len(tokens) for tokens, _ in rows])
    result: dict[int, tuple[float, bool]] = {}
    batches = list(by_width(sizes, batch_size, context))
    for picked, width in track(batches, description="likelihoods", disable=not progress):
        inputs, targets = np.zeros((2, len(picked), width), np.int32)
        wanted = np.zeros(inputs.shape, bool)
        for i, row in enumerate(picked):
            tokens, scored = rows[row]
            inputs[i, : len(tokens)], targets[i, : len(tokens)] = tokens, [*tokens[1:], scored[-1]]
            wanted[i, len(tokens) - len(scored) : len(tokens)] = True
        sums, greedy = map(np.asarray, run(forward, params, inputs, targets, wanted))
        result.update((int(row), (float(sums[i]), bool(greedy[i]))) for i, row in enumerate(picked))
    found = [result[i] for i in range(len(rows))]
    if not math.isfinite(sum(value for value, _ in found)):
        raise NotFinite("the log-likelihood of a continuation is not finite: the model's logits are not")
    return found


def _row(pair: Pair, context: int) -> tuple[list[int], list[int]]:
    """What the model reads, the last token of the continuation left out, and the continuation."""
    before, after = map(list, pair)
    if not before or not after or len(after) > context:
        raise ValueError(
            f"a context of {len(before)} tokens with a continuation of {len(after)}: both need one at least, and the "
            f"continuation at most {context}"
        )
    return [*before, *after][-(context + 1) :][:-1], after


def _scored(
    forward: Callable[..., jax.Array], params: Any, tokens: jax.Array, targets: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = forward(params, tokens).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    likelihood = jnp.where(wanted, picked - jax.nn.logsumexp(logits, axis=-1), 0).sum(-1)
    return likelihood, jnp.where(wanted, logits.argmax(-1) == targets, True).all(-1)


def next_tokens(
    forward: Callable[..., jax.Array], params: Any, tokens: Sequence[int], context: int, most: int
) -> list[int]:
    """Up to `most` tokens that a model finds the most likely after `tokens`, of which it reads the last `context`.

    Each is a whole evaluation, of a width that doubles: for short answers.
    """
    run, params = jax.jit(_greedy, static_argnums=0), on_device(params)
    found = list(tokens)
    for _ in range(most):
        seen = found[-context:]
        (_, width) = next(by_width(np.array([len(seen)]), 1, context))
        row = np.zeros((1, width), np.int32)
        row[0, : len(seen)] = seen
        found.append(int(run(forward, params, row, len(seen) - 1)))
    return found[len(tokens) :]


def _greedy(forward: Callable[..., jax.Array], params: Any, row: jax.Array, last: jax.Array) -> jax.Array:
    return forward(params, row)[0, last].argmax()
