"""Perplexity by jaxq against transformers and PyTorch: the same model, windows and cores.

    python experiments/bench_eval.py [--windows 64] [--repeats 3]

A random OPT of 6 layers and width 768 on windows of 128 tokens, 8 at a time, from a checkpoint in a temporary folder;
and a small LLaMA, where what is not matrix products weighs most. Each evaluation is a process of its own, timed from
the loaded model to the perplexity, so with compilation; the two alternate, and medians are reported. Needs PyTorch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 768, "num_attention_heads": 12,
    "num_hidden_layers": 6, "ffn_dim": 3072, "vocab_size": 8192, "max_position_embeddings": 128,
    "word_embed_proj_dim": 768, "tie_word_embeddings": True, "do_layer_norm_before": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 384,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 5, "vocab_size": 512,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
BATCH = 8


def tokens(count: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (count, 128)).astype(np.int32)


def write(folder: Path, config: dict) -> None:
    from jaxq.models.build import init, model_of
    from jaxq.models.hf import save_hf

    params = init(config)
    save_hf(model_of(config, params), params, folder)


def by_jaxq(folder: str, count: int) -> tuple[float, float]:
    from jaxq.evaluate import perplexity
    from jaxq.models import load

    model = load(folder)
    found = perplexity(model.forward, model.params, tokens(count, model.config["vocab_size"]), BATCH)
    return found.seconds, found.perplexity


def by_torch(folder: str, count: int) -> tuple[float, float]:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = torch.tensor(tokens(count, model.config.vocab_size), dtype=torch.long)
    start, total = time.perf_counter(), 0.0
    with torch.inference_mode():
        for batch in windows.split(BATCH):
            logits = model(batch, use_cache=False).logits[:, :-1]
            total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return time.perf_counter() - start, float(np.exp(total / (count * 127)))


BY = {"jaxq": by_jaxq, "transformers": by_torch}


def compare(name: str, config: dict, windows: int, repeats: int) -> None:
    seconds: dict[str, list[float]] = {which: [] for which in BY}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write(folder, config)
        for _ in range(repeats):
            for which in BY:
                command = [sys.executable, __file__, "--one", which, str(folder), "--windows", str(windows)]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                seconds[which].append(float(out[-2]))
                found[which] = float(out[-1])
    t = {which: median(values) for which, values in seconds.items()}
    print(f"{name}, {windows} windows: jaxq {t['jaxq']:.2f} s, transformers {t['transformers']:.2f} s, ratio"
          f" {t['jaxq'] / t['transformers']:.2f}; perplexities {found['jaxq']:.3f}, {found['transformers']:.3f}",
          flush=True)  # fmt: skip


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--windows", type=int, default=64)
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = args.parse_args()
    if given.one:
        print(*BY[given.one[0]](given.one[1], given.windows))
        return
    compare("OPT, width 768", OPT, given.windows, given.repeats)
    compare("LLaMA, width 128", LLAMA, given.windows, given.repeats)


if __name__ == "__main__":
    main()
