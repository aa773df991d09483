"""Perplexity (of an encoder: STS-B's correlation) by method and bits on one model and text: the table that decides what
helps.

    python experiments/methods_table.py MODEL --calibration TRAIN.txt --text VALID.txt --length 256 [--windows 64]
    python experiments/methods_table.py MODEL --calibration STS-TRAIN.csv --sts STS-DEV.csv

Methods: round to nearest, SmoothQuant, gamma migration, OS+ (its defaults), OS+ with its search on fewer batches (of 8
windows or sentences each), OS+ with the run-time shift where consumers have no bias (LLaMA), and OS+ without the shift.
Weights per channel, asymmetric; the head stays float.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from float_table import language, sentences

import jaxq
from jaxq.models import load
from jaxq.steps import channel_scale, channel_shift, nothing, run_time_shift

METHODS = {
    "round to nearest": nothing(),
    "SmoothQuant": jaxq.smooth_quant(),
    "gamma migration": jaxq.gamma_migration(),
    "OS+ scale only": jaxq.os_plus(shift=nothing()),
    "OS+ shift only": channel_shift(),
    "OS+": jaxq.os_plus(),
    "OS+ on one batch": jaxq.os_plus(scale=channel_scale(batches=1)),
    "OS+ on two batches": jaxq.os_plus(scale=channel_scale(batches=2)),
    "OS+ run-time shift": jaxq.os_plus(shift=run_time_shift()),
}
ACTIVATIONS = {"per tensor": jaxq.per_tensor, "per token": jaxq.per_token}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    args.add_argument("model")
    args.add_argument("--calibration", type=Path, required=True)
    args.add_argument("--text", type=Path)
    args.add_argument("--sts", type=Path)
    args.add_argument("--length", type=int, default=256)
    args.add_argument("--windows", type=int, default=64, help="windows evaluated")
    args.add_argument("--samples", type=int, default=32, help="windows or sentences calibrated on")
    given = args.parse_args()
    model = load(given.model)
    batches, masks, score = (sentences if given.sts else language)(model, given)
    head = [] if not model.causal else ["lm_head*"] if "lm_head" in model.params else ["embed*"]
    print(f"{given.model}: full precision {score(model.forward, model.params):.4f}", flush=True)
    for bits in (8, 6, 4):
        for granularity, quantizer in ACTIVATIONS.items():
            numbers = jaxq.Int(bits, symmetric=False)
            end = jaxq.quantize(jaxq.per_channel(numbers), quantizer(numbers))
            for name, method in METHODS.items():
                recipe = jaxq.skip(head, jaxq.chain(method, end))
                quantized = jaxq.calibrate(model.forward, model.params, batches, recipe, masks=masks)
                found = score(jaxq.execute(model.forward), quantized)
                print(f"W{bits}A{bits} {granularity:10} {name:18} {found:9.4f}", flush=True)


if __name__ == "__main__":
    main()
