"""Models as version 1 saved them: every grid in float32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jaxq
from jaxq import storage
from jaxq.qtensor import Packed, QTensor
from jaxq.quantizer import quantize_weight
from tests.test_pack import same_tree
from tests.zoo.specimen import weight

KINDS = {
    "mxfp4": jaxq.mxfp4(),
    "nvfp4": jaxq.nvfp4(),
    "uint4": jaxq.per_group(jaxq.Int(4, symmetric=False), 32),
    "int8": jaxq.per_channel(jaxq.Int(8)),
}


def before(node: Any) -> Any:
    """The JSON of a tree as it was."""
    if isinstance(node, list):
        return [before(child) for child in node]
    if not isinstance(node, dict):
        return node
    new = ("rows_last", "looked_up")
    node = {"grid" if name == "stored" else name: before(child) for name, child in node.items() if name not in new}
    if "Grid" in node:
        del node["Grid"]["scales"]
    return node


def in_float32(leaf: QTensor | Packed) -> QTensor | Packed:
    return replace(leaf, stored=leaf.grid) if isinstance(leaf, Packed) else leaf


def save(path: Path, params: dict[str, Any]) -> None:
    """With float32 grids in packed leaves too, and nothing that says which numbers are in them."""
    storage.save(path, jaxq.Quantized({name: in_float32(leaf) for name, leaf in params.items()}), {})
    document = json.loads((path / "jaxq.json").read_text())
    text = json.dumps({**document, "version": 1, "tree": before(document["tree"])})
    assert '"Packed": {"planes"' in text and '"grid": {"Grid": {"scale"' in text and '"scales"' not in text
    (path / "jaxq.json").write_text(text)


def test_it_is_read_as_what_is_packed_now(tmp_path):
    leaves = {name: quantize_weight(weight(0, 64, 8), quantizer, (0,)) for name, quantizer in KINDS.items()}
    params = {**leaves, **{f"packed {name}": jaxq.pack({"w": leaf})["w"] for name, leaf in leaves.items()}}
    save(tmp_path / "model", params)
    loaded, about = storage.load(tmp_path / "model")
    assert about == {} and same_tree(loaded, jaxq.Quantized(params))


def test_scales_that_are_numbers_of_no_kind_stay_real(tmp_path):
    leaf = quantize_weight(weight(0, 64, 8), jaxq.mxfp4(), (0,))
    odd = replace(leaf, grid=replace(leaf.grid, scale=leaf.grid.scale * 0.3, scales="real"))
    params = {"w": odd, "packed": jaxq.pack({"w": odd})["w"]}
    save(tmp_path / "model", params)
    loaded, _ = storage.load(tmp_path / "model")
    assert same_tree(loaded, jaxq.Quantized(params)) and isinstance(loaded.params["w"], QTensor)


def test_zero_points_that_bytes_do_not_hold_are_refused(tmp_path):
    leaf = jaxq.pack({"w": quantize_weight(weight(0, 64, 8), KINDS["uint4"], (0,))})["w"]
    halves = replace(leaf.stored, zero=leaf.grid.zero + 0.5)
    save(tmp_path / "model", {"w": replace(leaf, stored=halves)})
    with pytest.raises(
        ValueError, match=r"(?s)model: jaxq.json .* zero points of a packed weight are no whole numbers"
    ):
        storage.load(tmp_path / "model")
