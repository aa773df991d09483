"""What happens to an activation just before a contraction reads it: shift, scale, fake-quantize."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax

from jaxq.blocks import ends, grid_of_ranges
from jaxq.formats import Format, divide, fake_quant
from jaxq.qtensor import Granularity, Grid, InputQuant, PerGroup


def along(v: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Spreads a per-channel array, whose i-th axis belongs to `axes[i]`, over an array of rank `ndim`."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    shape = [1] * ndim
    for i in order:
        shape[axes[i]] = v.shape[i]
    return v.transpose(order).reshape(shape)


def transform(x: jax.Array, shift: jax.Array | None, scale: jax.Array | None, axes: Sequence[int]) -> jax.Array:
    """x' = (x - z) / s (OS+, eq. 3 and 5); `shift` and `scale` have the shape of x's contracted axes."""
    if shift is not None:
        x = x - along(shift, axes, x.ndim).astype(x.dtype)
    if scale is not None:
        x = divide(x, along(scale, axes, x.ndim).astype(x.dtype))
    return x


def dynamic_grid(x: jax.Array, fmt: Format, granularity: Granularity, axes: Sequence[int]) -> Grid:
    """The grid of each token (of each run of channels in it), from its own min and max over the channels.

    NVFP4's scale for the whole tensor comes from all of `x`, too, padding included.
    """
    if isinstance(granularity, PerGroup) and x.shape[axes[-1]] % granularity.size:
        channels = x.shape[axes[-1]]
        raise ValueError(f"groups of {granularity.size} do not divide the {channels} channels: choose a divisor")
    return grid_of_ranges(fmt, granularity, *ends(x, granularity, axes))


@partial(jax.jit, static_argnums=(1, 2, 4))
def quantize_activation(
    x: jax.Array, fmt: Format, granularity: Granularity, grid: Grid | None, axes: tuple[int, ...]
) -> jax.Array:
    """Fake-quantizes an activation; `grid` is None where the granularity is dynamic.

    Jitted, so that a program traces and lowers it once for all its activations of one shape.
    """
    if grid is None:
        grid = dynamic_grid(jax.lax.stop_gradient(x), fmt, granularity, axes)
    grid = grid.over(x.shape)
    return fake_quant(fmt, x, grid.scale, grid.zero, grid.mantissa)


def apply_input(quant: InputQuant, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """What the contractions of a group read in place of the activation `x` with channel axes `axes`."""
    x = transform(x, quant.shift, quant.scale, axes)
    if quant.format is None:
        return x
    return quantize_activation(x, quant.format, quant.granularity, quant.grid, axes)
