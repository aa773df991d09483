"""A tree as nested JSON with its arrays apart: a container or a dataclass is `{"<its type>": <its parts>}`, an array is
`{"array": [<key>, <dtype>, <shape>, <crc32>]}`. Reading it back runs nothing that a file contains."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.formats import Format
from jaxq.qtensor import Granularity, Grid, InputQuant, Packed, QTensor, Quantized, Transform

RECORDS = {
    cls.__name__: cls
    for cls in (
        Quantized,
        InputQuant,
        QTensor,
        Packed,
        Grid,
        Transform,
        *get_args(Granularity),
        *get_args(Format),
    )
}


def describe(node: Any, at: str, arrays: dict[str, np.ndarray]) -> Any:
    """`node` as JSON; its arrays are collected in `arrays` under their place in the tree, which is `at`.

    ValueError, naming the place, for what cannot be stored.
    """
    if node is None or type(node) in (bool, int, float, str):
        return node
    if isinstance(node, jax.Array | np.ndarray | np.generic):
        return {"array": _describe_array(node, at, arrays)}
    if isinstance(node, np.dtype | type) and not np.dtype(node).hasobject:
        return {"dtype": np.dtype(node).name}
    if isinstance(node, list | tuple) and type(node) in (list, tuple):
        return {type(node).__name__: [describe(child, f"{at}/{k}", arrays) for k, child in enumerate(node)]}
    if type(node) is dict and len(kinds := {type(key) for key in node}) <= 1 and kinds <= {str, int}:
        name = "dict by int" if int in kinds else "dict"
        return {name: {str(key): describe(child, f"{at}/{key}", arrays) for key, child in node.items()}}
    if is_dataclass(node) and RECORDS.get(name := type(node).__name__) is type(node):
        return {name: {f.name: describe(getattr(node, f.name), f"{at}/{f.name}", arrays) for f in fields(node)}}
    raise ValueError(
        f"{at.strip('/') or 'quantized'}: {kind(node)} cannot be stored; parameters are dicts with keys all str or "
        "all int, lists, tuples, arrays and QTensors (NNX state: nnx.to_pure_dict, FrozenDict: flax.core.unfreeze)"
    )


def kind(node: Any) -> str:
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


def restore(node: Any, arrays: dict[str, np.ndarray], records: Mapping[str, Callable] = RECORDS) -> Any:
    """What `describe` was given; an array may also be there as its bytes, uint8 [n]. `records` make dataclasses.

    Arrays come back as JAX arrays; a float64 or int64 one stays a NumPy array unless jax_enable_x64 is set. Raises
    ValueError, or what indexing raises, where JSON or arrays are damaged.
    """
    if not isinstance(node, dict):
        return node
    ((name, parts),) = node.items()
    if name == "array":
        key, dtype, shape, crc = parts
        return _restore_array(key, jnp.dtype(dtype), shape, crc, arrays)
    if name == "dtype":
        return jnp.dtype(parts)
    if name in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[name](restore(child, arrays, records) for child in parts)
    children = {key: restore(child, arrays, records) for key, child in parts.items()}
    if name in ("dict", "dict by int"):
        return children if name == "dict" else {int(key): child for key, child in children.items()}
    if name not in records:
        raise ValueError(f"unknown type {name!r}; known are {', '.join(records)}")
    return records[name](**children)


def _restore_array(key: str, dtype: np.dtype, shape: list[int], crc: int, arrays: dict[str, np.ndarray]) -> Any:
    if key not in arrays and 0 not in shape:
        raise ValueError(f"the array {key!r} is missing")
    found = np.asarray(arrays[key]) if key in arrays else np.zeros(shape, dtype)
    if found.dtype == np.uint8 and found.shape == (prod(shape) * dtype.itemsize,):  # an array's bytes
        found = found.view(dtype).reshape(shape)
    if dtype.itemsize == found.dtype.itemsize == 1:
        found = found.view(dtype)
    if (found.dtype, list(found.shape)) != (dtype, shape):
        raise ValueError(f"the array {key!r} is {found.dtype}{list(found.shape)} where {dtype}{shape} was saved")
    if zlib.crc32(found.tobytes()) != crc:
        raise ValueError(f"the array {key!r} is not what was saved: its checksum differs, the file is damaged")
    return jnp.asarray(found) if jax.dtypes.canonicalize_dtype(dtype) == dtype else found
