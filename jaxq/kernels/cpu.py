"""Products with packed weights on CPUs, in compiled programs: decoded as they are multiplied, one row in one pass over
the codes (`gemv`), more rows slab by slab (`slabs`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from jaxq.devices import device_kind
from jaxq.kernels import gemv, slabs
from jaxq.kernels.plain import Integers, Products, decoded, product, product_in_slabs, weight_integers
from jaxq.kernels.slabs import in_bands, slab_size
from jaxq.qtensor import Packed


def target(*operands: jax.Array) -> str | None:
    """The kind of CPU that a program is traced for, unless XLA may have to cut it for several devices: it would collect
    all slabs on each."""
    alone = jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)
    traced = any(isinstance(a, Tracer) for a in operands)
    return "cpu" if traced and alone and device_kind(*operands) == "cpu" else None


def takes(x: Integers, leaf: Packed, groups: int) -> bool:
    """Whether `packed_product` multiplies a weight of so many groups, as small ones are not worth it."""
    return gemv.takes(x, leaf, groups) or _wide(leaf) or _slab(leaf, groups) is not None


def packed_product(
    x: Integers, leaf: Packed, sums: jax.Array | None, groups: int, products: Products, precision: Any
) -> jax.Array:
    """`plain.product` of x, values [M, K], and a weight of planes [bytes, N] that `takes` takes: float32 [M, N].

    Args:
      sums: of the weight's integers over k, int32 [1, N], where they are known.
    """
    several = partial(_in_slabs, groups=groups, products=products, precision=precision)
    if not gemv.takes(x, leaf, groups):
        return several(x, leaf, sums)
    one = custom_vmap(partial(gemv.row_product, groups=groups, products=products))

    @one.def_vmap
    def mapped(size: int, batched: Any, *operands: Any) -> tuple[jax.Array, bool]:  # its rows are several
        return jax.vmap(several, jax.tree.map(lambda b: 0 if b else None, batched))(*operands), True

    return one(x, leaf, sums)


def _in_slabs(
    x: Integers, leaf: Packed, sums: jax.Array | None, groups: int, products: Products, precision: Any
) -> jax.Array:
    read, size = weight_integers, _slab(leaf, groups)
    if groups > 1:
        read, x, sums = decoded, Integers(x.centered if x.scale is None else x.centered * x.scale), None

    def multiply(leaf: Packed, sums: jax.Array | None) -> jax.Array:
        if size is None:
            return product(x, read(leaf), sums, products, precision)
        return product_in_slabs(x, leaf, sums, size, read, products, precision)

    return in_bands(multiply, leaf, sums) if _wide(leaf) else multiply(leaf, sums)


def _wide(leaf: Packed) -> bool:
    return leaf.columns[0] > slabs.WIDE


def _slab(leaf: Packed, groups: int) -> int | None:
    return slab_size(leaf.rows[0], slabs.BAND if _wide(leaf) else leaf.columns[0], groups)
