"""Saving and loading a quantized model: arrays by Orbax, everything else in a readable `jaxq.json`.

A saved model is a directory. `jaxq.json` holds the version, the caller's `about`, and the tree as `described`
says. Loading needs no template and no model code, and runs nothing that the files contain.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import numpy as np

from jaxq.qtensor import Quantized
from jaxq.storage.described import RECORDS, describe, kind, restore
from jaxq.storage.version_1 import RECORDS_1

VERSION = 3
READ = {1: RECORDS_1, 2: RECORDS, VERSION: RECORDS}  # version 2 had weights in one order only
STRUCTURE, ARRAYS = "jaxq.json", "arrays"


def save(
    path: str | os.PathLike[str],
    quantized: Quantized,
    about: dict[str, Any],
    also: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the directory `path`, all of it or none of it; `also(folder)` may put further files into it.

    `quantized.params` is made of dicts with str or int keys, lists, tuples, arrays and QTensors. `about` is whatever
    JSON can say of the model (recipe, source, measurements). Raises FileExistsError where `path` exists, TypeError if
    `quantized` is no Quantized and ValueError, naming the place in the tree, for what cannot be stored; all before
    anything is written.
    """
    path = Path(path).absolute()
    if not isinstance(quantized, Quantized):
        raise TypeError(f"{path}: saved is what `calibrate` or `pack` returns, not {kind(quantized)}")
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: choose another path, or remove it first")
    arrays: dict[str, np.ndarray] = {}
    document = {"version": VERSION, "about": _plain(about, "about"), "tree": describe(quantized, "", arrays)}
    text = json.dumps(document, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{uuid4().hex[:8]}")
    try:
        aside.mkdir()
        (aside / STRUCTURE).write_text(text, "utf-8")
        if arrays:
            from orbax.checkpoint import v1 as ocp  # slow to import

            ocp.save(str(aside / ARRAYS), arrays)
        also(aside)
        os.rename(aside, path)
    except BaseException:  # also an interrupt: whatever ends the save, nothing half-written stays
        shutil.rmtree(aside, ignore_errors=True)
        raise


def load(path: str | os.PathLike[str]) -> tuple[Quantized, dict[str, Any]]:
    """Reads what `save` wrote: the model, bit for bit, and `about`; also what earlier versions wrote.

    Arrays come back as JAX arrays; a float64 or int64 one stays a NumPy array unless jax_enable_x64 is set. Raises
    FileNotFoundError for a missing directory or `jaxq.json`, and ValueError, naming the file and the culprit, for
    anything damaged or of another version.
    """
    path = Path(path).absolute()
    document = _read_document(path)
    arrays: dict[str, np.ndarray] = {}
    if (path / ARRAYS).exists():
        from orbax.checkpoint import v1 as ocp

        try:
            arrays = ocp.load(str(path / ARRAYS))
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise ValueError(f"{path / ARRAYS}: the arrays cannot be read, the files are damaged ({error})") from error
    try:
        quantized = restore(document["tree"], arrays, READ[document["version"]])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {STRUCTURE} and the arrays do not make a model: {error}") from error
    if not isinstance(quantized, Quantized):
        raise ValueError(f"{path / STRUCTURE}: holds a {type(quantized).__name__} where a Quantized was expected")
    return quantized, document["about"]


def _read_document(path: Path) -> dict[str, Any]:
    file = path / STRUCTURE
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {path} is not a model that jaxq saved")
    try:
        document = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON, the file is damaged ({error})") from error
    version = document.get("version") if isinstance(document, dict) else None
    if version not in tuple(READ):
        raise ValueError(f"{file}: version {version!r}, this jaxq reads versions {', '.join(map(str, READ))}")
    if not {"about", "tree"} <= document.keys():
        raise ValueError(f"{file}: the keys 'about' and 'tree' are expected, found {sorted(document)}")
    return document


def _plain(value: Any, at: str) -> Any:
    """`value` as JSON can hold it: NumPy and JAX scalars become Python's; ValueError names what has no JSON form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(child, f"{at}.{key}") for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child, f"{at}.{k}") for k, child in enumerate(value)]
    if isinstance(value, jax.Array | np.ndarray | np.generic) and value.ndim == 0:
        return _plain(value.item(), at)
    raise ValueError(f"{at}: {kind(value)} has no JSON form; use dicts with str keys, lists, numbers and strings")
