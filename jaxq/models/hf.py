"""Hugging Face checkpoints in and out: a directory becomes a forward function and its parameters, and back."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxq.arrays import HALF
from jaxq.models.build import FAMILIES, Model, Params, build, flat, in_float32
from jaxq.models.checkpoint import CODES, file_of, read_tensors, release, write_tensors
from jaxq.models.family import Family
from jaxq.models.tokenizer import open_tokenizer

EMBEDDED = Path(__file__).parent / "embedded"
DOWNLOADED = ["model*.safetensors", "model.safetensors.index.json", "*.json", "tokenizer*", "merges.txt", "vocab.txt"]
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
PREPROCESSOR = "preprocessor_config.json"
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def load(name_or_dir: str | Path, dtype: Any = None) -> Model:
    """Load a checkpoint: an embedded model's name ("stdlib-opt"), a directory in Hugging Face format, or a hub name.

    The leaves of ``params`` are read-only numpy views of the mapped files, nothing is read before it is used. The model
    computes in float32 all the same: half-precision parameters are the first thing that ``forward`` and ``step`` cast.
    ``calibrate`` casts them one by one, and what it writes in their place is float32. Who calls ``forward`` often and
    has the memory casts them before (``cast_once(model, params)``). ``dtype`` asks for another type: leaves that have
    it stay mapped, the others are converted now, and the model computes in it.

    Raises FileNotFoundError (no such model, missing file or shard, hub not reached) and ValueError (unsupported
    architecture, corrupt or pickled weights, a tensor missing, unexpected or of the wrong shape).
    """
    directory = _locate(name_or_dir)
    config = _read_json(directory / "config.json")
    made = build(config, str(directory / "config.json"))
    params = _import(made.layout, FAMILIES[made.family], read_tensors(directory), directory)
    if dtype is not None:
        with ThreadPoolExecutor() as pool:
            leaves = pool.map(lambda leaf: _converted(leaf, np.dtype(dtype)), jax.tree.leaves(params))
            params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    model = Model(
        str(name_or_dir),
        made.family,
        config,
        made.forward,
        made.step,
        made.kept,
        params,
        read_tokenizer(directory),
        read_preprocessor(directory),
    )
    return in_float32(model) if dtype is None and any(leaf.dtype in HALF for leaf in jax.tree.leaves(params)) else model


def check_finite(name_or_dir: str | Path) -> None:
    """Reads a whole checkpoint; ValueError, with file and name, for a tensor that holds NaN or infinity."""
    directory = _locate(name_or_dir)
    for name, tensor in read_tensors(directory).items():
        if bad := int((~np.isfinite(tensor)).sum()):
            raise ValueError(
                f"{file_of(directory, name)}: tensor {name} {tensor.shape} holds {bad} numbers that are NaN or "
                "infinite; download or copy it again"
            )


def save_hf(model: Model, params: Params, out_dir: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write ``params`` (same layout as ``model.params``, any float type) as a checkpoint that transformers loads.

    The directory appears at once and complete (written beside, then renamed). Raises FileExistsError if it exists,
    ValueError if a parameter is missing, has no place in the family's checkpoint (a bias where the configuration has
    none), has the wrong shape or is not a float array.
    """
    tensors = {name: stored(path, leaf) for path, (name, leaf) in places(model, params).items()}
    write_directory(model, tensors, out_dir, max_shard_bytes=max_shard_bytes)


def write_directory(
    model: Model,
    tensors: Mapping[str, np.ndarray],
    out_dir: str | Path,
    further: Mapping[str, Any] = MappingProxyType({}),
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint's tensors with the model's configuration (and ``further``) and tokenizer beside them.

    All of it or none of it; FileExistsError if the directory exists.
    """
    target = Path(out_dir)
    if target.exists():
        raise FileExistsError(f"{target}: exists already; remove it or give another directory")
    kinds = {tensor.dtype for tensor in tensors.values()} & set(CODES)
    dtype = str(kinds.pop()) if len(kinds) == 1 else "float32"
    config = {key: value for key, value in model.config.items() if key != "torch_dtype"} | {"dtype": dtype, **further}
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_tensors(scratch, tensors, max_shard_bytes)
        (scratch / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_readers(model, scratch)
        scratch.chmod(0o755)  # temporary directories are private
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _locate(name_or_dir: str | Path) -> Path:
    path, name = Path(name_or_dir), str(name_or_dir)
    if path.is_dir():
        return path
    embedded = sorted(p.name for p in EMBEDDED.glob("[!.]*") if (p / "config.json").exists())
    if name in embedded:
        return EMBEDDED / name
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"{name}: neither a directory, nor a hub name (owner/model), nor an embedded model ({', '.join(embedded)})"
        )
    from huggingface_hub import snapshot_download  # slow to import, and most uses need no network

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except Exception as error:  # whatever the network stack raises, the user needs to know what was tried
        raise FileNotFoundError(
            f"{name}: no such directory, and the Hugging Face hub did not deliver it ({type(error).__name__}); "
            "download the model elsewhere and give its directory"
        ) from error


def save_readers(model: Model, directory: Path) -> None:
    """Write what turns text or images into the model's inputs: its tokenizer, its ``preprocessor_config.json``."""
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(directory)
    if model.preprocessor is not None:
        (directory / PREPROCESSOR).write_text(json.dumps(model.preprocessor, indent=2, sort_keys=True) + "\n")


def read_preprocessor(directory: Path) -> dict[str, Any] | None:
    """The content of ``preprocessor_config.json``; None without one, ValueError if it is no JSON."""
    return _read_json(directory / PREPROCESSOR) if (directory / PREPROCESSOR).exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing, so {path.parent} is not a Hugging Face model directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}, where a JSON object is expected")
    return content


def read_tokenizer(directory: Path) -> Any:
    """What acts as the directory's transformers tokenizer; None without one, ValueError if its files are damaged."""
    if not any((directory / file).exists() for file in TOKENIZER_FILES):
        return None
    settings = directory / "tokenizer_config.json"
    found = _read_json(settings) if settings.exists() else {}
    try:
        return open_tokenizer(directory, found)
    except Exception as error:  # transformers and tokenizers raise many kinds for damaged files
        why = " ".join(str(error).split())
        raise ValueError(
            f"{directory}: its tokenizer cannot be read ({type(error).__name__}: {why}); download or copy it again"
        ) from error


def _converted(leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The leaf itself, or a copy of another type; then its file need not stay in memory beside it."""
    if leaf.dtype == dtype:
        return leaf
    copy = leaf.astype(dtype)
    release(leaf)
    return copy


def _tensor_name(names: Mapping[str, str], path: str) -> str:
    """``layers/3/attn/q/kernel`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    if path in names:
        return names[path]
    module, leaf = path.rsplit("/", 1)
    layer = re.search(r"/(\d+)/", path)
    return f"{names[re.sub(r'/[0-9]+/', '/{}/', module)].format(layer[1] if layer else '')}.{LEAF_NAMES[leaf]}"


def _stored_axes(path: str, rank: int) -> tuple[int, ...]:
    """A kernel is stored with its outputs first: ``[in, out]`` as ``[out, in]``, ``[h, w, in, out]`` as ``[out, in, h,
    w]``; everything else as it is."""
    return (rank - 1, rank - 2, *range(rank - 2)) if path.endswith("/kernel") else tuple(range(rank))


def _import(layout: Params, family: Family, tensors: Mapping[str, np.ndarray], directory: Path) -> Params:
    """The tensors as a tree like ``layout``; a kernel is a transposed view."""
    stored = {family.full_name(name): name for name in tensors}

    def view(path: tuple, expected: Any) -> np.ndarray:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        name, axes = _tensor_name(family.names, where), _stored_axes(where, expected.ndim)
        shape = tuple(expected.shape[axis] for axis in axes)
        if name not in stored:
            raise ValueError(
                f"{directory}: tensor {name} {shape} (parameter {where}) is missing from the checkpoint, "
                "config.json asks for it"
            )
        own = stored.pop(name)
        if tensors[own].shape != shape:
            raise ValueError(
                f"{file_of(directory, own)}: tensor {own} has shape {tensors[own].shape}, config.json asks for {shape}"
            )
        return tensors[own].transpose(np.argsort(axes))

    params = jax.tree_util.tree_map_with_path(view, layout)
    unexpected = [own for name, own in stored.items() if not name.endswith(family.ignored)]
    if unexpected:
        raise ValueError(
            f"{file_of(directory, unexpected[0])}: tensor {unexpected[0]} {tensors[unexpected[0]].shape} has no place "
            f"in the model that config.json describes ({len(unexpected)} such tensors)"
        )
    return params


def places(model: Model, params: Params) -> dict[str, tuple[str, Any]]:
    """By path, what a checkpoint calls a parameter, and its leaf: every leaf has its place, every place its leaf."""
    names, found, expected = FAMILIES[model.family].names, flat(params), flat(build(model.config, "").layout)
    for path in expected.keys() - found.keys():
        raise ValueError(f"parameter {path} is missing from params")
    for path, leaf in found.items():
        if path not in expected:
            raise ValueError(
                f"parameter {path} has no place in a {model.family} checkpoint with this configuration; "
                "fold it into another parameter, or switch the bias on in the model's config"
            )
        shape = getattr(leaf, "shape", None)
        if shape is not None and shape != expected[path].shape:
            raise ValueError(f"parameter {path} has shape {shape}, the model asks for {expected[path].shape}")
    return {path: (_tensor_name(names, path), leaf) for path, leaf in found.items()}


def stored(path: str, leaf: Any) -> np.ndarray:
    """A full-precision parameter as a checkpoint holds it; ValueError for anything but a float array."""
    if not isinstance(leaf, np.ndarray | jax.Array) or np.dtype(leaf.dtype) not in CODES:
        raise ValueError(
            f"parameter {path} is a {type(leaf).__name__} of {getattr(leaf, 'dtype', 'no dtype')}; a Hugging Face "
            "checkpoint holds float arrays: decode quantized leaves first"
        )
    return np.asarray(leaf).transpose(_stored_axes(path, leaf.ndim))
