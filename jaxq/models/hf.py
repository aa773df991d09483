"""Hugging Face checkpoints in and out: a directory becomes a forward function and its parameters, and back."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxq.models.build import FAMILIES, Model, Params, build, flat
from jaxq.models.checkpoint import CODES, file_of, read_tensors, write_tensors
from jaxq.models.family import Family

EMBEDDED = Path(__file__).parent / "embedded"
DOWNLOADED = ["model*.safetensors", "model.safetensors.index.json", "*.json", "tokenizer*", "merges.txt", "vocab.txt"]
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def load(name_or_dir: str | Path, dtype: Any = None) -> Model:
    """Load a checkpoint: an embedded model's name ("stdlib-opt"), a directory in Hugging Face format, or a hub name.

    The leaves of ``params`` are read-only numpy views of the mapped files, nothing is read before it is used; only
    half-precision weights are promoted to float32. ``dtype`` asks for another type: ``ml_dtypes.bfloat16`` leaves a
    bfloat16 checkpoint mapped and computes in bfloat16.

    Raises FileNotFoundError (no such model, missing file or shard, hub not reached) and ValueError (unsupported
    architecture, corrupt or pickled weights, a tensor missing, unexpected or of the wrong shape).
    """
    directory = _locate(name_or_dir)
    config = _read_config(directory)
    made = build(config, str(directory / "config.json"))
    params = _import(made.layout, FAMILIES[made.family], read_tensors(directory), directory)
    params = jax.tree.map(lambda leaf: leaf.astype(_leaf_dtype(leaf.dtype, dtype), copy=False), params)
    tokenizer = _tokenizer(directory)
    return Model(str(name_or_dir), made.family, config, made.forward, made.step, made.kept, params, tokenizer)


def save_hf(model: Model, params: Params, out_dir: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write ``params`` (same layout as ``model.params``, any float type) as a checkpoint that transformers loads.

    The directory appears at once and complete (written beside, then renamed). Raises FileExistsError if it exists,
    ValueError if a parameter is missing, has no place in the family's checkpoint (a bias where the configuration has
    none), has the wrong shape or is not a float array.
    """
    target = Path(out_dir)
    if target.exists():
        raise FileExistsError(f"{target}: exists already; remove it or give another directory")
    tensors = _export(model, params)
    kinds = {tensor.dtype for tensor in tensors.values()}
    dtype = str(kinds.pop()) if len(kinds) == 1 else "float32"
    config = {key: value for key, value in model.config.items() if key != "torch_dtype"} | {"dtype": dtype}
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_tensors(scratch, tensors, max_shard_bytes)
        (scratch / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(scratch)
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


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing, so {directory} is not a Hugging Face model directory")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _tokenizer(directory: Path) -> Any:
    if not any((directory / file).exists() for file in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # seconds to import

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _leaf_dtype(stored: np.dtype, asked: Any) -> np.dtype:
    if asked is not None:
        return np.dtype(asked)
    return np.dtype(np.float32) if stored in HALF else stored


def _tensor_name(names: Mapping[str, str], path: str) -> str:
    """``layers/3/attn/q/kernel`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    module, leaf = path.rsplit("/", 1)
    layer = re.search(r"/(\d+)/", path)
    return f"{names[re.sub(r'/[0-9]+/', '/{}/', module)].format(layer[1] if layer else '')}.{LEAF_NAMES[leaf]}"


def _import(layout: Params, family: Family, tensors: Mapping[str, np.ndarray], directory: Path) -> Params:
    """The tensors as a tree like ``layout``; layers are stored ``[out, in]``, a kernel is the transposed view."""
    stored = {family.full_name(name): name for name in tensors}

    def view(path: tuple, expected: Any) -> np.ndarray:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        name, kernel = _tensor_name(family.names, where), where.endswith("/kernel")
        shape = expected.shape[::-1] if kernel else expected.shape
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
        return tensors[own].T if kernel else tensors[own]

    params = jax.tree_util.tree_map_with_path(view, layout)
    unexpected = [own for name, own in stored.items() if not name.endswith(family.ignored)]
    if unexpected:
        raise ValueError(
            f"{file_of(directory, unexpected[0])}: tensor {unexpected[0]} {tensors[unexpected[0]].shape} has no place "
            f"in the model that config.json describes ({len(unexpected)} such tensors)"
        )
    return params


def _export(model: Model, params: Params) -> dict[str, np.ndarray]:
    """The parameters under their checkpoint names; every leaf must have its place, and every place its leaf."""
    names, found, expected = FAMILIES[model.family].names, flat(params), flat(build(model.config, "").layout)
    for path in expected.keys() - found.keys():
        raise ValueError(f"parameter {path} is missing from params")
    tensors = {}
    for path, leaf in found.items():
        if path not in expected:
            raise ValueError(
                f"parameter {path} has no place in a {model.family} checkpoint with this configuration; "
                "fold it into another parameter, or switch the bias on in the model's config"
            )
        if not isinstance(leaf, np.ndarray | jax.Array) or np.dtype(leaf.dtype) not in CODES:
            raise ValueError(
                f"parameter {path} is a {type(leaf).__name__} of {getattr(leaf, 'dtype', 'no dtype')}; a Hugging Face "
                "checkpoint holds float arrays: decode quantized leaves first"
            )
        if leaf.shape != expected[path].shape:
            raise ValueError(f"parameter {path} has shape {leaf.shape}, the model asks for {expected[path].shape}")
        tensors[_tensor_name(names, path)] = np.asarray(leaf).T if path.endswith("/kernel") else np.asarray(leaf)
    return tensors
