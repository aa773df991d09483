"""`jaxq generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxq.cache import new_cache
from jaxq.evaluate import pack as windows
from jaxq.execute import execute
from jaxq.generate import generate
from jaxq.models import Model
from jaxq.pack import pack
from jaxq.report import console, say, table
from jaxq.storage.models import load_to_run


def generate_command(
    name: str, prompt: str, count: int, cache: str, packed: bool, temperature: float, seed: int, out: Path | None
) -> None:
    model, quantized = load_to_run(name)
    if not model.causal:
        raise ValueError(f"{name} is an encoder, which does not go on with a text")
    tokens = _tokens(model, prompt)
    length = tokens.shape[1] + count - 1
    context = model.config.get("max_position_embeddings") or length
    if length > context:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} tokens and {count} more: {name} reads {context} at most (and need not read "
            "the last one); ask for less with `--tokens`"
        )
    params = pack(quantized) if packed else quantized
    caches = new_cache(model.kept, 1, length, cache)
    result = generate(execute(model.step), params, tokens, caches, count, temperature, seed)
    text = model.tokenizer.decode(_until(result.tokens[0].tolist(), model.tokenizer.eos_token_id))
    say(prompt + text)
    title = f"{name}, {tokens.shape[1]} tokens and {count} more, {cache} cache"
    row = (result.prefill, result.decode if count > 1 else None, round(result.compilation, 1))
    columns = ["prefill, tokens/s", "decode, tokens/s", "compilation, s"]
    console().print(table(title, columns, [row]))
    if out is not None:
        found: dict[str, Any] = {"model": name, "prompt": prompt, "text": text, "tokens": result.tokens[0].tolist()}
        speed = {"prefill": row[0], "decode": row[1], "compilation": result.compilation}
        out.write_text(json.dumps(found | {"cache": cache, "packed": packed, **speed}, indent=1) + "\n", "utf-8")


def _tokens(model: Model, prompt: str) -> Any:
    """A prompt as a model has it, int32 `[1, T]`: what texts are calibrated and evaluated on begins the same way."""
    if model.tokenizer is None:
        raise ValueError(f"{model.name}: no tokenizer files in it, so text cannot be read for it")
    one_by_one = windows([prompt], model.tokenizer, 1, vocab_size=model.config["vocab_size"], source="--prompt")
    return one_by_one.reshape(1, -1)


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
