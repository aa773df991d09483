"""What simulated quantization costs: jitted forward and cold start, against float32.

    python experiments/bench_forward.py [--repeats 20] [--cold]

An OPT of 4 layers and hidden size 512 on 8x128 tokens, W8A8 per tensor. Forward passes alternate between the two and
the median is reported. `--cold` measures, each in a process of its own, the time from ready parameters to the first
float logits, and from ready parameters through calibration to the first quantized logits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

import jax
import jax.numpy as jnp

import jaxq
from jaxq.models.build import init, model_of

CONFIG = {
    "model_type": "opt", "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4, "ffn_dim": 2048,
    "vocab_size": 4096, "max_position_embeddings": 128, "word_embed_proj_dim": 512, "tie_word_embeddings": False,
}  # fmt: skip
RECIPE = jaxq.quantize(jaxq.per_tensor(jaxq.Int(8)), jaxq.per_tensor(jaxq.Int(8)))


def setup():
    params = jax.tree.map(jnp.asarray, init(CONFIG))
    tokens = jax.random.randint(jax.random.key(0), (8, 128), 0, CONFIG["vocab_size"])
    jax.block_until_ready((params, tokens))
    return model_of(CONFIG, params), params, tokens


def cold(which: str) -> float:
    model, params, tokens = setup()
    start = time.perf_counter()
    if which == "float":
        jax.block_until_ready(jax.jit(model.forward)(params, tokens))
    elif which == "jaxq":
        quantized = jaxq.calibrate(model.forward, params, [tokens], RECIPE)
        print(f"calibrate {time.perf_counter() - start:.2f} s", file=sys.stderr)
        jax.block_until_ready(jax.jit(jaxq.execute(model.forward))(quantized, tokens))
    return time.perf_counter() - start


def cold_ratios(repeats: int) -> None:
    seconds: dict[str, list[float]] = {"float": [], "jaxq": []}
    for _ in range(repeats):
        for which in seconds:
            out = subprocess.run([sys.executable, __file__, "--one", which], capture_output=True, text=True, check=True)
            seconds[which].append(float(out.stdout.split()[-1]))
    t = {k: median(v) for k, v in seconds.items()}
    print(f"cold: float first evaluation {t['float']:.2f} s, calibrate + first quantized evaluation {t['jaxq']:.2f} s,"
          f" ratio {t['jaxq'] / t['float']:.2f}")  # fmt: skip


def forward_ratio(repeats: int) -> None:
    model, params, tokens = setup()
    quantized = jaxq.calibrate(model.forward, params, [tokens], RECIPE)
    both = {"float": (jax.jit(model.forward), params), "jaxq": (jax.jit(jaxq.execute(model.forward)), quantized)}
    seconds: dict[str, list[float]] = {k: [] for k in both}
    for f, p in both.values():
        jax.block_until_ready(f(p, tokens))
    for _ in range(repeats):
        for name, (f, p) in both.items():
            start = time.perf_counter()
            jax.block_until_ready(f(p, tokens))
            seconds[name].append(time.perf_counter() - start)
    t = {k: median(v) for k, v in seconds.items()}
    print(f"forward: float32 {1e3 * t['float']:.1f} ms, W8A8 per tensor {1e3 * t['jaxq']:.1f} ms,"
          f" ratio {t['jaxq'] / t['float']:.2f}")  # fmt: skip


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--repeats", type=int, default=20)
    args.add_argument("--cold", action="store_true")
    args.add_argument("--one", choices=["float", "jaxq"], help=argparse.SUPPRESS)
    given = args.parse_args()
    if given.one:
        print(cold(given.one))
        return
    print(f"jax {jax.__version__}, {given.repeats} repeats, interleaved")
    if given.cold:
        cold_ratios(given.repeats)
    else:
        forward_ratio(given.repeats)


if __name__ == "__main__":
    main()
