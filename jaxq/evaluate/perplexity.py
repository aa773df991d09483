"""Perplexity of a language model on windows of tokens."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxq.arrays import NotFinite, on_device
from jaxq.evaluate.batches import batches_at_once, default_rows


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood of ``tokens`` predictions, and how long that took."""

    perplexity: float
    tokens: int
    seconds: float


def perplexity(
    forward: Callable[..., jax.Array],
    params: Any,
    windows: np.ndarray | jax.Array,
    batch_size: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of ``forward(params, tokens) -> logits [B, T, V]`` on ``windows``, int32 ``[N, T]``.

    Every window is scored on its own: T tokens make T - 1 predictions. A batch has ``batch_size`` windows, or as many
    as ``default_rows`` says. One shape is compiled: the last batch is filled up with copies that weigh nothing. Sums
    are kept in float64. The seconds include compilation.
    Raises ValueError if the windows are not ``[N, T]`` with N >= 1 and T >= 2, NotFinite if the likelihood is not.
    """
    windows = np.asarray(windows, np.int32)
    if windows.ndim != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows have shape {windows.shape}; perplexity needs [N, T] with N >= 1 and T >= 2")
    batch_size = min(batch_size or default_rows(windows.shape[1]), len(windows))
    started, total = time.perf_counter(), 0.0
    params = on_device(params)
    count = jax.jit(_window_losses, static_argnums=0).lower(forward, params, windows[:batch_size]).compile()

    def summed(begin: int) -> float:
        batch = windows[begin : begin + batch_size]
        rows = np.minimum(np.arange(batch_size), len(batch) - 1)
        losses = np.asarray(count(params, batch[rows]), np.float64)
        return float(losses[: len(batch)].sum())

    begins = range(0, len(windows), batch_size)
    with ThreadPoolExecutor(batches_at_once()) as pool:
        for loss in track(pool.map(summed, begins), "perplexity", len(begins), disable=not progress):
            total += loss
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    if not math.isfinite(total):
        raise NotFinite(f"the log-likelihood of the windows is {total}: the model's logits are not finite")
    return Perplexity(_exp(total / predictions), predictions, time.perf_counter() - started)


def _window_losses(forward: Callable[..., jax.Array], params: Any, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihood of each window's tokens after its first: ``[B, T] -> [B]``, in float32."""
    logits = forward(params, tokens)[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked, axis=-1)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf
