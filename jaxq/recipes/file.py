"""YAML recipes: what to quantize, and how, in a file that a person reads.

    name: OS+ W6A6
    method: {name: os_plus, lower: 1.0, candidates: 100, search: exhaustive, shift: true}
    weights: {bits: 6, symmetric: false, granularity: channel, observer: {name: min_max}}
    activations: {bits: 6, symmetric: false, granularity: tensor, observer: {name: average_min_max}}
    attention: null
    skip: ["lm_head/*", "embed*"]
    calibration: {samples: 128, length: 512, batch_size: 16, propagate: quantized}

`method` may be any of those below, `observer` any of those in `numbers`; what is left out has the default given
there. Numbers may be floats, methods may be several, each working on what the one before it left, and tables that are
looked up may be quantized too:

    name: OS+ and LLM-FP4, W4A4E4
    method: [{name: os_plus}, {name: llm_fp4, rounds: 3}]
    weights: {format: float, bits: 4, granularity: channel}
    activations: {format: float, bits: 4, exponent_bits: 2}
    embeddings: {format: float, bits: 4}
    skip: ["lm_head/*"]
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from jaxq.recipes.numbers import Activations, Embeddings, Part, Weights
from jaxq.recipes.yaml_file import read_yaml
from jaxq.steps.float_search import Clips, linear_clips, log_clips

# Which inputs are scaled: those that a norm makes, or also those that an earlier layer's columns do (down projections).
MigratedGroups = Literal["norms", "foldable"]
# A model has one or the other: a head of its own, or one tied to its embedding.
HEAD_NAMES = ("lm_head/*", "embed*")


class OSPlus(Part):
    """Outlier Suppression+: channel-wise shift, and the scale searched over `candidates` clip values above `lower`, for
    the least error on the first `batches` calibration batches (None: on all)."""

    name: Literal["os_plus"]
    lower: PositiveFloat = 1.0
    candidates: PositiveInt = 100
    search: Literal["exhaustive", "fast"] = "exhaustive"
    shift: bool = True
    groups: MigratedGroups = "norms"
    batches: PositiveInt | None = 4


class SmoothQuant(Part):
    name: Literal["smooth_quant"]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    groups: MigratedGroups = "norms"


class PlainMethod(Part):
    """Outlier Suppression's gamma migration, the shift of OS+ alone, or none at all: round to nearest."""

    name: Literal["gamma_migration", "channel_shift", "none"]


class FloatMethod(Part):
    """LLM-FP4 with pre-shifted or post-shifted exponent biases (the better ones in each group, or only such), or its
    baseline without them. `candidates` clip values
    from `lowest` to `highest`, fractions of the largest magnitude (None: those of `log_clips` or `linear_clips`); the
    activations' search looks at `tokens` of all tokens (None: at all)."""

    name: Literal["llm_fp4", "pre_shifted_fp4", "post_shifted_fp4", "fpq_baseline"]
    rounds: PositiveInt = 3
    candidates: PositiveInt = 100
    clips: Literal["log", "linear"] = "log"
    lowest: PositiveFloat | None = None
    highest: PositiveFloat | None = None
    search: Literal["exhaustive", "fast"] = "fast"
    metric: Literal["output_error", "cosine", "diagonal_hessian"] = "output_error"
    tokens: PositiveInt | None = 512

    @model_validator(mode="after")
    def _clips(self) -> FloatMethod:
        self.clip_values()  # which refuses those that make no sense
        return self

    def clip_values(self) -> Clips:
        ends = {"lowest": self.lowest, "highest": self.highest}
        given = {name: end for name, end in ends.items() if end is not None}
        return (log_clips if self.clips == "log" else linear_clips)(**given, count=self.candidates)


Method = Annotated[OSPlus | SmoothQuant | PlainMethod | FloatMethod, Field(discriminator="name")]


class Calibration(Part):
    samples: PositiveInt = 128
    length: Annotated[int, Field(ge=2)] = 512
    batch_size: PositiveInt = 16
    propagate: Literal["quantized", "full_precision"] = "quantized"


class RecipeFile(Part):
    """A whole recipe. `weights`, `activations`, `attention` (its two matmuls) and `embeddings` are in full precision
    where null. A single method may be given without a list around it."""

    name: str
    method: Annotated[list[Method], Field(min_length=1)]
    weights: Weights | None
    activations: Activations | None
    attention: Activations | None = None
    embeddings: Embeddings | None = None
    skip: list[str] = Field(default=list(HEAD_NAMES), validate_default=True)
    calibration: Calibration = Calibration()

    @field_validator("method", mode="before")
    @classmethod
    def _listed(cls, method: Any) -> Any:
        return method if isinstance(method, list) else [method]

    @field_validator("method")
    @classmethod
    def _quantizes_last(cls, method: list[Method]) -> list[Method]:
        if early := [m.name for m in method[:-1] if isinstance(m, FloatMethod)]:
            names = ", ".join(m.name for m in method)
            raise ValueError(f"{early[0]} quantizes, so nothing can come after it: put it last; found {names}")
        return method

    @field_validator("weights", "activations", "attention", "embeddings")
    @classmethod
    def _searched(cls, numbers: Weights | Activations | Embeddings | None, info: ValidationInfo) -> Any:
        last = info.data["method"][-1] if "method" in info.data else None
        if numbers is None or not isinstance(last, FloatMethod):
            return numbers
        if numbers.format != "float":
            raise ValueError(f"{last.name} searches floats: add `format: float`, or use another method")
        if "observer" in numbers.model_fields_set:
            raise ValueError(f"{last.name} searches the range: leave `observer` out")
        if isinstance(numbers, Activations) and numbers.granularity != "tensor":
            wanted = "searches one static range for the tensor: use `granularity: tensor`"
            raise ValueError(f"{last.name} {wanted}, found {numbers.granularity!r}")
        return numbers

    @field_validator("skip")
    @classmethod
    def _leaves_embeddings(cls, skip: list[str], info: ValidationInfo) -> list[str]:
        if info.data.get("embeddings") is not None and HEAD_NAMES[1] in skip:
            raise ValueError(
                f"{HEAD_NAMES[1]!r}, there by default, leaves in full precision what `embeddings` is to quantize: "
                f'leave one of them out, as with `skip: ["{HEAD_NAMES[0]}"]`; a head tied to the table is quantized'
            )
        return skip


def recipe_files() -> dict[str, Path]:
    """The recipes that come with jaxq, by bare name: beside the package in the repository, inside it when installed."""
    folders = Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"
    return {path.stem: path for folder in folders[::-1] for path in sorted(folder.glob("*.yaml"))}


def read_recipe(path_or_name: str | Path) -> RecipeFile:
    """Reads a recipe from a path, or by the bare name of one that comes with jaxq.

    Raises FileNotFoundError where there is none, and ValueError that names the file and each key at fault, what was
    found there and what would work.
    """
    path, known = Path(path_or_name), recipe_files()
    if not path.is_file():
        if str(path_or_name) not in known:
            near = ", ".join(get_close_matches(path.stem, known, n=3)) or "one that `jaxq recipes` lists"
            raise FileNotFoundError(f"{path_or_name}: no such file, nor a recipe of jaxq's own; try {near}")
        path = known[str(path_or_name)]
    return read_yaml(path, RecipeFile)
