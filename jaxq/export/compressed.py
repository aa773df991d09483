"""compressed-tensors: quantized Hugging Face checkpoints as vLLM and transformers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxq.export.schemes import Layer, refuse
from jaxq.export.schemes import layer as layer_of
from jaxq.models import Model
from jaxq.models.build import FAMILIES
from jaxq.models.hf import places, stored, write_directory
from jaxq.pack import unpack
from jaxq.qtensor import InputQuant, QTensor, Quantized


def save_compressed(model: Model, quantized: Quantized, out_dir: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a quantized model as a Hugging Face directory with `quant_method: compressed-tensors`.

    The weights that the package `compressed-tensors` decompresses are `QTensor.dequantize()`, bit for bit in float32
    for integers and FP8; it decompresses block formats to bfloat16, MX ones exactly, NVFP4 to its rounding. Static
    activations are the same, but for the one code, -2**(bits - 1), that jaxq's symmetric integers leave out; scales of
    dynamic ones are the reader's (`max / 127.5` in compressed-tensors, `max / 127` here). transformers simulates it.
    vLLM has kernels for W8A8 with symmetric weights, FP8, weights alone of 4 or 8 bits, MXFP4 and NVFP4;
    it joins q, k, v and gate, up, for which it takes one NVFP4 factor (`weight_global_scale`) where here each has its
    own.

    Args:
      model: where the family, the configuration and the tokenizer come from; its parameters are not read.
      quantized: what `calibrate` made of it, packed or not.
      out_dir: appears at once and complete.

    Raises:
      FileExistsError: `out_dir` exists.
      ValueError: as `compressed`.
    """
    tensors, config = compressed(model, quantized)
    write_directory(model, tensors, out_dir, {"quantization_config": config}, max_shard_bytes)


def compressed(model: Model, quantized: Quantized) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the `quantization_config` that `save_compressed` writes.

    Raises:
      ValueError: a parameter without a place in the family's checkpoint; or what compressed-tensors cannot express,
        with the site and what would work instead: a shift or scale left at run time, exponents, other number formats,
        quantized attention, embeddings, or activations alone.
    """
    quantized = unpack(quantized)
    inputs = _inputs(quantized)
    tensors: dict[str, np.ndarray] = {}
    layers: dict[str, Layer] = {}
    plain = []
    for path, (name, leaf) in places(model, quantized.params).items():
        module = name.rpartition(".")[0]
        if isinstance(leaf, QTensor):
            if not path.endswith("/kernel"):
                refuse(path, "a table is quantized", 'leave it out: `skip(["embed*"], ...)`, `embeddings: null`')
            layers[module] = layer_of(path, leaf, inputs.get(path))
            tensors |= {f"{module}.{part}": tensor for part, tensor in layers[module].tensors.items()}
            continue
        if path in inputs:
            refuse(path, "its input is quantized, its weight is not", "quantize both, the weight alone, or neither")
        tensors[name] = stored(path, leaf)
        if path.endswith("/kernel"):
            plain.append(module)
    if not layers:
        raise ValueError(f"{model.name}: nothing is quantized; `save_hf` writes full-precision checkpoints")
    return tensors, _config(model, layers, plain)


def _inputs(quantized: Quantized) -> dict[str, InputQuant]:
    """What each kernel reads, by its path."""
    found: dict[str, InputQuant] = {}
    for name, quant in quantized.inputs.items():
        if quant.shift is not None or quant.scale is not None or quant.bias:
            refuse(
                name,
                "a shift or scale, or the bias that makes up for one, is left to do at run time",
                "transform only what can be folded, e.g. `groups: foldable`, `shift: false`; see `jaxq sites`",
            )
        for path in {site.partition("#")[0] for site in quant.sites} if quant.format is not None else ():
            if not path.endswith("/kernel"):
                refuse(path, "an input of what is no linear layer is quantized", "`attention: null`, or skip this site")
            if path in found:
                refuse(path, "the weight serves in two places", "skip one of them")
            found[path] = quant
    return found


def _config(model: Model, layers: dict[str, Layer], plain: list[str]) -> dict[str, Any]:
    """One group of layers for each scheme; where it is the only one, it is for every linear layer but those ignored."""
    members: dict[str, list[str]] = {}
    schemes: dict[str, dict[str, Any]] = {}
    for module, layer in layers.items():
        key = json.dumps(layer.scheme, sort_keys=True)
        schemes[key] = layer.scheme
        members.setdefault(key, []).append(_own_name(model, module))
    formats = {layer.format for layer in layers.values()}
    tied = {name.rpartition(".")[0] for name in FAMILIES[model.family].ignored} - layers.keys() - {*plain}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "kv_cache_scheme": None,
        "ignore": [_own_name(model, module) for module in [*plain, *sorted(tied)]],
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if len(schemes) == 1 else members[key], **scheme}
            for i, (key, scheme) in enumerate(schemes.items())
        },
    }


def _own_name(model: Model, module: str) -> str:
    """What transformers' model calls a module: a bare encoder lacks the prefix of its tensors."""
    return module.removeprefix("bert.") if "BertModel" in model.config.get("architectures", ()) else module
