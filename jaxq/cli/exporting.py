"""The `--export`s of `jaxq quantize`: folders of other programs' formats beside the quantized model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from jaxq.export import compressed
from jaxq.models import Model, save_hf
from jaxq.models.hf import write_directory
from jaxq.qtensor import Quantized

Writers = dict[str, Callable[[Path], None]]


def exports(
    model: Model, quantized: Quantized, folded: Quantized, wanted: Collection[str]
) -> tuple[Writers, dict[str, str]]:
    """What writes each folder, and why those that cannot be written cannot.

    `folded` holds the full-precision parameters after the equivalent transforms alone.
    """
    writers: Writers = {}
    refused: dict[str, str] = {}
    if "hf" in wanted and folded.inputs:
        refused["hf"] = (
            f"{len(folded.inputs)} groups keep a shift or scale at run time, which that format has no place for: "
            f"{', '.join(sorted(folded.inputs))}; see `jaxq sites`"
        )
    elif "hf" in wanted:
        writers["hf"] = partial(save_hf, model, folded.params)
    if "compressed-tensors" in wanted:
        try:
            tensors, config = compressed(model, quantized)
            writers["compressed-tensors"] = partial(
                write_directory, model, tensors, further={"quantization_config": config}
            )
        except ValueError as error:
            refused["compressed-tensors"] = str(error)
    return writers, refused
