"""Grids from ranges, among them the hardware's block formats: blocks whose scales are numbers of few bits themselves.

| `PerGroup.scales` | a block's scale                                                     | hardware's formats       |
|-------------------|---------------------------------------------------------------------|--------------------------|
| "real"            | float32                                                             |                          |
| "power_of_two"    | 2**k (E8M0)                                                         | MXFP8, MXFP6, MXFP4      |
| "e4m3"            | an E4M3 number, times one float32 number for the whole tensor       | NVFP4                    |

`Grid.scale` holds what the hardware stores for a block, exactly; `Grid.outer` the factor for the whole tensor, 1 with
powers of two. A value is `element * (scale * outer)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.formats import Float, Format, divide, fake_quant, grid_from_range
from jaxq.formats.floating import SMALLEST_NORMAL, exponent_of, power_of_two
from jaxq.formats.scales import E4M3
from jaxq.qtensor import Granularity, Grid, PerGroup, PerTensor

SMALLEST_E4M3 = 2.0**-9


def ends(x: jax.Array, granularity: Granularity, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest value under each grid, float32, of the rank of `x`; `axes` are those summed over.

    Taken where the values lie: a transposed copy of a weight would cost more than all the rest of its quantization.
    """
    if isinstance(granularity, PerGroup):
        last = axes[-1]
        x = x.reshape(*x.shape[:last], -1, granularity.size, *x.shape[last + 1 :])
        low, high = x.min(last + 1), x.max(last + 1)
    else:
        under = None if isinstance(granularity, PerTensor) else tuple(axes)
        low, high = x.min(under, keepdims=True), x.max(under, keepdims=True)
    return low.astype(jnp.float32), high.astype(jnp.float32)


def grid_of_ranges(
    fmt: Format, granularity: Granularity, low: jax.Array, high: jax.Array, experts: tuple[int, ...] = ()
) -> Grid:
    """The grid with which the codes of `fmt` span `[low, high]` (for blocks: as far as their scales can say it).

    Args:
      low, high: float32, one for each grid, of the rank of what is quantized.
      experts: the axes along which every index is a tensor of its own.
    """
    scales = granularity.scales if isinstance(granularity, PerGroup) else "real"
    if scales == "real":
        return Grid(*grid_from_range(fmt, low, high))
    assert isinstance(fmt, Float)  # `Quantizer` sees to it
    width = jnp.maximum(-low, high)
    whole = tuple(i for i in range(width.ndim) if i not in experts)
    return (_microscaled if scales == "power_of_two" else _e4m3_scaled)(fmt, width, whole)


def _microscaled(fmt: Float, width: jax.Array, whole: tuple[int, ...]) -> Grid:
    """OCP Microscaling Formats v1.0, sec. 6.3: 2**(floor(log2(max|x|)) - the exponent of the largest element).

    The largest elements of a block may exceed the largest of the format and saturate. Scales are at least 2**-126,
    the smallest that float32 can hold for sure (E8M0 has 2**-127 besides); a block of zeros has scale 1.
    """
    largest = math.frexp(fmt.largest)[1] - 1
    scale = power_of_two(jnp.maximum(exponent_of(width) - largest, SMALLEST_NORMAL))
    scale = jnp.where(width == 0, jnp.float32(1), scale)
    return Grid(scale, outer=jnp.ones_like(width.max(whole, keepdims=True)), scales="power_of_two")


def _e4m3_scaled(fmt: Float, width: jax.Array, whole: tuple[int, ...]) -> Grid:
    """NVFP4's two levels: outer = max|x| / (largest element * 448), scale = E4M3(max|block| / largest element / outer).

    A block that would get 0 gets the smallest E4M3 number, so that its values are not lost; one of zeros has scale 1.
    """
    most = width.max(whole, keepdims=True)
    # The least `outer` with which the smallest step of all, of a block with the smallest scale, is a normal number.
    step = 2.0 ** (1 - fmt.bias - fmt.mantissa_bits) * SMALLEST_E4M3
    outer = divide(most, jnp.full_like(most, fmt.largest * E4M3.largest))
    outer = jnp.where(most == 0, jnp.float32(1), jnp.maximum(outer, jnp.float32(2.0**SMALLEST_NORMAL / step)))
    wanted = divide(divide(width, jnp.full_like(width, fmt.largest)), jnp.broadcast_to(outer, width.shape))
    scale = jnp.maximum(fake_quant(E4M3, wanted, jnp.ones_like(most)), SMALLEST_E4M3)
    return Grid(jnp.where(width == 0, jnp.float32(1), scale), outer=outer, scales="e4m3")
