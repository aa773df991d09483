"""How an array is quantized: a format, a granularity and, where the range is not the plain one, an observer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import prod

import jax
import jax.numpy as jnp

from jaxq.formats import Format, fake_quant, grid_from_range
from jaxq.observers import Observer, min_max, observe
from jaxq.qtensor import Granularity, Grid, PerChannel, PerGroup, PerTensor, PerToken, QTensor, quantize_array


@dataclass(frozen=True)
class Quantizer:
    """A description: which numbers, how finely, and how the range is found where it is found by calibration."""

    format: Format
    granularity: Granularity = PerTensor()
    observer: Observer = field(default_factory=min_max)

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


def weight_grid(w: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]) -> Grid:
    """The grid of a weight leaf; `axes` are those that one output channel sums over.

    Raises:
        ValueError: the group size does not divide the summed axis, or the granularity is not one of weights.
    """
    rows = rows_of(w, axes).reshape(-1, row_size(w.shape, quantizer.granularity, axes))
    low, high = observe(quantizer.observer, quantizer.format, [rows[:, None, :].astype(jnp.float32)])
    grid = Grid(*grid_from_range(quantizer.format, low, high))
    return jax.tree.map(lambda a: in_leaf(a, w.shape, quantizer.granularity, axes), grid)


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


@partial(jax.jit, static_argnums=(1, 2))
def quantize_weight(w: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]) -> QTensor:
    """A weight leaf as codes. `axes`: those that one output channel sums over."""
    return quantize_array(w, quantizer.format, weight_grid(w, quantizer, axes))


def fake_quantize_weight(w: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]) -> jax.Array:
    """What `quantize_weight(...).dequantize()` gives, for searches that try many weights."""
    grid = weight_grid(w, quantizer, axes).over(w.shape)
    return fake_quant(quantizer.format, w, grid.scale, grid.zero, grid.mantissa)
