"""Times of a forward pass on this machine: float32, simulated, and packed (W8A8, W4A16), interleaved.

    python experiments/bench_packed.py [--model stdlib-opt] [--batch 8] [--length 128]

Prints medians, the median of the ratios to float32 of the same round, the memory that a pass takes beside its
arguments, and the time to compile it. What takes the memory of a float32 model is timed in rounds of its own: the
allocator gives that back to the system, so that whatever ran next would wait for new pages.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxq
from jaxq import Int, models
from jaxq.report import say, table

CONFIG = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}


def wide(width: int) -> models.Model:
    """An OPT of two layers with random weights."""
    heads = {"hidden_size": width, "word_embed_proj_dim": width, "num_attention_heads": width // 64}
    config = {**CONFIG, **heads, "ffn_dim": 4 * width, "num_hidden_layers": 2}
    random = np.random.default_rng(0)
    layout = jax.eval_shape(lambda: models.init(config))
    params = jax.tree.map(lambda a: random.standard_normal(a.shape, np.float32) / width**0.5, layout)
    return models.model_of(config, params, None, f"OPT of width {width}")


def variants(model: models.Model, tokens: np.ndarray) -> list[dict[str, tuple]]:
    """The programs and their parameters, in groups that are timed together."""
    w8a8 = jaxq.calibrate(model.forward, model.params, [tokens[:1]], jaxq.quantize(Int(8), Int(8)))
    w4a16 = jaxq.calibrate(model.forward, model.params, [tokens[:1]], jaxq.quantize(Int(4), None))
    run = jax.jit(jaxq.execute(model.forward))
    full = {"float32": (jax.jit(model.forward), jax.tree.map(jnp.asarray, model.params))}
    packed = {
        "W8A8 packed": (run, jaxq.pack(w8a8)),
        "W8A8 packed, float": (jax.jit(jaxq.execute(model.forward, "float")), jaxq.pack(w8a8)),
        "W4A16 packed": (run, jaxq.pack(w4a16)),
    }
    large = {
        "W8A8 simulated": (run, w8a8),
        "W4A16 simulated": (run, w4a16),
        "W4A16 packed, decoded whole": (jax.jit(jaxq.execute(model.forward, "xla")), jaxq.pack(w4a16)),
    }
    return [full | packed, full | large]


def timed(run, params, tokens) -> float:
    start = perf_counter()
    run(params, tokens).block_until_ready()
    return perf_counter() - start


def measured(runs: dict[str, tuple], tokens: np.ndarray, count: int) -> list[tuple]:
    seconds, taken = {}, {}
    for name, (run, params) in runs.items():
        start = perf_counter()
        compiled = run.lower(params, tokens).compile()
        seconds[name] = perf_counter() - start
        taken[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        timed(run, params, tokens)
    rounds = [{name: timed(*what, tokens) for name, what in runs.items()} for _ in range(count)]
    rows = []
    for name, (_, params) in runs.items():
        ratio = float(np.median([r[name] / r["float32"] for r in rounds]))
        bits, median = jaxq.bits_per_weight(params), 1e3 * float(np.median([r[name] for r in rounds]))
        rows.append((name, median, ratio, taken[name], seconds[name], None if np.isnan(bits) else bits))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a model's name; else an OPT of --width with random weights")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    model = models.load(args.model) if args.model else wide(args.width)
    tokens = np.random.default_rng(0).integers(0, 512, (args.batch, args.length))
    rows = [row for runs in variants(model, tokens) for row in measured(runs, tokens, args.rounds)]
    title = f"{model.name}: a forward pass of [{args.batch}, {args.length}] tokens on {jax.devices()[0].device_kind}"
    say(f"{args.rounds} rounds, interleaved")
    Console().print(table(title, ("", "ms", "to float32", "MiB taken", "s to compile", "bits per weight"), rows))


if __name__ == "__main__":
    main()
