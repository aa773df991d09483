"""Products with packed weights on CPUs, in compiled programs: decoded as they are multiplied, one row in one pass over
the codes (`gemv`), more rows a band of columns at a time (`bands`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from jaxq.devices import device_kind
from jaxq.kernels import gemv
from jaxq.kernels.bands import band_size, product_in_bands
from jaxq.kernels.plain import Integers, Products, decoded, fits_int8, largest_integer, product, weight_integers
from jaxq.qtensor import Packed


def target(*operands: jax.Array) -> str | None:
    """The kind of CPU that a program is traced for, unless XLA may have to cut it for several devices: it would collect
    all bands on each."""
    alone = jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)
    traced = any(isinstance(a, Tracer) for a in operands)
    return "cpu" if traced and alone and device_kind(*operands) == "cpu" else None


def takes(x: Integers, leaf: Packed, groups: int, products: Products) -> bool:
    """Whether `packed_product` multiplies a weight of so many groups, which is neither small nor there as products in 8
    bits read it."""
    at_hand = leaf.planes[0].dtype == jnp.int8 and fits_int8(x, largest_integer(leaf.format), products)
    in_bands = _band(leaf) is not None and not (at_hand and groups == 1)
    return gemv.takes(x, leaf, groups) or in_bands


def packed_product(
    x: Integers, leaf: Packed, sums: jax.Array | None, groups: int, products: Products, precision: Any
) -> jax.Array:
    """`plain.product` of x, values [M, K], and a weight of planes [bytes, N] that `takes` takes: float32 [M, N].

    Args:
      sums: of the weight's integers over k, int32 [1, N], where they are known.
    """
    several = partial(_in_bands, groups=groups, products=products, precision=precision)
    if not gemv.takes(x, leaf, groups):
        return several(x, leaf, sums)
    one = custom_vmap(partial(gemv.row_product, groups=groups, products=products))

    @one.def_vmap
    def mapped(size: int, batched: Any, *operands: Any) -> tuple[jax.Array, bool]:  # its rows are several
        return jax.vmap(several, jax.tree.map(lambda b: 0 if b else None, batched))(*operands), True

    return one(x, leaf, sums)


def _in_bands(
    x: Integers, leaf: Packed, sums: jax.Array | None, groups: int, products: Products, precision: Any
) -> jax.Array:
    size, read = _band(leaf), weight_integers
    if groups > 1:
        read, x, sums = decoded, Integers(x.numbers), None
    if size is None:
        return product(x, read(leaf), sums, products, precision)
    return product_in_bands(x, leaf, sums, size=size, read=read, products=products, precision=precision)


def _band(leaf: Packed) -> int | None:
    return band_size(leaf.rows[0], leaf.columns[0])
