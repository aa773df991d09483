"""Perplexity by method and bits on one model and text: the table that decides what helps.

    python experiments/methods_table.py MODEL --calibration TRAIN.txt --text VALID.txt --length 256 [--windows 64]

Methods: round to nearest, SmoothQuant, gamma migration, OS+ (its defaults), OS+ with the run-time shift where
consumers have no bias (LLaMA), and OS+ without the shift. Weights per channel, asymmetric; the head stays float.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import jaxq
from jaxq.evaluate import pack, perplexity, read_documents
from jaxq.models import load
from jaxq.steps import channel_shift, nothing, run_time_shift

METHODS = {
    "round to nearest": nothing(),
    "SmoothQuant": jaxq.smooth_quant(),
    "gamma migration": jaxq.gamma_migration(),
    "OS+ scale only": jaxq.os_plus(shift=nothing()),
    "OS+ shift only": channel_shift(),
    "OS+": jaxq.os_plus(),
    "OS+ run-time shift": jaxq.os_plus(shift=run_time_shift()),
}
ACTIVATIONS = {"per tensor": jaxq.per_tensor, "per token": jaxq.per_token}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("model")
    args.add_argument("--calibration", type=Path, required=True)
    args.add_argument("--text", type=Path, required=True)
    args.add_argument("--length", type=int, default=256)
    args.add_argument("--windows", type=int, default=64, help="windows evaluated")
    args.add_argument("--samples", type=int, default=32, help="windows calibrated on")
    given = args.parse_args()
    model = load(given.model)
    train = pack(read_documents(given.calibration), model.tokenizer, given.length)[: given.samples]
    texts = pack(read_documents(given.text), model.tokenizer, given.length)[: given.windows]
    batches = np.split(train, max(1, len(train) // 8))
    head = ["lm_head*"] if "lm_head" in model.params else ["embed*"]
    print(f"{given.model}: full precision {perplexity(model.forward, model.params, texts).perplexity:.3f}")
    for bits in (8, 6, 4):
        for granularity, quantizer in ACTIVATIONS.items():
            numbers = jaxq.Int(bits, symmetric=False)
            end = jaxq.quantize(jaxq.per_channel(numbers), quantizer(numbers))
            for name, method in METHODS.items():
                recipe = jaxq.skip(head, jaxq.chain(method, end))
                quantized = jaxq.calibrate(model.forward, model.params, batches, recipe)
                found = perplexity(jaxq.execute(model.forward), quantized, texts).perplexity
                print(f"W{bits}A{bits} {granularity:10} {name:18} {found:9.3f}", flush=True)


if __name__ == "__main__":
    main()
