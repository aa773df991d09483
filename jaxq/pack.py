"""`pack`: the codes and grids of a quantized model as few bits in memory, and what they weigh."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxq.formats import AnyFloat, Float, Int
from jaxq.kernels.layout import eight_bit_integers, pack_codes, plane_rows, widths
from jaxq.kernels.plain import weight_integers
from jaxq.program.trace import path_name
from jaxq.qtensor import Grid, InputQuant, Packed, QTensor, Quantized, is_qtensor

PACK_AGAIN = "take the leaf that `pack` made, or pack again"


def pack(qparams: Any) -> Any:
    """The same model with its codes packed: codes of b bits take b bits. `execute` multiplies with them as they are.

    Zero points take a byte each, and so do scales of a block format (powers of two, E4M3); others are float32.

    Args:
      qparams: what `calibrate` returned, or any tree with `QTensor` leaves. Leaves that are packed already, or that are
        arrays, stay as they are.

    Returns:
      A tree of the same structure with a `Packed` leaf for each `QTensor`: for `jit`, Orbax, `jax.export` and sharding
      a few arrays. `unpack` gives the QTensors back, bit for bit.

    Raises:
      TypeError: under a transformation: what is packed must be at hand.
      ValueError: a zero point is no whole number from 0 to 255, or a scale none of those that the grid says it
        has; with the parameter's path. Only grids that were changed by hand, or trained, have such.
    """
    inputs = qparams.inputs if isinstance(qparams, Quantized) else {}
    params = qparams.params if isinstance(qparams, Quantized) else qparams
    corrected = {site.partition("#")[0] for quant in inputs.values() if _has_zero(quant) for site in quant.sites}

    def new(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = path_name(keys)
        return _pack(path, leaf, path in corrected) if isinstance(leaf, QTensor) else leaf

    packed = jax.tree_util.tree_map_with_path(new, params, is_leaf=is_qtensor)
    return replace(qparams, params=packed) if isinstance(qparams, Quantized) else packed


def unpack(qparams: Any) -> Any:
    """What `pack` was given, bit for bit."""
    return jax.tree.map(lambda leaf: _unpack(leaf) if isinstance(leaf, Packed) else leaf, qparams, is_leaf=is_qtensor)


_unpack = jax.jit(Packed.unpack)


def check_packed(path: str, leaf: Packed) -> None:
    """Raises ValueError for a leaf that `pack` cannot have made: a product with it would be a wrong number, or none."""
    rows, columns, bits = prod(leaf.rows), prod(leaf.columns), leaf.format.bits
    sizes = [(plane_rows(rows, width), *([columns] if leaf.columns else [])) for width in widths(bits)]
    found = [tuple(plane.shape[-len(size) :]) for plane, size in zip(leaf.planes, sizes)]
    whole = not jax.sharding.get_abstract_mesh().manual_axes  # in `shard_map` a leaf is one of the parts
    dtypes = {np.dtype(np.uint8), np.dtype(np.int8 if bits == 8 else np.uint8)}
    bytes_ = all(plane.dtype in dtypes for plane in leaf.planes)
    if len(leaf.planes) != len(sizes) or not bytes_ or (whole and found != sizes):
        planes = ", ".join(f"{plane.dtype}{list(plane.shape)}" for plane in leaf.planes) or "none"
        raise ValueError(f"{path}: planes {planes} are not those of {rows} codes of {bits} bits, {sizes}; {PACK_AGAIN}")
    grid, asymmetric = leaf.stored, isinstance(leaf.format, Int) and not leaf.format.symmetric
    if grid.scale is None or (isinstance(leaf.format, Int) and (grid.zero is None) == asymmetric):
        raise ValueError(f"{path}: {leaf.format} without its scale or zero point, or one too many; {PACK_AGAIN}")
    byte = np.dtype(np.uint8)
    kept = {"scale": np.dtype(np.float32) if grid.scales == "real" else byte, "zero": byte}
    for name, dtype in kept.items():
        if (a := getattr(grid, name)) is not None and a.dtype != dtype:
            raise ValueError(f"{path}: its {name} ({grid.scales} scales) is {a.dtype}, not {dtype}; {PACK_AGAIN}")
    if grid.scales != "real" and not isinstance(grid.scale, Tracer) and _lacks_numbers(grid):
        raise ValueError(f"{path}: a byte of its {grid.scales} scales stands for no number; {PACK_AGAIN}")
    for a in jax.tree.leaves((grid, leaf.exponents, leaf.sums)):
        if a.ndim != leaf.ndim or any(n % max(m, 1) for n, m in zip(leaf.shape, a.shape)):
            found, shape = list(a.shape), list(leaf.shape)
            raise ValueError(f"{path}: numbers {found} do not divide the weight {shape}; {PACK_AGAIN}")


def _lacks_numbers(stored: Grid) -> bool:
    """Whether a scale is NaN, of a grid that is at hand, even if a program is being traced."""
    with jax.ensure_compile_time_eval():
        return bool(jnp.isnan(stored.from_bytes().scale).any())


def bits_per_weight(qparams: Any) -> float:
    """What the quantized weights of a model take in memory: the bits of all that they consist of, for each number.

    4-bit codes take 4, and their scales (zero points, exponents, sums) what they add to it; an unpacked QTensor's codes
    take 8. NaN where nothing is quantized.
    """
    leaves = [leaf for leaf in jax.tree.leaves(qparams, is_leaf=is_qtensor) if is_qtensor(leaf)]
    numbers = sum(prod(leaf.shape) for leaf in leaves)
    return 8 * sum(a.nbytes for a in jax.tree.leaves(leaves)) / numbers if numbers else float("nan")


def _has_zero(quant: InputQuant) -> bool:
    return isinstance(quant.format, Int) and not quant.format.symmetric


def _pack(path: str, leaf: QTensor, sums: bool) -> Packed:
    if any(isinstance(a, Tracer) for a in jax.tree.leaves(leaf)):
        raise TypeError("pack: the codes are not at hand under jit or another transformation; call it outside")
    _check_bytes(path, leaf.grid)
    start, stop = _rows(leaf)
    reach = 0
    if leaf.exponents is not None:
        exponents = np.asarray(leaf.exponents)
        reach = int(exponents.max()) - int(exponents.min())
    return _packed(leaf, start, stop, sums and isinstance(leaf.format, Int), reach, _split(leaf))


def _check_bytes(path: str, grid: Grid) -> None:
    """Raises ValueError where bytes do not hold a grid: one that was changed after it was made."""
    if grid.scales == "real" and grid.zero is None:
        return
    with jax.ensure_compile_time_eval():
        scales, zeros = map(bool, held_by_bytes(grid))
    if not scales:
        raise ValueError(f"{path}: some of its scales are not {grid.scales}; round them, or call them real")
    if not zeros:
        raise ValueError(f"{path}: some of its zero points are no whole numbers from 0 to 255; round and clip them")


@jax.jit
def held_by_bytes(grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Whether `Grid.to_bytes` keeps all scales, bit for bit, and all zero points."""

    def bits(a: jax.Array) -> jax.Array:  # numbers that are subnormal may all be equal
        return jax.lax.bitcast_convert_type(a, jnp.int32)

    back = grid.to_bytes().from_bytes()
    same = (bits(back.scale) == bits(grid.scale)) & ~jnp.isnan(grid.scale)
    zeros = jnp.bool_(True) if grid.zero is None else (back.zero == grid.zero).all()
    return same.all() | jnp.bool_(grid.scales == "real"), zeros


def _split(leaf: QTensor) -> Int | Float | None:
    """The format that all codes of a weight have: kernels are made for one."""
    if not isinstance(leaf.format, AnyFloat):
        return leaf.format
    if leaf.grid.mantissa is None:
        return leaf.format.usual
    found = np.unique(np.asarray(leaf.grid.mantissa)).tolist()
    return Float(leaf.format.bits - 1 - found[0], found[0]) if len(found) == 1 else None


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _packed(leaf: QTensor, start: int, stop: int, sums: bool, reach: int, split: Int | Float | None) -> Packed:
    shape, bits = leaf.shape, leaf.format.bits
    rows, columns = shape[start:stop], shape[stop:]
    codes = jax.lax.bitcast_convert_type(leaf.codes, jnp.uint8) & jnp.uint8(2**bits - 1)
    codes = codes.reshape(*shape[:start], prod(rows), prod(columns))
    rows_last = start > 0 and not columns and not leaf.looked_up
    planes = pack_codes(codes[..., 0].swapaxes(-1, -2) if rows_last else codes, bits)
    if isinstance(leaf.format, Int) and bits == 8:
        planes = (eight_bit_integers(planes[0], leaf.format),)
    if not columns and not rows_last:
        planes = tuple(plane[..., 0] for plane in planes)
    total = None
    if sums:
        groups = leaf.grid.scale.shape[start] if len(rows) == 1 else 1
        total = (
            weight_integers(leaf).values.reshape(*shape[:start], groups, -1, *columns).sum(start + 1, dtype=jnp.int32)
        )
        total = total.reshape(*shape[:start], groups, *(1 for _ in rows[1:]), *columns)
    return Packed(
        planes,
        leaf.grid.to_bytes(),
        leaf.format,
        rows,
        shape[start - 1 : start] if rows_last else columns,
        leaf.dtype,
        leaf.exponents,
        total,
        reach,
        split,
        rows_last,
        leaf.looked_up,
    )


def _rows(leaf: QTensor) -> tuple[int, int]:
    """The axes that an output channel sums over, next to each other: what the leaf is packed along.

    They are where the grid is shared or has one number for each group. Where it is shared by all of a weight nothing
    can be told from it, and it is the last axis but one, as Flax has it. No product depends on this, only its speed.
    """
    shape, grid = leaf.shape, leaf.grid.scale.shape
    if len(shape) < 2:
        return 0, len(shape)
    grouped = [i for i, (n, m) in enumerate(zip(shape, grid)) if 1 < m < n]
    if grouped:
        return grouped[-1], grouped[-1] + 1
    shared = [i for i, (n, m) in enumerate(zip(shape, grid)) if m == 1 < n]
    stop = shared[-1] + 1 if shared else len(shape) - 1
    start = stop - 1
    while start - 1 in shared:
        start -= 1
    return (start, stop) if stop < len(shape) or stop - start == 1 else (len(shape) - 2, len(shape) - 1)
