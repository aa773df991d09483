"""LLM-FP4's search of one layer, against the published algorithm's loops in PyTorch on the same cores.

    python experiments/bench_float_search.py [--repeats 3] [--skip-torch]

A layer of 768x768 reading 8x128 tokens, W4A4, 3 rounds, 3 formats, 100 candidates. Both loops in PyTorch follow the
published order and candidates, with the number of codes repaired (16, not 17), and end with the same choices: one tries
candidate after candidate, the other is organised as the published code is, with all candidates in one array and its
results cut into one piece an output channel. Also: the weights' search at 64 times the tokens, and the memory that the
search of a large layer takes. Needs PyTorch, and Linux for the memory.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq.formats import AnyFloat, fake_quant
from jaxq.steps import Exponents, FloatSearch, float_turns, log_clips
from jaxq.steps.float_layer import Layer
from jaxq.steps.float_search import search_grids
from jaxq.steps.output_error import output_error, weight_problem

WIDTH, BATCHES, TOKENS = 768, 8, 128
FORMATS = ((3, 0), (2, 1), (1, 2))
GAMMAS = [0.01 + i * (1.2 - 0.01) / 100 for i in range(100)]
FLOAT4 = AnyFloat(4)
BOTH = Exponents.PRE_SHIFTED, Exponents.POST_SHIFTED


def data(batches: int = BATCHES) -> tuple[np.ndarray, np.ndarray]:
    """Activations with a few loud and lopsided channels, [batches, tokens, in], and weights [out, in]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batches, TOKENS, WIDTH)).astype(np.float32)
    loud = rng.choice(WIDTH, 12, replace=False)
    x[..., loud] *= rng.uniform(2, 9, 12).astype(np.float32)
    w = (rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
    return x, w


# The published algorithm ----------------------------------------------------------------------------------------------


def torch_quantized(x, e: int, m: int, bias):
    import torch

    largest = (2 - 2.0**-m) * 2 ** (2**e - 1 - bias)
    x = torch.minimum(torch.maximum(x, -largest), largest)
    p = torch.clamp(torch.floor(torch.log2(torch.abs(x)) + bias), min=1)
    step = 2 ** (p - m - bias)
    return torch.round(x / step) * step


def torch_bias(width, e: int, m: int):
    import torch

    return 2**e - 1 - torch.log2(width) + float(np.log2(2 - 2.0**-m))


def each_weight(x_hat, w, y, f, biases):
    """The error of each candidate and output channel, [candidates, out], one candidate after the other."""
    import torch

    return torch.stack([((x_hat @ torch_quantized(w, *f, bias).T - y) ** 2).mean(0) for bias in biases])


def each_input(activation, w_hat, y, candidates):
    """The error of each candidate for the tensor's bias, [candidates], one after the other."""
    import torch

    return torch.stack([((activation(r) @ w_hat.T - y) ** 2).mean() for r in candidates])


def all_weights(x_hat, w, y, f, biases):
    """As `each_weight`, organised as published: products with all candidates at once, [tokens, candidates * out], cut
    into candidates and these into output channels, each time with a copy."""
    import torch

    w_hat = torch_quantized(w[None], *f, biases)
    out = torch.nn.functional.linear(x_hat, w_hat.view(-1, w.shape[1]))
    out = torch.cat(torch.chunk(out.unsqueeze(-2), len(biases), -1), -2)
    out = torch.cat(torch.chunk(out.unsqueeze(-2), len(w), -1), -2)
    target = torch.cat(torch.chunk(y[:, None, None], len(w), -1), -2)
    return ((target - out) ** 2).mean(-1).mean(0)


def all_inputs(activation, w_hat, y, candidates):
    """As `each_input`, organised as published: the activation for all candidates, [tokens, channels, candidates], which
    moves to [tokens, candidates, channels]."""
    import torch

    x_hat = activation(candidates, lambda a: torch.cat(torch.chunk(a.unsqueeze(-2), a.shape[-1], -1), -2))
    out = torch.nn.functional.linear(x_hat.permute(0, 2, 1).contiguous(), w_hat)
    return ((y[:, None] - out) ** 2).mean(-1).mean(0)


def torch_search(x, w, weights_errors, inputs_errors, rounds: int = 3):
    """The best weights and activations, quantized, by the published rounds."""
    import torch

    y = x @ w.T
    rows = {f: torch_bias(w.abs().amax(1, keepdim=True), *f) for f in FORMATS}
    channels = {f: torch_bias(x.abs().amax(0), *f) for f in FORMATS}
    gammas = torch.tensor(GAMMAS)

    def activation(f, r, spread=None):
        """With the tensor's bias r; or several in a last axis, where `spread` gives channels an axis of their own."""
        bias, values = (channels[f], x) if spread is None else (channels[f][:, None], spread(x))
        k = torch.clamp(torch.round(bias) - torch.round(r), 0, 2 ** f[0] - 1)
        return torch_quantized(values, *f, r + k)

    state_w, state_x = ((2, 1), rows[2, 1]), ((2, 1), channels[2, 1].amin())
    for _ in range(rounds):
        best_w, best_x = {}, {}
        for f in FORMATS:
            errors = weights_errors(activation(*state_x), w, y, f, gammas[:, None, None] * rows[f])
            best_w[f] = gammas[errors.argmin(0)][:, None] * rows[f]
        w_hat = torch_quantized(w, *state_w[0], state_w[1])
        for f in FORMATS:
            candidates = gammas * channels[f].amin()
            errors = inputs_errors(partial(activation, f), w_hat, y, candidates)
            best_x[f] = candidates[errors.argmin()]
        x_hat = activation(*state_x)
        by_w = [((x_hat @ torch_quantized(w, *f, best_w[f]).T - y) ** 2).mean() for f in FORMATS]
        f = FORMATS[int(torch.stack(by_w).argmin())]
        state_w = f, best_w[f]
        w_hat = torch_quantized(w, *f, best_w[f])
        by_x = [((activation(g, best_x[g]) @ w_hat.T - y) ** 2).mean() for g in FORMATS]
        f = FORMATS[int(torch.stack(by_x).argmin())]
        state_x = f, best_x[f]
    return torch_quantized(w, *state_w[0], state_w[1]), activation(*state_x)


LOOPS = {
    "PyTorch, one by one": (each_weight, each_input),
    "PyTorch, as published": (all_weights, all_inputs),
}


# Ours -----------------------------------------------------------------------------------------------------------------


def layer(batches: int = BATCHES) -> Layer:
    x, w = data(batches)
    return Layer(jnp.asarray(x), jnp.ones(x.shape[:2]), (jnp.asarray(w),), (None,), products=True)


WEIGHTS, ACTIVATIONS = jaxq.per_channel(FLOAT4), jaxq.per_tensor(FLOAT4)


def ours(search: FloatSearch, given: Layer) -> float:
    """The relative output error of the best turn."""
    losses = float_turns.alternate(given, WEIGHTS, ACTIVATIONS, search, BOTH).losses
    return float(losses.min() / jnp.square(given.x @ given.ws[0].T).sum())


def timed(f, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(f(*args))
    return time.perf_counter() - start, result


def compare(repeats: int, with_torch: bool) -> None:
    given = layer()
    searches = {"default": FloatSearch(), "exhaustive": FloatSearch(method=jaxq.exhaustive(), tokens=None)}
    loops = LOOPS if with_torch else {}
    seconds: dict[str, list[float]] = {name: [] for name in (*searches, *loops)}
    errors: dict[str, float] = {}
    for search in searches.values():
        ours(search, given)  # compile
    for i in range(repeats):
        for name, search in searches.items():
            t, errors[name] = timed(ours, search, given)
            seconds[name].append(t)
        for name, by in loops.items() if i == 0 else ():
            import torch

            torch.set_num_threads(2)
            x, w = (torch.tensor(a) for a in (np.asarray(given.x).reshape(-1, WIDTH), np.asarray(given.ws[0])))
            t, (w_hat, x_hat) = timed(torch_search, x, w, *by)
            seconds[name].append(t)
            y = x @ w.T
            errors[name] = float(((x_hat @ w_hat.T - y) ** 2).sum() / (y**2).sum())
    for name, found in errors.items():
        t = median(seconds[name])
        ratios = "   ".join(f"{median(seconds[of]) / t:6.1f}x of {of}" for of in loops)
        print(f"{name:22} {t:7.2f} s   relative output error {found:.5f}   {ratios}", flush=True)


def tokens(repeats: int) -> None:
    """The weights' search, with its sums over tokens and without, at 1 and 64 times the tokens."""
    x_fmt, how = FLOAT4, FloatSearch()

    @jax.jit
    def sums(w, x):
        scale = (jnp.abs(x).max() / 6).reshape(1, 1)
        return weight_problem(w, x, jnp.ones(x.shape[:2]), lambda a: fake_quant(x_fmt, a, scale), 1)

    @jax.jit
    def search(problem):
        return search_grids(problem, FLOAT4, how.clips, jaxq.exhaustive(), output_error, False, how.budget)

    @jax.jit
    def both(w, x):
        return search(sums(w, x))

    times: dict[tuple[str, int], list[float]] = {}
    given = {n: layer(BATCHES * n) for n in (1, 64)}
    problems = {n: sums(it.ws[0], it.x) for n, it in given.items()}
    for _ in range(repeats + 1):
        for n, it in given.items():
            times.setdefault(("search", n), []).append(timed(search, problems[n])[0])
            times.setdefault(("both", n), []).append(timed(both, it.ws[0], it.x)[0])
    mid = {key: median(t[1:]) for key, t in times.items()}
    print(f"weights, 100 candidates, 64x the tokens: search {mid['search', 64] / mid['search', 1]:.2f}x"
          f" ({mid['search', 1]:.2f} s), with its sums over tokens {mid['both', 64] / mid['both', 1]:.2f}x"
          f" ({mid['both', 1]:.2f} s -> {mid['both', 64]:.2f} s)")  # fmt: skip


def memory() -> None:
    """What a large layer's search takes beside the layer, resident at its peak. A few candidates are enough: they
    are priced one after the other. [in, in] is summed up where there are as many tokens and the budget holds it, else
    tokens are priced as they are. Linux."""
    few = FloatSearch(rounds=1, clips=log_clips(count=2), method=jaxq.exhaustive())
    wide, narrow, gib = (4096, 11008), (11008, 4096), 2**30
    cases = (wide, 4096), (narrow, 4096), (narrow, 12288)
    for ((channels, out), count), budget in product(cases, (gib, gib // 4)):
        x = np.random.default_rng(0).standard_normal((8, count // 8, channels), np.float32)
        w = np.random.default_rng(1).standard_normal((out, channels), np.float32)
        given = Layer(jnp.array(x), jnp.ones(x.shape[:2]), (jnp.array(w),), (None,), products=True)
        search = partial(float_turns.alternate, given, WEIGHTS, ACTIVATIONS, replace(few, budget=budget), BOTH[:1])
        search()  # compile
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but still resident, would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        search()
        taken = _status("VmHWM") - before
        print(f"{channels}x{out}, {count} tokens, budget {budget >> 20} MiB: the search takes {taken >> 20} MiB"
              f" (the weight itself {w.nbytes >> 20} MiB)", flush=True)  # fmt: skip


def _status(name: str) -> int:
    """A number of bytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--skip-torch", action="store_true")
    given = args.parse_args()
    compare(given.repeats, not given.skip_torch)
    tokens(given.repeats)
    memory()


if __name__ == "__main__":
    main()
