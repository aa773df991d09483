"""Safetensors checkpoints on disk: read as memory-mapped views, written in shards. Nothing is ever unpickled."""

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
WRITTEN = CODES | {  # what else a quantized checkpoint is made of
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}
CONVERT = (
    "convert it once, where you trust it, with transformers and torch: NAME.from_pretrained(SOURCE)"
    ".save_pretrained(TARGET), NAME being the class that its config.json lists under architectures"
)
# Endings of what some checkpoints carry and every model computes anew; not parameters, and not of a type that is read.
TABLES = (".rotary_emb.inv_freq", "embeddings.position_ids")


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint directory by name: read-only views of the mapped files, nothing is copied.

    TABLES are left out.

    Raises FileNotFoundError for a missing file or shard, ValueError for a corrupt file, an unusable type, or an index
    that does not match its shards.
    """
    if (directory / INDEX).exists():
        return _read_sharded(directory)
    if (directory / SINGLE).exists():
        return read_file(directory / SINGLE)
    pickled = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in directory.glob(suffix))
    if pickled:
        raise ValueError(f"{directory}: only pickled weights ({', '.join(pickled[:3])}), never read here: {CONVERT}")
    raise FileNotFoundError(
        f"{directory}: neither {SINGLE} nor {INDEX}; if the checkpoint has only .bin files, {CONVERT}"
    )


def file_of(directory: Path, name: str) -> Path:
    """The file that holds a tensor of a checkpoint that ``read_tensors`` has read."""
    index = directory / INDEX
    return directory / (json.loads(index.read_text())["weight_map"][name] if index.exists() else SINGLE)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file but for TABLES, as views of the mapped file; ValueError if it is damaged."""
    try:
        with safe_open(path, framework="np"):  # the library's own validation of header, offsets and file size
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: not a sound safetensors file ({error}); download or copy it again") from error
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    return {name: _view(path, name, raw[start:], e) for name, e in header.items() if not name.endswith(TABLES)}


def release(view: np.ndarray) -> None:
    """Takes the file that a view maps out of this process's memory; what is used again is read again."""
    base: Any = view
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def _view(path: Path, name: str, body: np.ndarray, entry: dict) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{path}: tensor {name} has type {entry['dtype']}; what can be read: {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    return body[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _read_sharded(directory: Path) -> dict[str, np.ndarray]:
    index = directory / INDEX
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error!r}); download or copy it again") from error
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        if not (directory / shard).exists():
            raise FileNotFoundError(f"{directory / shard}: shard named in {INDEX} is missing; download or copy it")
        tensors |= read_file(directory / shard)
    absent = sorted(name for name in set(shard_of) - set(tensors) if not name.endswith(TABLES))
    if absent:
        raise ValueError(f"{directory / shard_of[absent[0]]}: tensor {absent[0]}, named in {INDEX}, is not in it")
    return tensors


def write_tensors(directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> None:
    """Write ``model.safetensors``, or shards of at most ``max_shard_bytes`` (one tensor at least) and their index."""
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _write_file(directory / SINGLE, tensors)
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        _write_file(directory / file, {name: tensors[name] for name in names})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    for name, tensor in tensors.items():
        if names and sum(tensors[n].nbytes for n in names) + tensor.nbytes > max_shard_bytes:
            yield names
            names = []
        names.append(name)
    yield names


def _write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """The format itself, a JSON header and then the bytes, so that one tensor at a time is in memory."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": WRITTEN[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())
