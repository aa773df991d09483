"""A quantized model on disk: what `storage` writes, with the configuration, tokenizer or preprocessor beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.models import Model, cast_once, load, model_of
from jaxq.models.build import in_float32
from jaxq.models.hf import check_finite, read_preprocessor, read_tokenizer, save_readers
from jaxq.program.trace import named_leaves
from jaxq.qtensor import Packed, Quantized
from jaxq.storage.trees import ARRAYS, STRUCTURE
from jaxq.storage.trees import load as load_quantized
from jaxq.storage.trees import save as save_quantized

CONFIG, COMPUTES_IN = "config.json", "computes_in"


def save_model(
    path: str | os.PathLike[str],
    model: Model,
    quantized: Quantized,
    about: dict[str, Any],
    writers: Mapping[str, Callable[[Path], None]] = MappingProxyType({}),
) -> None:
    """Writes a directory from which `load_model` needs nothing else; all of it or none of it.

    Args:
      model: where the configuration and the tokenizer or preprocessor come from; its parameters are not read.
      about: whatever JSON can say of the model; `computes_in` is added where the model says so.
      writers: by its name, what writes a further folder in it: the same model in another format.

    Raises FileExistsError where `path` exists, and what `storage.save` and the writers raise.
    """

    def further(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(model.config, indent=2, sort_keys=True) + "\n", "utf-8")
        save_readers(model, folder)
        for name, write in writers.items():
            write(folder / name)

    computes_in = {} if model.computes_in is None else {COMPUTES_IN: model.computes_in}
    save_quantized(path, quantized, about | computes_in, further)


def load_model(name_or_dir: str | os.PathLike[str]) -> tuple[Model, Quantized]:
    """A model that `save_model` wrote, or any that `jaxq.models.load` knows (then with nothing quantized).

    Raises FileNotFoundError and ValueError as `storage.load` and `models.load` do.
    """
    path = Path(name_or_dir)
    if not (path / STRUCTURE).is_file():
        model = load(str(name_or_dir))
        return model, Quantized(model.params)
    quantized, about = load_quantized(path)
    config, name = _config(path / CONFIG), str(about.get("name", path.name))
    model = model_of(config, quantized.params, read_tokenizer(path), name, read_preprocessor(path))
    return (in_float32(model) if about.get(COMPUTES_IN) else model), quantized


def load_to_run(name_or_dir: str | os.PathLike[str]) -> tuple[Model, Quantized]:
    """As `load_model`, for many calls: what the model would cast at each of them is cast now."""
    model, quantized = load_model(name_or_dir)
    return model, replace(quantized, params=cast_once(model, quantized.params))


def check_weights(name_or_dir: str | os.PathLike[str]) -> None:
    """Reads all that `load_model` takes; ValueError, with file and name, for a tensor that holds NaN or infinity."""
    path = Path(name_or_dir)
    if not (path / STRUCTURE).is_file():
        return check_finite(str(name_or_dir))
    quantized, _ = load_quantized(path)
    for where, leaf in named_leaves((quantized.params, quantized.inputs)):
        parts = (leaf, leaf.grid) if isinstance(leaf, Packed) else leaf  # whose scales may be bytes
        numbers = [part for part in jax.tree.leaves(parts) if jnp.issubdtype(part.dtype, jnp.floating)]
        if not all(jnp.isfinite(part).all() for part in numbers):
            name = where.partition("/")[2]
            raise ValueError(f"{path / ARRAYS}: {name} holds NaN or infinity; quantize the model or copy it again")


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; `jaxq quantize` writes it beside {STRUCTURE}")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
