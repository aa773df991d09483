"""Contractions and look-ups of packed weights: from the program's axes to the matrices of `jaxq.kernels`, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.contraction import transform
from jaxq.formats import Float, Int
from jaxq.formats.integer import narrow
from jaxq.kernels import cpu, gpu, tpu
from jaxq.kernels.plain import (
    Integers,
    Products,
    activation_integers,
    decoded,
    product,
    shifted,
    weight_integers,
)
from jaxq.program.sites import Operands, Site
from jaxq.program.views import Convert, Reshape, View
from jaxq.qtensor import InputQuant, Packed, PerGroup


def multiplies(eqn: Any, site: Site, x: jax.Array, leaf: Packed, quant: InputQuant | None, products: Products) -> bool:
    """Whether `multiply` may do a site's product: a matrix product with one scale for each row and column of integers,
    or in groups of the rows where the device has kernels.

    Others take the decoded weight, and so does one that is told how its result is to be sharded: that is said of its
    own axes."""
    if site.kind != "linear" or site.experts or site.operands.experts or eqn.params.get("out_sharding") is not None:
        return False
    grids = jax.tree.leaves(leaf.stored)
    fits = all(a.ndim == leaf.ndim for a in grids)
    if fits and any(a.shape[i] > 1 for a in grids for i in site.leaf_axes):
        somewhere = _device(products, x, leaf.planes[0]) is not None
        fits = site.leaf_axes == leaf.row_axes and len(leaf.rows) == 1 and somewhere
    if leaf.exponents is not None:
        fits &= all(n == 1 for i, n in enumerate(leaf.exponents.shape) if i not in site.leaf_axes)
    if quant is None or quant.format is None:
        return fits
    numbers = jax.tree.leaves(quant.grid)
    return fits and not isinstance(quant.granularity, PerGroup) and all(a.size == 1 for a in numbers)


def read_input(quant: InputQuant | None, x: jax.Array, axes: tuple[int, ...], products: Products = "int8") -> Integers:
    """What the products of a group read in place of the activation `x`: as `apply_input`, in integers."""
    if quant is None:
        return Integers(x)

    def plain(quant: InputQuant, x: jax.Array) -> Integers:
        a = transform(x, quant.shift, quant.scale, axes)
        if quant.format is None:
            return Integers(a)
        return activation_integers(a, quant.format, quant.granularity, quant.grid, axes)

    def as_kernel(quant: InputQuant, x: jax.Array) -> Integers:
        found = plain(quant, x)
        return replace(found, int8=narrow(found.values, jnp.int8))

    if products != "int8" or not gpu.quantizes(quant, x, axes):
        return plain(quant, x)
    return _either("cuda", partial(gpu.quantized, axes=axes), as_kernel)(replace(quant, bias={}), x)


def multiply(eqn: Any, site: Site, x: Integers, leaf: Packed, products: Products) -> jax.Array | None:
    """The result of a `dot_general` of an activation and a packed weight; whichever of them comes first. None where
    weights are in groups that no kernel takes: they are to be decoded."""
    ops, dtype, precision = site.operands, eqn.outvars[0].aval.dtype, eqn.params["precision"]
    rows, views = _each(x, partial(_rows, ops)), site.ref.views if site.ref else ()
    matrix = partial(_columns, ops, views)
    groups = max(a.shape[i] for a in jax.tree.leaves(leaf.stored) for i in site.leaf_axes)
    sums = _sums(site, leaf, groups, matrix)
    if leaf.exponents is not None:
        rows = shifted(rows, matrix(leaf.exponents).T, leaf.reach)
    k_axis = int(max(set(range(leaf.ndim)) - {*site.leaf_axes}, default=-1) < min(site.leaf_axes))
    in_place = _in_place(site, leaf)
    if in_place:
        leaf, matrix, views, k_axis = _as_matrix(leaf, matrix), _same, (), 0
    seen = eqn.invars[ops.w].aval.dtype
    kernel = _kernel(rows, leaf, groups, sums, products, precision, seen, dtype) if in_place else None
    if kernel is None and groups > 1:
        return None

    def plain(x: Integers, leaf: Packed, sums: jax.Array | None) -> jax.Array:
        if groups > 1:
            return product(Integers(x.numbers), decoded(leaf), None, products, precision).astype(dtype)
        integers = weight_integers(leaf)
        w = _each(integers, matrix)
        if k_axis:  # as it is stored, from end to end, so that the program's own transpose is undone
            kept = [i for i in range(len(site.shapes[ops.w])) if i not in ops.w_axes]
            w = replace(w, values=_matrix(_seen(views, integers.values), kept, ops.w_axes))
        return product(x, w, sums, products, precision, k_axis).astype(dtype)

    multiplied = plain if kernel is None else _either(*kernel, plain)
    return _result(eqn, ops, multiplied(rows, leaf, sums))


def _in_place(site: Site, leaf: Packed) -> bool:
    """Whether the product sums over the weight's rows in their order, so that its planes are a matrix for it."""
    views = site.ref.views if site.ref else ()
    if leaf.rows_last:
        return leaf.ndim == 2 and site.leaf_axes == (1,) and not any(isinstance(view, Reshape) for view in views)
    seen = all(isinstance(view, Convert) for view in views) and site.operands.w_axes == tuple(range(len(leaf.rows)))
    return seen and bool(leaf.columns) and leaf.planes[0].ndim == 2


def _as_matrix(leaf: Packed, matrix: Callable[[jax.Array], jax.Array]) -> Packed:
    """A weight with planes [bytes, columns] as one of two axes, [K, columns]."""
    k, n = prod(leaf.local_rows), leaf.planes[0].shape[1]
    stored, kept = jax.tree.map(matrix, leaf.stored), {"rows": (k,), "columns": (n,), "rows_last": False}
    return replace(leaf, stored=stored, exponents=None, sums=None, **kept)


def _same(a: jax.Array) -> jax.Array:
    return a


def multiply_integers(eqn: Any, ops: Operands, views: tuple[View, ...], x: Integers, w: Integers) -> jax.Array:
    """The result of a `dot_general` of the integers of an activation and of a leaf, which it sees through `views`."""
    rows, columns = _each(x, partial(_rows, ops)), _each(w, partial(_columns, ops, views))
    return _result(eqn, ops, product(rows, columns, None, "int8", eqn.params["precision"]))


def _sums(site: Site, leaf: Packed, groups: int, matrix: Callable[[jax.Array], jax.Array]) -> jax.Array | None:
    """The sums of a weight's integers over each group, [groups, columns], where they are known beforehand: a shard's
    are not the whole weight's, and those of the leaf's rows are not those of other axes."""
    if leaf.sums is None or (groups == 1 and leaf.local_rows != leaf.rows) or leaf.row_axes != site.leaf_axes:
        return None
    return matrix(leaf.sums) if prod(leaf.sums.shape[i] for i in site.leaf_axes) == groups else None


Product = Callable[[Integers, Packed, jax.Array | None], jax.Array]
F = TypeVar("F", bound=Callable)


def _device(products: Products, *operands: jax.Array) -> str | None:
    """The kind of device that the program is traced for, if it may have kernels for these operands."""
    accelerator = tpu.target(*operands) or gpu.target(*operands) if products == "int8" else None
    return accelerator or (None if products == "xla" else cpu.target(*operands))


def _kernel(
    x: Integers,
    leaf: Packed,
    groups: int,
    sums: jax.Array | None,
    products: Products,
    precision: Any,
    seen: Any,
    dtype: Any,
) -> tuple[str, Product] | None:
    """The platform and the kernel of a product, of `dtype`, with a weight [K, columns] that the program has in `seen`,
    on the device that it is traced for, if that has one."""
    fmt, (codes, *_) = leaf.split, leaf.planes
    kind = _device(products, x.values, codes)

    def by_tpu(x: Integers, leaf: Packed, sums: jax.Array | None) -> jax.Array:
        assert isinstance(fmt, Int | Float) and kind is not None
        return tpu.packed_product(x, leaf.planes[0], weight_integers(leaf), fmt, sums, kind, seen=seen, dtype=dtype)

    def by_gpu(x: Integers, leaf: Packed, sums: jax.Array | None) -> jax.Array:
        assert isinstance(fmt, Int | Float)
        return gpu.packed_product(x, leaf.planes[0], leaf.stored, fmt, sums, seen=seen, dtype=dtype)

    def by_cpu(x: Integers, leaf: Packed, sums: jax.Array | None) -> jax.Array:
        return cpu.packed_product(x, leaf, sums, groups, products, precision).astype(dtype)

    if kind is None:
        return None
    if kind == "cpu":
        return ("cpu", by_cpu) if cpu.takes(x, leaf, groups, products) else None
    if kind in tpu.E4M3:
        return ("tpu", by_tpu) if tpu.has_kernel(x, fmt, kind, groups, seen) else None
    return ("cuda", by_gpu) if gpu.has_kernel(x, fmt, codes.shape[1], groups, sums, seen) else None


def _either(platform: str, kernel: Callable, plain: F) -> F:
    """What a kernel computes; `plain` on another platform that the program may be compiled for, and for derivatives,
    which kernels have none of."""

    @jax.custom_jvp
    def either(*operands: Any) -> Any:
        return lax.platform_dependent(*operands, default=plain, **{platform: kernel})

    either.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return cast(F, either)


def _each(x: Integers, f: Callable[[jax.Array], jax.Array]) -> Integers:
    return jax.tree.map(f, x)


def _rows(ops: Operands, a: jax.Array) -> jax.Array:
    """[tokens, channels] of an activation, or of what broadcasts against it."""
    return _matrix(a, [i for i in range(a.ndim) if i not in ops.x_axes], ops.x_axes)


def _columns(ops: Operands, views: tuple[View, ...], a: jax.Array) -> jax.Array:
    """[channels, columns] of a leaf, or of what is of its rank and has one number for a whole axis: it has it still."""
    a = _seen(views, a)
    return _matrix(a, ops.w_axes, [i for i in range(a.ndim) if i not in ops.w_axes])


def _result(eqn: Any, ops: Operands, y: jax.Array) -> jax.Array:
    """The `dot_general`'s result from the matrix product."""
    out = eqn.outvars[0].aval
    y = y.astype(out.dtype)
    return y.reshape(out.shape) if ops.x == 0 else y.T.reshape(out.shape)


def _matrix(a: jax.Array, first: Sequence[int], then: Sequence[int]) -> jax.Array:
    """`a` as a matrix, its axes `first` before its axes `then`."""
    return a.transpose([*first, *then]).reshape([prod(a.shape[i] for i in axes) for axes in (first, then)])


def _seen(views: tuple[View, ...], a: jax.Array) -> jax.Array:
    """A leaf's integers, or what broadcasts against them, as the contraction sees the leaf; casts aside."""
    for view in views:
        a = view.forward(a)
    return a


# Look-ups -------------------------------------------------------------------------------------------------------------


def looks_up(eqn: Any, site: Site, leaf: Packed) -> bool:
    """Whether a gather picks whole rows of a table that is packed along these."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    rows = (numbers.start_index_map, numbers.collapsed_slice_dims) == ((0,), (0,)) and not numbers.operand_batching_dims
    last = tuple(numbers.offset_dims) == (eqn.outvars[0].aval.ndim - 1,)
    plain = site.ref is not None and not site.ref.views and leaf.exponents is None and params["fill_value"] is None
    plain &= leaf.stored.outer is None
    along = leaf.ndim == 2 and (leaf.rows_last or not leaf.columns)
    return plain and rows and last and along and tuple(params["slice_sizes"]) == (1, *leaf.rows)


def look_up(eqn: Any, leaf: Packed, indices: jax.Array) -> jax.Array:
    """The rows that a gather picks, decoded: only they are."""
    params = {k: v for k, v in eqn.params.items() if k != "slice_sizes"}
    height = leaf.shape[0]

    def pick(a: jax.Array) -> jax.Array:
        return lax.gather(a, indices, slice_sizes=(1, a.shape[1]), **params)

    def pick_column(a: jax.Array) -> jax.Array:
        numbers = params["dimension_numbers"]._replace(start_index_map=(1,), collapsed_slice_dims=(1,))
        return lax.gather(a, indices, slice_sizes=(a.shape[0], 1), **{**params, "dimension_numbers": numbers})

    # One scale for each row, so that an index out of bounds finds NaN where the gather would have found it.
    scale = jnp.broadcast_to(leaf.stored.scale, (height, leaf.stored.scale.shape[1]))
    stored = jax.tree.map(lambda a: pick(a) if a.shape[0] == height else a, replace(leaf.stored, scale=scale))
    planes = tuple(map(pick_column if leaf.rows_last else pick, leaf.planes))
    return replace(leaf, planes=planes, stored=stored, columns=(), rows_last=False).dequantize()
