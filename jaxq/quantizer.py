"""How an array is quantized: a format, a granularity and, where the range is not the plain one, an observer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

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
    rows, shape, order = _rows(w, quantizer.granularity, axes)
    low, high = observe(quantizer.observer, quantizer.format, [rows[:, None, :].astype(jnp.float32)])
    scale, zero = grid_from_range(quantizer.format, low, high)

    def back(a: jax.Array | None) -> jax.Array | None:
        if a is None:
            return None
        spread = a.reshape([shape[i] for i in order])
        return spread.transpose([order.index(i) for i in range(w.ndim)])

    return Grid(back(scale), back(zero))  # type: ignore[arg-type]


def _rows(
    w: jax.Array, granularity: Granularity, axes: tuple[int, ...]
) -> tuple[jax.Array, tuple[int, ...], list[int]]:
    """The weight as [rows, values], one row a grid; the grid's shape in the leaf's layout; the leaf's axes in the
    order in which the rows run through them."""
    free = [i for i in range(w.ndim) if i not in axes]
    order = free + list(axes)
    if isinstance(granularity, PerTensor):
        return w.reshape(1, w.size), (1,) * w.ndim, order
    moved = w.transpose(order)
    if isinstance(granularity, PerChannel):
        rows = moved.reshape(-1, _size(w, axes))
        return rows, tuple(1 if i in axes else n for i, n in enumerate(w.shape)), order
    if isinstance(granularity, PerGroup):
        last = w.shape[axes[-1]]
        if last % granularity.size:
            raise ValueError(f"groups of {granularity.size} do not divide the {last} channels of a {w.shape} weight")
        rows = moved.reshape(-1, granularity.size)
        return rows, tuple(n // granularity.size if i == axes[-1] else n for i, n in enumerate(w.shape)), order
    raise ValueError(f"{granularity} is for activations: quantize weights per tensor, channel or group")


def _size(w: jax.Array, axes: tuple[int, ...]) -> int:
    size = 1
    for i in axes:
        size *= w.shape[i]
    return size


@partial(jax.jit, static_argnums=(1, 2))
def quantize_weight(w: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]) -> QTensor:
    """A weight leaf as codes. `axes`: those that one output channel sums over."""
    return quantize_array(w, quantizer.format, weight_grid(w, quantizer, axes))


def fake_quantize_weight(w: jax.Array, quantizer: Quantizer, axes: tuple[int, ...]) -> jax.Array:
    """What `quantize_weight(...).dequantize()` gives, for searches that try many weights."""
    grid = weight_grid(w, quantizer, axes).over(w.shape)
    return fake_quant(quantizer.format, w, grid.scale, grid.zero, grid.mantissa)
