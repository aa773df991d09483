"""`jaxq eval` and `jaxq sites`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.cli.quantizing import model_windows
from jaxq.evaluate import perplexity, read_documents
from jaxq.execute import execute
from jaxq.models import load
from jaxq.report import console, table
from jaxq.saved import load_model
from jaxq.sites import WIDTH, sites


def evaluate_command(name: str, text: Path, length: int, batch_size: int, out: Path | None) -> None:
    documents = read_documents(text)
    model, quantized = load_model(name)
    windows = model_windows(model, documents, length, text)
    result = perplexity(execute(model.forward), quantized, windows, batch_size, progress=console().is_terminal)
    row = (name, result.perplexity, result.tokens, round(result.seconds, 1))
    console().print(table(f"perplexity on {text}", ["model", "perplexity", "tokens", "seconds"], [row]))
    _write(out, {"model": name, "text": str(text), "length": windows.shape[1], **asdict(result)})


def sites_command(name: str, out: Path | None) -> None:
    model = load(name)
    report = sites(model.forward, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    console(WIDTH).print(report)
    _write(out, {"model": name, **report.as_dict()})


def _write(out: Path | None, content: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
