"""YAML recipes: what to quantize, and how, in a file that a person reads.

    name: OS+ W6A6
    method: {name: os_plus, lower: 1.0, candidates: 100, search: exhaustive, shift: true}
    weights: {bits: 6, symmetric: false, granularity: channel, observer: {name: min_max}}
    activations: {bits: 6, symmetric: false, granularity: tensor, observer: {name: average_min_max}}
    attention: null
    skip: ["lm_head/*", "embed*"]
    calibration: {samples: 128, length: 512, batch_size: 16, propagate: quantized}

`method` and `observer` may be any of those below; what is left out has the default given there.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from jaxq.yaml_file import read_yaml

Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]
# Which inputs are scaled: those that a norm makes, or also those that an earlier layer's columns do (down projections).
MigratedGroups = Literal["norms", "foldable"]
# A model has one or the other: a head of its own, or one tied to its embedding.
HEAD_NAMES = ("lm_head/*", "embed*")


class Part(BaseModel):
    """A mapping of a recipe: only the keys it names, only values of their type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OSPlus(Part):
    """Outlier Suppression+: channel-wise shift, and the scale searched over `candidates` clip values above `lower`."""

    name: Literal["os_plus"]
    lower: PositiveFloat = 1.0
    candidates: PositiveInt = 100
    search: Literal["exhaustive", "fast"] = "exhaustive"
    shift: bool = True
    groups: MigratedGroups = "norms"


class SmoothQuant(Part):
    name: Literal["smooth_quant"]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    groups: MigratedGroups = "norms"


class PlainMethod(Part):
    """Outlier Suppression's gamma migration, or none at all: round to nearest."""

    name: Literal["gamma_migration", "none"]


class PlainObserver(Part):
    name: Literal["min_max", "average_min_max", "mse", "average_mse"]


class EMAMinMax(Part):
    name: Literal["ema_min_max"]
    decay: Decay = 0.9


class AverageQuantile(Part):
    name: Literal["average_quantile"]
    fraction: Fraction = 0.999


class EMAQuantile(Part):
    name: Literal["ema_quantile"]
    fraction: Fraction = 0.9999
    decay: Decay = 0.9


class LSQPlus(Part):
    """Mean plus and minus three standard deviations; symmetric weights only."""

    name: Literal["lsq_plus"]


class TokenQuantile(Part):
    """Token-wise clipping at a percentile of the tokens' extremes, given or searched for the smallest loss."""

    name: Literal["token_quantile"]
    percentile: Fraction | Literal["search"]


Method = Annotated[OSPlus | SmoothQuant | PlainMethod, Field(discriminator="name")]
AnyObserver = PlainObserver | EMAMinMax | AverageQuantile | EMAQuantile
WeightObserver = Annotated[AnyObserver | LSQPlus, Field(discriminator="name")]
ActivationObserver = Annotated[AnyObserver | TokenQuantile, Field(discriminator="name")]


class Numbers(Part):
    bits: Annotated[int, Field(ge=2, le=8)]
    symmetric: bool = True
    granularity: str
    group_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _combination(self) -> Numbers:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("`granularity: group` and `group_size` belong together: give both or neither")
        return self


class Weights(Numbers):
    granularity: Literal["tensor", "channel", "group"] = "channel"
    observer: WeightObserver = PlainObserver(name="min_max")

    @model_validator(mode="after")
    def _observer(self) -> Weights:
        if self.observer.name == "lsq_plus" and not self.symmetric:
            raise ValueError("the observer lsq_plus is for symmetric weights: `symmetric: true`, or min_max or mse")
        return self


class Activations(Numbers):
    granularity: Literal["tensor", "token", "group"] = "tensor"
    observer: ActivationObserver = PlainObserver(name="average_min_max")

    @model_validator(mode="after")
    def _observer(self) -> Activations:
        if self.granularity != "tensor" and "observer" in self.model_fields_set:
            raise ValueError(
                f"`granularity: {self.granularity}` takes the range of each {self.granularity} anew at every call: "
                "leave `observer` out, or use `granularity: tensor`"
            )
        return self


class Calibration(Part):
    samples: PositiveInt = 128
    length: Annotated[int, Field(ge=2)] = 512
    batch_size: PositiveInt = 16
    propagate: Literal["quantized", "full_precision"] = "quantized"


class RecipeFile(Part):
    """A whole recipe. `weights`, `activations` and `attention` (its two matmuls) are in full precision where null."""

    name: str
    method: Method
    weights: Weights | None
    activations: Activations | None
    attention: Activations | None = None
    skip: list[str] = list(HEAD_NAMES)
    calibration: Calibration = Calibration()


def recipe_files() -> dict[str, Path]:
    """The recipes that come with jaxq, by bare name: beside the package in the repository, inside it when installed."""
    folders = Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs"
    return {path.stem: path for folder in folders[::-1] for path in sorted(folder.glob("*.yaml"))}


def read_recipe(path_or_name: str | Path) -> RecipeFile:
    """Reads a recipe from a path, or by the bare name of one that comes with jaxq.

    Raises FileNotFoundError where there is none, and ValueError that names the file and each key at fault, what was
    found there and what would work.
    """
    path, known = Path(path_or_name), recipe_files()
    if not path.is_file():
        if str(path_or_name) not in known:
            near = get_close_matches(path.stem, known, n=3) or sorted(known)
            raise FileNotFoundError(f"{path_or_name}: no such file, nor a recipe of jaxq's own; try {', '.join(near)}")
        path = known[str(path_or_name)]
    return read_yaml(path, RecipeFile)
