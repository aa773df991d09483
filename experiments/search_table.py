"""How OS+'s coarse-to-fine search compares with the exhaustive one, by rule: on the losses of all thresholds of all
groups of a model, recorded once.

    python experiments/search_table.py MODEL --calibration TRAIN.txt --length 256 [--outliers] [--batches 4]
    python experiments/search_table.py MODEL --calibration STS-TRAIN.csv

Integers of 8, 6 and 4 bits per tensor, of 4 per token, and floats of 4 bits, each with and without the shift; weights
per channel; losses on one microbatch of 8, or on more. `--outliers` magnifies one channel in 64 before (4 to 30 times,
and divides the weights): the function stays the same, and the thresholds' losses look like those of models with
outliers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from float_table import USUAL, Int, min_max

import jaxq
from jaxq.evaluate import pack, read_documents, read_sts
from jaxq.evaluate.text import pad
from jaxq.models import load
from jaxq.search import Search, coarse_to_fine, exhaustive, search
from jaxq.steps import Group, Step, channel_scale, channel_shift, foldable, nothing
from jaxq.steps.group import transformed
from jaxq.steps.shift import touch

NUMBERS = {f"W{b}A{b} per tensor": min_max(Int(b, symmetric=False), Int(b, symmetric=False)) for b in (8, 6, 4)} | {
    "W4A4 per token": jaxq.quantize(jaxq.per_channel(Int(4, symmetric=False)), jaxq.per_token(Int(4, symmetric=False))),
    "W4A4 floats": min_max(USUAL[4], USUAL[4]),
}
RULES = {
    "stride 8, keep 3": coarse_to_fine(8, 3, within=0),
    "stride 8, keep 4": coarse_to_fine(8, 4, within=0),
    "stride 4, keep 4": coarse_to_fine(4, 4, within=0),
    "stride 8, within 0.05": coarse_to_fine(8, 3, within=0.05),
    "stride 16, within 0.1": coarse_to_fine(16, 3, within=0.1),
    "stride 8, within 0.1": coarse_to_fine(),
}


def outliers() -> Step:
    rng = np.random.default_rng(0)

    def apply(group: Group) -> Group:
        if not foldable(group.plan) or not group.can_scale():
            return group
        times = np.ones(group.channels, np.float32)
        loud = rng.choice(times.size, max(1, times.size // 64), replace=False)
        times.flat[loud] = rng.uniform(4, 30, len(loud))
        return transformed(group, scale=jnp.asarray(1 / times))

    return Step(touch(foldable), apply)


def curves(model, batches: list, masks: list | None, before: Step, looked_at: int) -> list[np.ndarray]:
    head = [] if not model.causal else ["lm_head*"] if "lm_head" in model.params else ["embed*"]
    found: list[np.ndarray] = []

    def note(group: Group) -> None:
        if len(losses := group.log.get("losses", ())):
            found.append(np.asarray(losses))

    for end in NUMBERS.values():
        for shift in (channel_shift(), nothing()):
            recipe = jaxq.chain(before, shift, channel_scale(search=exhaustive(), batches=looked_at), end)
            jaxq.calibrate(model.forward, model.params, batches, jaxq.skip(head, recipe), masks=masks, on_group=note)
    return found


def tried(rule: Search, losses: np.ndarray) -> tuple[int, float, bool]:
    """How many candidates, by what share the loss is above the least, and whether the choice is the same."""
    best, seen = search(rule, np.arange(len(losses)), lambda i: losses[i])
    return int(np.isfinite(seen).sum()), losses[best] / losses.min() - 1, best == losses.argmin()


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("model")
    args.add_argument("--calibration", type=Path, required=True)
    args.add_argument("--length", type=int, default=256)
    args.add_argument("--samples", type=int, default=32, help="windows or sentences calibrated on")
    args.add_argument("--batches", type=int, default=1, help="of 8 each, that the losses are of")
    args.add_argument("--outliers", action="store_true")
    given = args.parse_args()
    model = load(given.model)
    if given.calibration.suffix == ".csv":
        tokens, mask = pad([row[0] for row in read_sts(given.calibration)][: given.samples], model.tokenizer, 64)
        masks = [jnp.asarray(m) for m in np.split(mask, len(mask) // 8)]
        batches = list(zip(np.split(tokens, len(masks)), masks))
    else:
        tokens = pack(read_documents(given.calibration), model.tokenizer, given.length)[: given.samples]
        masks, batches = None, [(b,) for b in np.split(tokens, len(tokens) // 8)]
    found = curves(model, batches, masks, outliers() if given.outliers else nothing(), given.batches)
    print(f"{given.model}: {len(found)} groups of {min(map(len, found))} to {max(map(len, found))} candidates")
    for name, rule in RULES.items():
        counts, excess, same = map(np.array, zip(*(tried(rule, losses) for losses in found)))
        print(
            f"{name:22} {counts.mean():5.1f} tried, same choice {same.mean():6.1%}, "
            f"loss above the least: mean {excess.mean():.3%}, at most {excess.max():.2%}"
        )


if __name__ == "__main__":
    main()
