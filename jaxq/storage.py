"""Saving and loading a quantized model: arrays by Orbax, everything else in a readable `jaxq.json`.

A saved model is a directory. `jaxq.json` holds the version, the caller's `about`, and the tree as nested JSON: a
container or a dataclass is `{"<its type>": <its parts>}`, an array is `{"array": [<key>, <dtype>, <shape>, <crc32>]}`.
Loading needs no template and no model code, and runs nothing that the files contain.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxq.formats import Format
from jaxq.qtensor import Granularity, Grid, InputQuant, QTensor, Quantized, Transform

VERSION = 1
STRUCTURE, ARRAYS = "jaxq.json", "arrays"
RECORDS = {
    cls.__name__: cls
    for cls in (
        Quantized,
        InputQuant,
        QTensor,
        Grid,
        Transform,
        *get_args(Granularity),
        *get_args(Format),
    )
}


def save(
    path: str | os.PathLike[str],
    quantized: Quantized,
    about: dict[str, Any],
    also: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the directory `path`, all of it or none of it; `also(folder)` may put further files into it.

    `quantized.params` is made of dicts with str or int keys, lists, tuples, arrays and QTensors. `about` is whatever
    JSON can say of the model (recipe, source, measurements). Raises FileExistsError where `path` exists and ValueError,
    naming the place in the tree, for what cannot be stored; both before anything is written.
    """
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: choose another path, or remove it first")
    arrays: dict[str, np.ndarray] = {}
    document = {"version": VERSION, "about": _plain(about, "about"), "tree": _describe(quantized, "", arrays)}
    text = json.dumps(document, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{uuid4().hex[:8]}")
    try:
        aside.mkdir()
        (aside / STRUCTURE).write_text(text, "utf-8")
        if arrays:
            ocp.save(str(aside / ARRAYS), arrays)
        also(aside)
        os.rename(aside, path)
    except BaseException:  # also an interrupt: whatever ends the save, nothing half-written stays
        shutil.rmtree(aside, ignore_errors=True)
        raise


def load(path: str | os.PathLike[str]) -> tuple[Quantized, dict[str, Any]]:
    """Reads what `save` wrote: the model, bit for bit, and `about`.

    Arrays come back as JAX arrays; a float64 or int64 one stays a NumPy array unless jax_enable_x64 is set. Raises
    FileNotFoundError for a missing directory or `jaxq.json`, and ValueError, naming the file and the culprit, for
    anything damaged or of another version.
    """
    path = Path(path).absolute()
    document = _read_document(path)
    arrays: dict[str, np.ndarray] = {}
    if (path / ARRAYS).exists():
        try:
            arrays = ocp.load(str(path / ARRAYS))
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise ValueError(f"{path / ARRAYS}: the arrays cannot be read, the files are damaged ({error})") from error
    try:
        quantized = _restore(document["tree"], arrays)
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
    if version != VERSION:
        raise ValueError(f"{file}: version {version!r}, this jaxq reads version {VERSION}")
    if not {"about", "tree"} <= document.keys():
        raise ValueError(f"{file}: the keys 'about' and 'tree' are expected, found {sorted(document)}")
    return document


def _describe(node: Any, at: str, arrays: dict[str, np.ndarray]) -> Any:
    """`node` as JSON; its arrays are collected in `arrays` under their place in the tree."""
    if node is None or type(node) in (bool, int, float, str):
        return node
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        return {"array": _describe_array(node, at, arrays)}
    if isinstance(node, np.dtype | type) and not np.dtype(node).hasobject:
        return {"dtype": np.dtype(node).name}
    if isinstance(node, list | tuple) and type(node) in (list, tuple):
        return {type(node).__name__: [_describe(child, f"{at}/{k}", arrays) for k, child in enumerate(node)]}
    if type(node) is dict and len(kinds := {type(key) for key in node}) <= 1 and kinds <= {str, int}:
        name = "dict by int" if int in kinds else "dict"
        return {name: {str(key): _describe(child, f"{at}/{key}", arrays) for key, child in node.items()}}
    if is_dataclass(node) and RECORDS.get(name := type(node).__name__) is type(node):
        return {name: {f.name: _describe(getattr(node, f.name), f"{at}/{f.name}", arrays) for f in fields(node)}}
    raise ValueError(
        f"{at.strip('/') or 'quantized'}: {_kind(node)} cannot be stored; parameters are dicts with keys all str or "
        "all int, lists, tuples, arrays and QTensors (NNX state: nnx.to_pure_dict, FrozenDict: flax.core.unfreeze)"
    )


def _kind(node: Any) -> str:
    kind = f"{type(node).__module__}.{type(node).__qualname__}"
    return f"{kind} with keys {list(node)[:5]}" if type(node) is dict else kind


def _describe_array(array: Any, at: str, arrays: dict[str, np.ndarray]) -> list[Any]:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) or array.dtype.hasobject:
        raise ValueError(f"{at.strip('/')}: {array.dtype} cannot be stored; random keys: jax.random.key_data")
    host = np.asarray(array)
    # TensorStore does not know every type of 8 and fewer bits (uint4): they go as bytes, the JSON says what they are.
    key = ""  # Orbax refuses arrays without elements, and the JSON says all there is to say of them
    if host.size:
        key = f"{len(arrays)}.{re.sub(r'[^A-Za-z0-9_]+', '.', at.strip('/'))}"
        arrays[key] = host.view(np.uint8) if host.dtype.itemsize == 1 else host
    return [key, host.dtype.name, list(host.shape), zlib.crc32(host.tobytes())]


def _restore(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    if not isinstance(node, dict):
        return node
    ((name, parts),) = node.items()
    if name == "array":
        key, dtype, shape, crc = parts
        return _restore_array(key, jnp.dtype(dtype), shape, crc, arrays)
    if name == "dtype":
        return jnp.dtype(parts)
    if name in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[name](_restore(child, arrays) for child in parts)
    children = {key: _restore(child, arrays) for key, child in parts.items()}
    if name in ("dict", "dict by int"):
        return children if name == "dict" else {int(key): child for key, child in children.items()}
    if name not in RECORDS:
        raise ValueError(f"unknown type {name!r}; known are {', '.join(RECORDS)}")
    return RECORDS[name](**children)


def _restore_array(key: str, dtype: np.dtype, shape: list[int], crc: int, arrays: dict[str, np.ndarray]) -> Any:
    if key not in arrays and 0 not in shape:
        raise ValueError(f"the array {key!r} is missing")
    found = np.asarray(arrays[key]) if key in arrays else np.zeros(shape, dtype)
    if dtype.itemsize == found.dtype.itemsize == 1:
        found = found.view(dtype)
    if (found.dtype, list(found.shape)) != (dtype, shape):
        raise ValueError(f"the array {key!r} is {found.dtype}{list(found.shape)} where {dtype}{shape} was saved")
    if zlib.crc32(found.tobytes()) != crc:
        raise ValueError(f"the array {key!r} is not what was saved: its checksum differs, the file is damaged")
    return jnp.asarray(found) if jax.dtypes.canonicalize_dtype(dtype) == dtype else found


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
    raise ValueError(f"{at}: {_kind(value)} has no JSON form; use dicts with str keys, lists, numbers and strings")
