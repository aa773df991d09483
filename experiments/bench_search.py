"""OS+'s search of one group, against the straightforward loop over candidates in PyTorch on the same cores.

    python experiments/bench_search.py [--repeats 3]

One group of an OPT block: q, k and v of width 768 reading 8x128 tokens, 12 heads, the error of attention's output
(and, as a second case, fc1 of 768x3072 with the error of its output), 100 candidates. Needs PyTorch. Runs alternate;
medians and ratios of one run are reported.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxq
from jaxq.quantizer import per_channel, per_tensor, per_token
from jaxq.search import coarse_to_fine, exhaustive
from jaxq.steps import Group, Step, as_the_paper, channel_range
from jaxq.steps.os_plus import search_scale, thresholds
from jaxq.steps.shift import touch

WIDTH, HEADS, BATCH, LENGTH = 768, 12, 8, 128
RECIPES = {
    "W8A8 per tensor": (8, jaxq.quantize(per_tensor(jaxq.Int(8)), per_tensor(jaxq.Int(8)))),
    "W6A6 per channel": (6, jaxq.quantize(per_channel(jaxq.Int(6)), per_tensor(jaxq.Int(6)))),
    "W4A4 per token": (4, jaxq.quantize(per_channel(jaxq.Int(4)), per_token(jaxq.Int(4)))),
}


def heads(y: jax.Array) -> jax.Array:
    return y.reshape(BATCH, LENGTH, HEADS, -1)


def attention(params, x):
    q, k, v = jnp.split(x @ params["w"] + params["b"][None, None], 3, -1)
    scores = jnp.einsum("bthd,bshd->bhts", heads(q) * (WIDTH // HEADS) ** -0.5, heads(k))
    visible = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]
    p = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), -1)
    return jnp.einsum("bhts,bshd->bthd", p, heads(v)).reshape(x.shape) @ params["next"]


def linear(params, x):
    return (x @ params["w"] + params["b"][None, None]) @ params["next"]


def torch_attention(x, w, b):
    q, k, v = (t.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for t in (x @ w + b).split(WIDTH, -1))
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
    p = torch.softmax((q * (WIDTH // HEADS) ** -0.5) @ k.transpose(2, 3) + mask, -1)
    return (p @ v).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)


def torch_linear(x, w, b):
    return x @ w + b


def torch_quant(x, bits, low, high):
    steps = 2 ** (bits - 1) - 1
    scale = torch.clamp(torch.maximum(-low, high) / steps, min=2**-23)
    return torch.clamp(torch.round(x / scale), -steps, steps) * scale


def torch_search(F, x, w, b, grid, bits, recipe):
    """The loop as anyone would write it: scale, quantize, run, compare; eager PyTorch."""
    low, high = x.amin((0, 1)), x.amax((0, 1))
    target = F(x, w, b)
    losses = []
    for t in torch.tensor(grid, dtype=torch.float32):
        s = torch.maximum(torch.where(high > t, high / t, 1.0), torch.where(low < -t, low / -t, 1.0))
        xs, ws = x / s, w * s[:, None]
        if "token" in recipe:
            xq = torch_quant(xs, bits, xs.amin(-1, keepdim=True), xs.amax(-1, keepdim=True))
        else:
            xq = torch_quant(xs, bits, -t, t)
        rows = {} if "tensor" in recipe else {"dim": 0, "keepdim": True}
        wq = torch_quant(ws, bits, ws.amin(**rows), ws.amax(**rows))
        losses.append(((F(xq, wq, b) - target) ** 2).sum(-1).mean())
    losses = torch.stack(losses).numpy()
    return int(losses.argmin()), losses


def kept(group: Group) -> Group:
    """The group with its objectives cut now: later the walk has moved on."""
    pieces = group.objectives
    return replace(group, find_objectives=lambda: pieces)


def capture(forward, params, x, recipe: Step) -> Group:
    seen: list[Group] = []
    keep = Step(touch(lambda plan: plan.name == "w"), lambda group: seen.append(kept(group)) or group)
    jaxq.calibrate(forward, params, [x], jaxq.chain(keep, jaxq.partition({"w": recipe})))
    return seen[0]


def data(columns: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    loud = rng.choice(WIDTH, 12, replace=False)
    x[..., loud] *= rng.uniform(2, 9, 12).astype(np.float32)
    w = (rng.normal(size=(WIDTH, columns)) / WIDTH**0.5).astype(np.float32)
    b = (rng.normal(size=columns) * 0.1).astype(np.float32)
    return x, w, b


def timed(f):
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--repeats", type=int, default=3)
    repeats = args.parse_args().repeats
    print(f"jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, {repeats} repeats")
    print(f"{'group':10} {'setting':18} {'torch s':>8} {'exhaust.':>9} {'fast':>7} {'ratio':>7} {'first call':>10}")
    for name, forward, F, columns in (
        ("qkv", attention, torch_attention, 3 * WIDTH),
        ("fc1", linear, torch_linear, 4 * WIDTH),
    ):
        for setting in RECIPES:
            compare(name, forward, F, columns, setting, repeats)


def compare(name, forward, F, columns: int, setting: str, repeats: int) -> None:
    bits, recipe = RECIPES[setting]
    x, w, b = data(columns)
    out = WIDTH if name == "qkv" else columns
    params = {"w": jnp.asarray(w), "b": jnp.asarray(b), "next": jnp.zeros((out, 1))}
    tx, tw, tb = map(torch.from_numpy, (x, w, b))
    group = capture(forward, params, jnp.asarray(x), recipe)
    low, high = channel_range(group)
    grid = thresholds(low, high, 1.0, 100)
    objective = as_the_paper(group.objectives)
    run = {
        "torch": lambda: torch_search(F, tx, tw, tb, grid, bits, setting),
        "all": lambda: search_scale(group, objective, grid, low, high, exhaustive()),
        "fast": lambda: search_scale(group, objective, grid, low, high, coarse_to_fine()),
    }
    first, _ = timed(run["fast"])
    timed(run["all"])
    times: dict[str, list[float]] = {k: [] for k in run}
    found = {}
    for _ in range(repeats):
        for k, f in run.items():
            seconds, found[k] = timed(f)
            times[k].append(seconds)
    t = {k: median(v) for k, v in times.items()}
    theirs, losses = found["torch"]
    fast, ours = found["fast"]
    print(
        f"{name:10} {setting:18} {t['torch']:8.2f} {t['all']:9.2f} {t['fast']:7.2f} {t['torch'] / t['fast']:6.1f}x "
        f"{first:9.2f}s  torch {theirs}, all {found['all'][0]}, fast {fast}; torch's loss of fast's "
        f"choice / of its own: {losses[fast] / losses[theirs]:.5f}; {np.isfinite(ours).sum()} of {len(grid)} tried"
    )


if __name__ == "__main__":
    main()
