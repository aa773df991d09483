"""What a user waits for: `jaxq eval --perplexity` against a script of transformers and PyTorch, as whole processes.

    python experiments/bench_eval.py TEXT MODEL... [--repeats 3]

Imports, loading, tokenizing, compilation and evaluation count, on the same text, windows and cores; the two alternate,
and medians are reported. Windows are as long as the model's context; transformers has 8 of them in a batch, jaxq what
it chooses. A random OPT of 6 layers and width 768, with the tokenizer of the first MODEL, reads a tenth of the text.
Then where the time goes, of one further run of each. Needs PyTorch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 768, "num_attention_heads": 12,
    "num_hidden_layers": 6, "ffn_dim": 3072, "vocab_size": 8192, "max_position_embeddings": 512,
    "word_embed_proj_dim": 768, "tie_word_embeddings": True, "do_layer_norm_before": True,
}  # fmt: skip
SEPARATOR = "<|endoftext|>"


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.last, self.parts = time.perf_counter(), {}

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        self.last, self.parts[what] = now, now - self.last


def by_jaxq(folder: str, text: str, length: int) -> tuple[dict[str, float], float]:
    """What `jaxq eval` does, in steps."""
    clock = Clock()
    from jaxq.cli.evaluating import execute, load_model, model_windows, perplexity, read_documents

    clock("import")
    documents = read_documents(text)
    model, params = load_model(folder)
    clock("load")
    windows = model_windows(model, documents, length, text)
    clock("tokenize")
    forward = execute(model.forward)
    perplexity(forward, params, windows[:1])  # another shape than below, so about what compilation takes there
    clock("compile")
    found = perplexity(forward, params, windows)
    clock("run, with compilation")
    return clock.parts, found.perplexity


def by_transformers(folder: str, text: str, length: int) -> tuple[dict[str, float], float]:
    clock = Clock()
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clock("import")
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    clock("load")
    documents = [document.strip() for document in Path(text).read_text("utf-8").split(SEPARATOR)]
    rows = tokenizer([d for d in documents if d], add_special_tokens=False, verbose=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = torch.tensor([token for row in rows for token in (*first, *row)])
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    clock("tokenize")
    total = 0.0
    with torch.inference_mode():
        for batch in windows.split(8):
            logits = model(batch, use_cache=False).logits[:, :-1]
            total += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    clock("run")
    return clock.parts, float(np.exp(total / (len(windows) * (length - 1))))


BY: dict[str, Callable[[str, str, int], tuple[dict[str, float], float]]] = {
    "jaxq": by_jaxq,
    "transformers": by_transformers,
}


def one(which: str, folder: str, text: str, length: int) -> list[str]:
    return [sys.executable, __file__, text, folder, "--one", which, str(length)]


def run(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def compare(name: str, folder: str, text: str, repeats: int) -> None:
    length = json.loads((Path(folder) / "config.json").read_text())["max_position_embeddings"]
    ours = [sys.executable, "-m", "jaxq", "eval", folder, "--perplexity", text, "--length", str(length)]
    commands = {"jaxq": ours, "transformers": one("transformers", folder, text, length)}
    seconds: dict[str, list[float]] = {which: [] for which in commands}
    for _ in range(repeats):
        for which, command in commands.items():
            seconds[which].append(run(command)[0])
    t = {which: median(values) for which, values in seconds.items()}
    print(f"{name}, windows of {length}: jaxq {t['jaxq']:.2f} s, transformers {t['transformers']:.2f} s, "
          f"ratio {t['jaxq'] / t['transformers']:.2f}", flush=True)  # fmt: skip
    for which in commands:
        parts, found = json.loads(run(one(which, folder, text, length))[1].splitlines()[-1])
        print(f"  {which}: perplexity {found:.4f};", ", ".join(f"{k} {v:.2f} s" for k, v in parts.items()), flush=True)


def write_opt(folder: Path, tokenizer_of: str) -> None:
    from transformers import AutoTokenizer

    from jaxq.models import init, model_of, save_hf

    params = init(OPT)
    save_hf(model_of(OPT, params, AutoTokenizer.from_pretrained(tokenizer_of)), params, folder)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("text")
    args.add_argument("models", nargs="+")
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = args.parse_args()
    if given.one:
        which, length = given.one
        print(json.dumps(BY[which](given.models[0], given.text, int(length))))
        return
    for folder in given.models:
        compare(Path(folder).name, folder, given.text, given.repeats)
    with tempfile.TemporaryDirectory() as temporary:
        folder, text = Path(temporary) / "opt", Path(temporary) / "text.txt"
        write_opt(folder, given.models[0])
        documents = Path(given.text).read_text("utf-8").split(SEPARATOR)
        text.write_text(SEPARATOR.join(documents[: len(documents) // 10]), "utf-8")
        compare("OPT, width 768", str(folder), str(text), given.repeats)


if __name__ == "__main__":
    main()
