"""`jaxq demo`: the embedded language model, quantized in several ways, and what outliers have to do with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxq.calibrate import calibrate
from jaxq.evaluate import pack, perplexity, stdlib_documents
from jaxq.execute import execute
from jaxq.formats import AnyFloat, Int
from jaxq.models import Model, load
from jaxq.quantizer import per_channel, per_tensor, per_token
from jaxq.report import console, progress, say
from jaxq.search import exhaustive
from jaxq.steps import (
    FloatSearch,
    Group,
    Step,
    chain,
    channel_range,
    channel_shift,
    fed_by_norm,
    fpq_baseline,
    llm_fp4,
    log_clips,
    nothing,
    os_plus,
    quantize,
    skip,
    smooth_quant,
)

MODEL = "stdlib-opt"
BITS = (8, 6, 4)
ACTIVATIONS = {"per tensor": per_tensor, "per token": per_token}
METHODS = {"round to nearest": nothing(), "SmoothQuant": smooth_quant(), "OS+": os_plus()}
# Shorter than the default, as this is a demo: one turn and few clip values.
SEARCH = FloatSearch(rounds=1, clips=log_clips(count=16), method=exhaustive())
PAPER = ((8, 8), (6, 6), (4, 8), (4, 4))  # LLM-FP4's bits of weights and activations
CALIBRATION_WINDOWS, BATCH = 16, 4


@dataclass(frozen=True)
class Setting:
    name: str
    method: str
    step: Step


def settings() -> list[Setting]:
    """Integers and then floats, whose activations are per tensor."""
    numbers = {bits: Int(bits, symmetric=False) for bits in BITS}
    integers = [
        Setting(f"W{bits}A{bits} {name}", method, chain(step, quantize(per_channel(fmt), activations(fmt))))
        for bits, fmt in numbers.items()
        for name, activations in ACTIVATIONS.items()
        for method, step in METHODS.items()
    ]
    floats = [Setting(f"W{w}A{a} float", *method) for w, a in PAPER for method in paper_methods(w, a).items()]
    return integers + floats


def paper_methods(weights: int, activations: int) -> dict[str, Step]:
    """LLM-FP4 and what its paper compares it with, on one static grid for each activation tensor. MinMax integers of
    as many bits for both are round to nearest per tensor."""
    methods = {
        "MinMax FP": quantize(AnyFloat(weights).usual, AnyFloat(activations).usual),
        "FPQ baseline": fpq_baseline(weights, activations, search=SEARCH),
        "LLM-FP4": llm_fp4(weights, activations, search=SEARCH),
    }
    if weights != activations:
        numbers = (Int(bits, symmetric=False) for bits in (weights, activations))
        return {"MinMax INT": quantize(*numbers)} | methods
    if weights == 4:
        methods["OS+ shift, LLM-FP4"] = chain(channel_shift(), methods["LLM-FP4"])
    return methods


@dataclass(frozen=True)
class Result:
    setting: Setting | None  # None: full precision
    perplexity: float
    calibration: float | None  # seconds
    evaluation: float


@dataclass
class Seen:
    """What OS+ did to the outputs of the norms: each channel's (min, max) before and after, and the search's losses."""

    before: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    after: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    search: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def note(self, group: Group) -> None:
        name, (low, high) = group.plan.name, channel_range(group)
        if not fed_by_norm(group.plan) or group.scale is None:
            return
        shift = jnp.float32(0) if group.shift is None else group.shift
        self.after[name] = np.asarray(low), np.asarray(high)
        self.before[name] = np.asarray(low * group.scale + shift), np.asarray(high * group.scale + shift)
        self.search[name] = np.asarray(group.log["thresholds"]), np.asarray(group.log["losses"])


def run_demo(out: Path, windows: int) -> None:
    """Prints a table of perplexities and writes `ranges.png` and `search.png` into the folder `out`."""
    started = time.perf_counter()
    say(f"loading {MODEL}, which comes with jaxq, and the source text of this Python's standard library")
    model = load(MODEL)
    length = model.config["max_position_embeddings"]
    train = pack(_some(stdlib_documents("train"), 40), model.tokenizer, length)
    heldout = pack(stdlib_documents("heldout"), model.tokenizer, length)
    batches = np.split(_spread(train, CALIBRATION_WINDOWS), CALIBRATION_WINDOWS // BATCH)
    texts = _spread(heldout, windows)
    say(
        f"calibrating on {CALIBRATION_WINDOWS} windows of {length} tokens, evaluating on {len(texts)} windows of "
        "modules that the model has not seen"
    )
    seen = Seen()
    results = [_measure(model, batches, texts, None, seen)]
    for setting in progress(settings(), "quantizing and evaluating"):
        results.append(_measure(model, batches, texts, setting, seen))
    console().print(_table(results, len(texts) * (length - 1)))
    worst = _worst(seen.before)
    say(
        f"Outliers: at {worst} the largest channel of the norm's output is {outlier_ratio(*seen.before[worst]):.1f} "
        f"times the median channel; after OS+'s shift and scale, {outlier_ratio(*seen.after[worst]):.1f} times."
    )
    plots = _plot(out, seen, worst)
    say(f"plots: {', '.join(map(str, plots))}; {time.perf_counter() - started:.0f} s in all")


def outlier_ratio(low: np.ndarray, high: np.ndarray) -> float:
    """The largest channel's absolute maximum over the median channel's; arrays [channels]."""
    size = np.maximum(np.abs(low), np.abs(high))
    return float(size.max() / np.median(size))


def _measure(
    model: Model, batches: Sequence[np.ndarray], texts: np.ndarray, setting: Setting | None, seen: Seen
) -> Result:
    params: Any = model.params
    calibration = None
    if setting is not None:
        started = time.perf_counter()
        watch = setting.method == "OS+" and setting.name == "W8A8 per tensor"
        on_group = seen.note if watch else None
        step = skip(["embed*"], setting.step)
        params = calibrate(model.forward, model.params, batches, step, on_group=on_group)
        calibration = time.perf_counter() - started
    found = perplexity(execute(model.forward), params, texts)
    return Result(setting, found.perplexity, calibration, found.seconds)


def _some(documents: list[str], count: int) -> list[str]:
    return documents[:: max(1, len(documents) // count)]


def _spread(windows: np.ndarray, count: int) -> np.ndarray:
    """`count` windows, evenly from the whole text."""
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]


def _worst(ranges: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    return max(ranges, key=lambda name: outlier_ratio(*ranges[name]))


def _table(results: list[Result], tokens: int) -> Table:
    title = f"perplexity of {MODEL} on {tokens} held-out tokens (times include compilation)"
    caption = "float: activations per tensor, and a coarser search than the default one"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("numbers", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("perplexity", "calibration", "evaluation"):
        table.add_column(column, justify="right", no_wrap=True)
    for i, result in enumerate(results):
        setting = result.setting
        after = results[i + 1].setting if i + 1 < len(results) else None
        numbers = f"{result.perplexity:.2f}", _seconds(result.calibration), _seconds(result.evaluation)
        last = after is None or setting is None or after.name != setting.name
        names = (setting.name, setting.method) if setting else ("full precision", "")
        table.add_row(*names, *numbers, end_section=last)
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _plot(out: Path, seen: Seen, name: str) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    for axis, ranges, when in zip(axes, (seen.before[name], seen.after[name]), ("before", "after")):
        axis.bar(np.arange(len(ranges[0])), ranges[1] - ranges[0], bottom=ranges[0], width=1.0)
        axis.set_title(f"{when} OS+: largest channel {outlier_ratio(*ranges):.1f} times the median")
        axis.set_ylabel("min to max")
    axes[1].set_xlabel(f"channel of the norm's output that {name} reads")
    figure.savefig(out / "ranges.png", dpi=120)
    plt.close(figure)

    thresholds, losses = seen.search[name]
    tried = np.isfinite(losses)
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.plot(thresholds[tried], losses[tried], "o-", markersize=3)
    axis.axvline(thresholds[np.nanargmin(losses)], linestyle=":", color="black")
    axis.set(xlabel="threshold t", ylabel="error of the group's outputs", title=f"OS+'s search at {name}")
    figure.savefig(out / "search.png", dpi=120)
    plt.close(figure)
    return [out / "ranges.png", out / "search.png"]
