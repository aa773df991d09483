"""`jaxq eval` and `jaxq sites`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.arrays import NotFinite
from jaxq.cli.calibration import model_windows, within_context
from jaxq.evaluate import (
    Accuracy,
    classify,
    classify_images,
    perplexity,
    read_documents,
    read_images,
    read_labelled,
    read_sts,
    sts,
)
from jaxq.execute import execute
from jaxq.models import load
from jaxq.report import console, table
from jaxq.sites import WIDTH, sites
from jaxq.storage.models import check_weights, load_to_run

LONGEST = 2048  # tokens that a task's item may have, where a model's positions have no end


@contextmanager
def blaming_weights(name: str) -> Iterator[None]:
    """Where what a model computes is not finite: names the weight that is not, if one is."""
    try:
        yield
    except NotFinite:
        check_weights(name)
        raise


def perplexity_command(name: str, text: Path, length: int, batch_size: int | None, out: Path | None) -> None:
    documents = read_documents(text)
    model, quantized = load_to_run(name)
    if not model.causal:
        raise ValueError(
            f"{name} is an encoder, which has no perplexity: measure it by `--sts`, `--classify` or `--images`"
        )
    windows = model_windows(model, documents, length, text)
    result = perplexity(execute(model.forward), quantized, windows, batch_size, progress=console().is_terminal)
    row = (name, result.perplexity, result.tokens, round(result.seconds, 1))
    console().print(table(f"perplexity on {text}", ["model", "perplexity", "tokens", "seconds"], [row]))
    _write(out, {"model": name, "text": str(text), "length": windows.shape[1], **asdict(result)})


def sts_command(name: str, pairs: Path, length: int, batch_size: int, out: Path | None) -> None:
    rows = read_sts(pairs)
    model, quantized = load_to_run(name)
    length, forward, few = within_context(model, length), execute(model.forward), (1, 8)
    like = jax.ShapeDtypeStruct(few, jnp.int32), jax.ShapeDtypeStruct(few, jnp.bool_)
    shape = jax.eval_shape(forward, quantized, *like).shape
    if shape != (*few, model.config["hidden_size"]):
        raise ValueError(f"{name} gives {list(shape)} for tokens {list(few)}; `--sts` is for encoders without a head")
    result = sts(forward, quantized, model.tokenizer, rows, batch_size, length, progress=console().is_terminal)
    row = (name, result.spearman, result.pairs, round(result.seconds, 1))
    console().print(table(f"similarity on {pairs}", ["model", "Spearman", "pairs", "seconds"], [row]))
    _write(out, {"model": name, "sts": str(pairs), "length": length, **asdict(result)})


def tasks_command(name: str, tasks: list[str], limit: int | None, batch_size: int, out: Path | None) -> None:
    try:
        from jaxq.evaluate.harness import HarnessModel, run_tasks
    except ModuleNotFoundError as error:
        raise ValueError(f'--tasks needs lm-evaluation-harness (no {error.name}): pip install "jaxq[eval]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it says much about its defaults
    model, quantized = load_to_run(name)
    if not model.causal:
        raise ValueError(f"{name} is an encoder; tasks are for language models")
    context = within_context(model, model.config.get("max_position_embeddings") or LONGEST)
    show = console().is_terminal
    harness = HarnessModel(execute(model.forward), quantized, model.tokenizer, context, batch_size, show)
    start = time.perf_counter()
    results = run_tasks(harness, tasks, limit)
    found = {
        task: {k.split(",")[0]: v for k, v in of.items() if "," in k and isinstance(v, float | int)}
        for task, of in results.items()
    }
    rows = [
        (task, metric, value, results[task]["sample_len"]) for task, of in found.items() for metric, value in of.items()
    ]
    console().print(table(f"tasks, {name}", ["task", "metric", "value", "items"], rows))
    _write(out, {"model": name, "tasks": found, "limit": limit, "seconds": time.perf_counter() - start})


def classify_command(name: str, file: Path, length: int, batch_size: int, out: Path | None) -> None:
    rows = read_labelled(file)
    model, quantized = load_to_run(name)
    length = within_context(model, length)
    forward, progress = execute(model.forward), console().is_terminal
    found = classify(forward, quantized, model, rows, batch_size, length, progress)
    _say_accuracy(name, file, found)
    _write(out, {"model": name, "classify": str(file), "length": length, **asdict(found)})


def images_command(name: str, file: Path, batch_size: int, out: Path | None) -> None:
    images, labels = read_images(file)
    model, quantized = load_to_run(name)
    forward, progress = execute(model.forward), console().is_terminal
    found = classify_images(forward, quantized, model, images, labels, batch_size, progress)
    _say_accuracy(name, file, found)
    _write(out, {"model": name, "images": str(file), **asdict(found)})


def _say_accuracy(name: str, file: Path, found: Accuracy) -> None:
    row = (name, found.accuracy, found.matthews, found.examples, round(found.seconds, 1))
    columns = ["model", "accuracy", "Matthews", "examples", "seconds"]
    console().print(table(f"accuracy on {file}", columns, [row]))


def sites_command(name: str, out: Path | None) -> None:
    model = load(name)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    like = tokens if model.pixels is None else jax.ShapeDtypeStruct((1, *model.pixels), jnp.float32)
    report = sites(model.forward, model.params, like)
    console(WIDTH).print(report)
    _write(out, {"model": name, **report.as_dict()})


def _write(out: Path | None, content: dict[str, Any]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
