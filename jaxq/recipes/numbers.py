"""The numbers of a recipe: formats, granularities and observers, as they stand in its YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]


class Part(BaseModel):
    """A mapping of a recipe: only the keys it names, only values of their type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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


AnyObserver = PlainObserver | EMAMinMax | AverageQuantile | EMAQuantile
WeightObserver = Annotated[AnyObserver | LSQPlus, Field(discriminator="name")]
TableObserver = Annotated[AnyObserver, Field(discriminator="name")]
ActivationObserver = Annotated[AnyObserver | TokenQuantile, Field(discriminator="name")]


class Numbers(Part):
    """Integers, or floats whose split into exponent and mantissa is searched by the methods that search floats, and the
    usual one elsewhere, unless `exponent_bits` gives it."""

    format: Literal["int", "float"] = "int"
    bits: Annotated[int, Field(ge=2, le=8)]
    exponent_bits: PositiveInt | None = None
    symmetric: bool = True

    @model_validator(mode="after")
    def _format(self) -> Numbers:
        if self.format == "int":
            if self.exponent_bits is not None:
                raise ValueError("`exponent_bits` is for floats: leave it out, or add `format: float`")
            return self
        if "symmetric" in self.model_fields_set:
            raise ValueError("floats are always symmetric: leave `symmetric` out, or use `format: int`")
        if self.bits < 3:
            raise ValueError(f"floats have 3 to 8 bits, found `bits: {self.bits}`")
        if self.exponent_bits is not None and self.exponent_bits >= self.bits:
            most = f"at most {self.bits - 1} `exponent_bits`, beside the sign"
            raise ValueError(f"a float of {self.bits} bits has {most}; found {self.exponent_bits}")
        return self


class Grouped(Numbers):
    granularity: str
    group_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _combination(self) -> Grouped:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("`granularity: group` and `group_size` belong together: give both or neither")
        return self


class Weights(Grouped):
    granularity: Literal["tensor", "channel", "group"] = "channel"
    observer: WeightObserver = PlainObserver(name="min_max")

    @model_validator(mode="after")
    def _observer(self) -> Weights:
        if self.observer.name == "lsq_plus" and not self.symmetric:
            raise ValueError("the observer lsq_plus is for symmetric weights: `symmetric: true`, or min_max or mse")
        return self


class Activations(Grouped):
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


class Embeddings(Numbers):
    """Tables that are looked up."""

    granularity: Literal["row"] = "row"
    observer: TableObserver = PlainObserver(name="min_max")
