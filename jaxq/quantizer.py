"""How an array is quantized: a format, a granularity and, where the range is not the plain one, an observer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import prod

import jax
import jax.numpy as jnp

from jaxq.blocks import ends, grid_of_ranges
from jaxq.formats import Float, Format, fake_quant
from jaxq.observers import Observer, min_max, observe
from jaxq.qtensor import Granularity, Grid, PerChannel, PerGroup, PerTensor, PerToken, QTensor, quantize_array


@dataclass(frozen=True)
class Quantizer:
    """A description: which numbers, how finely, and how the range is found where it is found by calibration.

    Raises:
        ValueError: a block format's scales with a format other than `Float`, or with an observer other than `min_max`.
    """

    format: Format
    granularity: Granularity = PerTensor()
    observer: Observer = field(default_factory=min_max)

    def __post_init__(self) -> None:
        if not isinstance(self.granularity, PerGroup) or self.granularity.scales == "real":
            return
        if not isinstance(self.format, Float):
            raise ValueError(f"blocks with {self.granularity.scales} scales are of Floats, not of {self.format}")
        if self.observer != min_max():
            raise ValueError(
                f"{self.granularity.scales} scales come from a block's largest value: the observer must be min_max(), "
                f"not {self.observer.name}"
            )

    @property
    def dynamic(self) -> bool:
        """For activations: the grid is made anew at every call."""
        return isinstance(self.granularity, (PerToken, PerGroup))


def per_tensor(fmt: Format, observer: Observer | None = None) -> Quantizer:
    return Quantizer(fmt, PerTensor(), observer or min_max())


def per_channel(fmt: Format, observer: Observer | None = None) -> Quantizer:
    return Quantizer(fmt, PerChannel(), observer or min_max())


def per_token(fmt: Format) -> Quantizer:
    return Quantizer(fmt, PerToken())


def per_group(fmt: Format, size: int, observer: Observer | None = None) -> Quantizer:
    return Quantizer(fmt, PerGroup(size), observer or min_max())


MX_BLOCKS, NVFP4_BLOCKS = PerGroup(32, "power_of_two"), PerGroup(16, "e4m3")
OCP_ELEMENTS = {8: (Float(4, 3, reserved=1), Float(5, 2, reserved=4)), 6: (Float(2, 3), Float(3, 2)), 4: (Float(2, 1),)}


def mxfp8(fmt: Float = OCP_ELEMENTS[8][0]) -> Quantizer:
    """OCP MXFP8: blocks of 32 E4M3 numbers (or E5M2, `Float(5, 2, reserved=4)`) with one power of two as their scale.
    For weights and, dynamic, for activations. Raises ValueError for other elements."""
    return _microscaling(8, fmt)


def mxfp6(fmt: Float = OCP_ELEMENTS[6][0]) -> Quantizer:
    """OCP MXFP6: as `mxfp8` with E2M3, or E3M2."""
    return _microscaling(6, fmt)


def mxfp4() -> Quantizer:
    """OCP MXFP4: as `mxfp8` with E2M1."""
    return _microscaling(4, OCP_ELEMENTS[4][0])


def _microscaling(bits: int, fmt: Float) -> Quantizer:
    if fmt not in OCP_ELEMENTS[bits]:
        raise ValueError(f"MXFP{bits} has elements {' or '.join(map(str, OCP_ELEMENTS[bits]))}, not {fmt}")
    return Quantizer(fmt, MX_BLOCKS)


def nvfp4() -> Quantizer:
    """NVFP4: blocks of 16 E2M1 numbers with an E4M3 scale each, and a float32 scale for the whole tensor.

    The tensor is one weight (of each expert, of each layer of a scan), or all of an activation as it is at hand at
    every call: a token's numbers then depend, if little, on those beside it.
    """
    return Quantizer(Float(2, 1), NVFP4_BLOCKS)


def weight_grid(w: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], experts: tuple[int, ...] = ()) -> Grid:
    """The grid of a weight leaf; `axes` are those that one output channel sums over, `experts` those along which every
    index is a weight of its own.

    Raises:
        ValueError: the group size does not divide the summed axis, or the granularity is not one of weights.
    """
    fmt, granularity = quantizer.format, quantizer.granularity
    size = row_size(w.shape, granularity, axes)
    if quantizer.observer == min_max():
        low, high = ends(w, granularity, axes)
    else:
        rows = rows_of(w, axes).reshape(-1, 1, size).astype(jnp.float32)
        low, high = (in_leaf(end, w.shape, granularity, axes) for end in observe(quantizer.observer, fmt, [rows]))
    return grid_of_ranges(fmt, granularity, low, high, experts)


def rows_of(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A weight leaf as [output channels, what each of them sums over]."""
    moved = w.transpose(_order(w.ndim, axes))
    return moved.reshape(-1, prod(w.shape[i] for i in axes))


def row_size(shape: tuple[int, ...], granularity: Granularity, axes: tuple[int, ...]) -> int:
    """How many successive values of `rows_of` share a grid."""
    if isinstance(granularity, PerTensor):
        return prod(shape)
    if isinstance(granularity, PerChannel):
        return prod(shape[i] for i in axes)
    if isinstance(granularity, PerGroup):
        last = shape[axes[-1]]
        if last % granularity.size:
            raise ValueError(f"groups of {granularity.size} do not divide the {last} channels of a {shape} weight")
        return granularity.size
    raise ValueError(f"{granularity} is for activations: quantize weights per tensor, channel or group")


def in_leaf(a: jax.Array, shape: tuple[int, ...], granularity: Granularity, axes: tuple[int, ...]) -> jax.Array:
    """One number for each grid, in the order of `rows_of`, in the layout of a leaf of `shape`."""
    if isinstance(granularity, PerTensor):
        return a.reshape((1,) * len(shape))
    runs = {axes[-1]: shape[axes[-1]] // granularity.size} if isinstance(granularity, PerGroup) else {}
    whole = dict.fromkeys(axes, 1) if isinstance(granularity, PerChannel) else {}
    sizes = [{**dict(enumerate(shape)), **whole, **runs}[i] for i in range(len(shape))]
    order = _order(len(shape), axes)
    return a.reshape([sizes[i] for i in order]).transpose([order.index(i) for i in range(len(shape))])


def _order(ndim: int, axes: tuple[int, ...]) -> list[int]:
    return [i for i in range(ndim) if i not in axes] + list(axes)


@partial(jax.jit, static_argnums=(1, 2, 3))
def quantize_weight(
    w: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], experts: tuple[int, ...] = ()
) -> QTensor:
    """A weight leaf as codes. `axes` and `experts` as for `weight_grid`."""
    return quantize_array(w, quantizer.format, weight_grid(w, quantizer, axes, experts))


def fake_quantize_weight(
    w: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], experts: tuple[int, ...] = ()
) -> jax.Array:
    """What `quantize_weight(...).dequantize()` gives, for searches that try many weights."""
    grid = weight_grid(w, quantizer, axes, experts).over(w.shape)
    return fake_quant(quantizer.format, w, grid.scale, grid.zero, grid.mantissa)
