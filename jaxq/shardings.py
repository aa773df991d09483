"""`shardings`: where the arrays of a quantized model go on a mesh, given where its parameters go in full precision."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxq.kernels.layout import BLOCK, can_split
from jaxq.program.trace import path_name
from jaxq.qtensor import Packed, Quantized, is_qtensor


def shardings(qparams: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Where each array of a quantized model goes on a mesh, so that codes lie where the weights would.

    Codes are cut as the weight is, and with them the scales, zero points, exponents and sums along the axes that these
    have. What belongs to activations is on every device.

    Args:
      qparams: what `calibrate` or `pack` returned, or any tree with such leaves; its arrays may be abstract.
      specs: `PartitionSpec`s for the full-precision parameters: a tree of their structure, or a prefix of it.
      mesh: whose axes the specs name.

    Returns:
      A tree of the structure of `qparams` with a `NamedSharding` for each array: for `jax.device_put`, for `jit`'s
      `in_shardings` and, by `jax.tree.map(lambda s: s.spec, ...)`, for `shard_map`.

    Raises:
      ValueError: an array cannot be cut as its spec says: the axis is not a multiple of the devices, a run of channels
        with one scale would be torn apart, or so would a block of 256 packed codes (of 8 bits: any cut will do); with
        the parameter's path.
    """
    params = qparams.params if isinstance(qparams, Quantized) else qparams
    each = jax.tree.broadcast(specs, jax.tree.map(lambda _: 0, params, is_leaf=is_qtensor))

    def place(keys: tuple[Any, ...], leaf: Any, spec: PartitionSpec) -> Any:
        return _placed(path_name(keys), leaf, spec, mesh)

    placed = jax.tree_util.tree_map_with_path(place, params, each, is_leaf=is_qtensor)
    if not isinstance(qparams, Quantized):
        return placed
    everywhere = NamedSharding(mesh, PartitionSpec())
    return replace(jax.tree.map(lambda _: everywhere, replace(qparams, params=None)), params=placed)


def _placed(path: str, leaf: Any, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Any:
    """The shardings of one parameter's arrays."""
    shape = np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
    if len(spec) > len(shape):
        raise ValueError(f"{path}: {spec} has {len(spec)} entries, the parameter {len(shape)} axes: {shape}")
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    parts = [_parts(path, entry, mesh) for entry in entries]

    def along(a: Any) -> NamedSharding:
        """Of an array that broadcasts, run by run, against the parameter."""
        own = range(len(shape) - np.ndim(a), len(shape))
        for n, i in zip(np.shape(a), own):
            if n > 1 and n % parts[i]:
                what = f"{n} scales, one for each {shape[i] // n} of the {shape[i]}" if n < shape[i] else str(n)
                raise ValueError(f"{path}: axis {i} ({what}) cannot be cut into {parts[i]} equal parts, as {spec} says")
        return NamedSharding(mesh, PartitionSpec(*(entries[i] if n > 1 else None for n, i in zip(np.shape(a), own))))

    if not isinstance(leaf, Packed):
        return jax.tree.map(along, leaf)
    plane = NamedSharding(mesh, _of_planes(path, leaf, entries, parts))
    return replace(jax.tree.map(along, replace(leaf, planes=())), planes=(plane,) * len(leaf.planes))


def _of_planes(path: str, leaf: Packed, entries: list[Any], parts: list[int]) -> PartitionSpec:
    """Of planes [*lead, bytes, columns], whose bytes hold all of the axes `rows`, and whose columns are merged too."""
    rows, start = leaf.row_axes, leaf.row_axes[0]
    columns = [i for i in range(leaf.lead, leaf.ndim) if i not in rows]
    for run in (rows, columns):
        if any(parts[i] > 1 for i in run[1:]):
            raise ValueError(f"{path}: axes {run[0]} to {run[-1]} are packed as one: only axis {run[0]} can be sharded")
    count, bits = prod(leaf.rows), leaf.format.bits
    if leaf.rows[0] % parts[start] or not can_split(count, bits, parts[start]):
        raise ValueError(
            f"{path}: {count} codes of {bits} bits, packed along axis {start} in blocks of {BLOCK}, cannot be cut into "
            f"{parts[start]} parts of whole blocks; shard another axis of it, or none, or leave it unpacked"
        )
    return PartitionSpec(*entries[: leaf.lead], entries[start], *(entries[i] for i in columns[:1]))


def _parts(path: str, entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """How many parts an axis is cut into."""
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"{path}: its spec names {name!r}; the mesh's axes are {', '.join(mesh.axis_names)}")
    return prod(mesh.shape[name] for name in names)
