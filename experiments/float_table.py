"""What floats of few bits cost, by method: perplexity of a language model, or STS-B's correlation of an encoder.

    python experiments/float_table.py MODEL --calibration TRAIN.txt --text VALID.txt --length 256
    python experiments/float_table.py MODEL --calibration STS-TRAIN.csv --sts STS-DEV.csv

Weights per output channel, activations per tensor (both static), the head in full precision, embeddings too but in the
row that says so. "+ FPQ" is LLM-FP4's joint search, pre- or post-shifted as is better for each group, after the step
that is named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq.evaluate import pack, perplexity, read_documents, read_sts, sts
from jaxq.evaluate.text import pad
from jaxq.models import load
from jaxq.steps import Step, channel_shift, fed_by_norm

Int, Float = jaxq.Int, jaxq.Float
USUAL = {4: Float(2, 1), 6: Float(3, 2), 8: Float(4, 3)}


def min_max(fmt_w, fmt_x) -> Step:
    return jaxq.quantize(jaxq.per_channel(fmt_w), jaxq.per_tensor(fmt_x))


def with_embeddings(w: int, x: int, head: list[str]) -> Step:
    """A tied table is read by the head with the same codes."""
    tables = jaxq.llm_fp4(None, None, embeddings=4)
    return jaxq.partition({p: tables for p in head if p != "lm_head*"} | {"*": jaxq.llm_fp4(w, x, embeddings=4)})


def methods(w: int, x: int) -> dict[str, Step]:
    fpq = jaxq.llm_fp4(w, x)
    shift, scale = channel_shift(), jaxq.os_plus(shift=jaxq.chain())
    found = {
        "MinMax INT": min_max(Int(w, symmetric=False), Int(x, symmetric=False)),
        "MinMax FP": min_max(USUAL[w], USUAL[x]),
        "FPQ baseline": jaxq.fpq_baseline(w, x),
        "FPQ": fpq,
        "FPQ pre-shifted": jaxq.pre_shifted_fp4(w, x),
        "FPQ post-shifted": jaxq.post_shifted_fp4(w, x),
    }
    if (w, x) != (4, 4):
        return found
    return found | {
        "OS+ INT": jaxq.chain(jaxq.os_plus(), min_max(Int(w, symmetric=False), Int(x, symmetric=False))),
        "OS+ shift, MinMax FP": jaxq.chain(shift, min_max(USUAL[w], USUAL[x])),
        "OS+, MinMax FP": jaxq.chain(jaxq.os_plus(), min_max(USUAL[w], USUAL[x])),
        "OS+ shift, baseline": jaxq.chain(shift, jaxq.fpq_baseline(w, x)),
        "OS+ shift + FPQ": jaxq.chain(shift, fpq),
        "OS+ scale + FPQ": jaxq.chain(scale, fpq),
        "OS+ + FPQ": jaxq.chain(jaxq.os_plus(), fpq),
        "OS+ scale, baseline": jaxq.chain(scale, jaxq.fpq_baseline(w, x)),
        "OS+, baseline": jaxq.chain(jaxq.os_plus(), jaxq.fpq_baseline(w, x)),
        "SmoothQuant, baseline": jaxq.chain(jaxq.smooth_quant(), jaxq.fpq_baseline(w, x)),
        "SmoothQuant + FPQ": jaxq.chain(jaxq.smooth_quant(where=fed_by_norm), fpq),
    }


def language(model, given) -> tuple[list, None, Callable]:
    train = pack(read_documents(given.calibration), model.tokenizer, given.length)[: given.samples]
    texts = pack(read_documents(given.text), model.tokenizer, given.length)[: given.windows]
    batches = [(b,) for b in np.split(train, max(1, len(train) // 8))]
    return batches, None, lambda forward, params: perplexity(forward, params, texts).perplexity


def sentences(model, given) -> tuple[list, list, Callable]:
    train = [row[0] for row in read_sts(given.calibration)][: given.samples]
    tokens, mask = pad(train, model.tokenizer, 64)
    count = max(1, len(train) // 8)
    masks = [jnp.asarray(m) for m in np.split(mask, count)]
    rows = read_sts(given.sts)
    batches = list(zip(np.split(tokens, count), masks))
    return batches, masks, lambda forward, params: sts(forward, params, model.tokenizer, rows, length=64).spearman


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("model")
    args.add_argument("--calibration", type=Path, required=True)
    args.add_argument("--text", type=Path)
    args.add_argument("--sts", type=Path)
    args.add_argument("--length", type=int, default=256)
    args.add_argument("--windows", type=int, default=64, help="windows evaluated")
    args.add_argument("--samples", type=int, default=32, help="windows or sentences calibrated on")
    args.add_argument("--bits", nargs="*", default=["4/4", "4/8", "6/6", "8/8"])
    given = args.parse_args()
    model = load(given.model)
    batches, masks, score = (sentences if given.sts else language)(model, given)
    head = [] if not model.causal else ["lm_head*"] if "lm_head" in model.params else ["embed*"]
    print(f"{given.model}: full precision {score(model.forward, model.params):.4f}", flush=True)
    for pair in given.bits:
        w, x = map(int, pair.split("/"))
        recipes = {name: jaxq.skip(head, recipe) for name, recipe in methods(w, x).items()}
        if w == x == 4:
            tables = with_embeddings(w, x, head)
            recipes["FPQ, embeddings E4"] = jaxq.skip([p for p in head if p == "lm_head*"], tables)
        for name, recipe in recipes.items():
            start = time.perf_counter()
            quantized = jaxq.calibrate(model.forward, model.params, batches, recipe, masks=masks)
            seconds = time.perf_counter() - start
            found = score(jaxq.execute(model.forward), quantized)
            print(f"W{w}A{x} {name:22} {found:9.4f}  calibrated in {seconds:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
