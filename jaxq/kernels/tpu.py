"""What a TPU does in place of `jaxq.kernels.plain.product`: the products that have a kernel, and on which numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.devices import device_kind
from jaxq.formats import Float, Format, Int
from jaxq.kernels.carrier import Carrier, float_carrier, int8_carrier, number_carrier
from jaxq.kernels.decoded_matmul import Scaled, decoded_matmul, tile_of
from jaxq.kernels.layout import HALF, fits
from jaxq.kernels.packed_matmul import Operands, packed_matmul
from jaxq.kernels.plain import MACHINE_FLOATS, Integers, element_scale
from jaxq.kernels.tiles import SMALLEST_GROUP

# The e4m3 of the matrix units, by `jax.Device.device_kind`. Where it is e4m3fn, two of them are multiplied at twice
# the rate of bfloat16; the older ones multiply bfloat16 by any float of 8 bits at the rate of bfloat16.
E4M3 = {"TPU v5 lite": jnp.float8_e4m3b11fnuz, "TPU v6 lite": jnp.float8_e4m3b11fnuz, "TPU7x": jnp.float8_e4m3fn}

# Of groups below 128 a token takes 128 / size rows of the matrix unit, each times all of the weights. By the compilers'
# schedules XLA, which decodes them, is as fast at about so many; with twice as many the kernel takes long to compile.
STACKED_ROWS = 192
# Beyond so many, decoding in the kernel takes less, where it may be: less than stacked rows, and than a pass over the
# result for each group of 128 or more.
MOST_STACKED, MOST_PASSES = 96, 96

# So many products of numbers of 8 bits, zero points included, are below 2**31 in sum.
MOST_CHANNELS = 2**15
# e4m3fn's largest number and its smallest step.
E4M3_LARGEST, E4M3_STEP = 448, 2.0**-9


def elements_dtype(device_kind: str) -> Any:
    """What holds a float activation's numbers of up to four significant bits: e4m3fn where it is multiplied.

    Raises:
        ValueError: the kernels have not been compiled for such a device.
    """
    return jnp.float8_e4m3fn if _e4m3(device_kind) == jnp.float8_e4m3fn else jnp.bfloat16


def weight_carrier(fmt: Int | Float, activations: Any, device_kind: str) -> Carrier:
    """The carrier of weights for a product with activations of a dtype: int8, bfloat16 or `elements_dtype`.

    Args:
      fmt: of 4 bits, `Int(8)` or a machine's float.

    Raises:
        ValueError: there is none, or the kernels have not been compiled for such a device.
    """
    e4m3 = _e4m3(device_kind)
    if fmt.bits == 8:
        return number_carrier(jnp.int8 if isinstance(fmt, Int) else MACHINE_FLOATS[fmt], activations, e4m3)
    if isinstance(fmt, Int) and jnp.dtype(activations) == jnp.int8:
        return int8_carrier(fmt)
    if isinstance(fmt, Float) and jnp.dtype(activations) == jnp.bfloat16:
        return float_carrier(fmt, jnp.float8_e5m2)
    return float_carrier(fmt, e4m3)


def _e4m3(device_kind: str) -> Any:
    if device_kind not in E4M3:
        raise ValueError(f"no kernels for {device_kind!r}: they are compiled for {', '.join(E4M3)}; use the plain path")
    return E4M3[device_kind]


def target(*operands: jax.Array) -> str | None:
    """The kind of TPU that a program is traced for, if there are kernels for it and they can have these operands."""
    kind = device_kind(*operands)
    return kind if kind in E4M3 else None


def has_kernel(x: Integers, fmt: Format | None, kind: str, groups: int = 1, seen: Any = jnp.float32) -> bool:
    """Whether `packed_product` multiplies [M, K] with weights of a format in so many groups: of 4 bits, or a machine's
    of 8, with integers of 8 bits or, exactly in bfloat16, what has as few significant bits; or with an activation in
    bfloat16 that is not quantized. Of int8 per channel XLA's own products are as fast on v5e and v6e.

    Args:
      seen: the dtype in which the program has the weight: in bfloat16 it may be decoded.
    """
    (rows, k), integers = x.values.shape, isinstance(fmt, Int) and fmt.bits == 8
    if not isinstance(fmt, Int | Float) or not fits(k, groups, SMALLEST_GROUP):
        return False
    if fmt.bits != 4 and fmt not in MACHINE_FLOATS and not (integers and (groups > 1 or kind == "TPU7x")):
        return False
    if _decodes(x, fmt, kind, groups, seen):
        return True
    if _stacked(rows, k, groups) > STACKED_ROWS or (integers and k > MOST_CHANNELS):
        return False
    if x.bound is None:
        return x.values.dtype == jnp.bfloat16
    assert x.largest is not None and x.significant is not None
    return x.largest <= 128 if isinstance(fmt, Int) else x.significant <= 8 and x.center is None


def _stacked(rows: int, k: int, groups: int) -> int:
    """The rows that tokens take in groups below 128, 0 in others."""
    return rows * HALF * groups // k if k // groups < HALF else 0


def _decodes(x: Integers, fmt: Int | Float, kind: str, groups: int, seen: Any) -> bool:
    """Whether weights in groups are multiplied in bfloat16: the program has them so, it holds the activation (integers
    with their zero points), and tokens are many. On v5e int8 products of groups of 128 and more are faster, but for
    zero points."""
    rows, k = x.values.shape
    many = rows > MOST_PASSES or _stacked(rows, k, groups) > MOST_STACKED
    if groups == 1 or not many or jnp.dtype(seen) != jnp.bfloat16 or tile_of(rows, k, groups, HALF) is None:
        return False
    if x.bound is None:
        return x.values.dtype == jnp.bfloat16
    assert x.largest is not None and x.significant is not None
    int8 = isinstance(fmt, Int) and fmt.symmetric and x.center is None and x.largest <= 128
    faster = int8 and kind == "TPU v5 lite" and k // groups >= HALF
    return x.significant <= 8 and not faster


def packed_product(
    x: Integers,
    codes: jax.Array,
    w: Integers,
    fmt: Int | Float,
    sums: jax.Array | None,
    kind: str,
    *,
    seen: Any = jnp.float32,
    dtype: Any = jnp.float32,
    interpret: Any = False,
) -> jax.Array:
    """`jaxq.kernels.plain.product` of `has_kernel`'s operands, by a kernel: y [M, N].

    With Wc = W + d what the carriers hold, (x + a)(W + b) = x Wc - (d - b) sum(x) + a (sum(W) + K b), in each group;
    where weights are decoded, x + a times W + b as bfloat16 has them.

    Args:
      x: as there; quantized ones are integers times a power of two of 8 significant bits at most.
      codes: of the weights, as they are packed: uint8 [K/2, N], of 8 bits [K, N] and of integers int8.
      w: scale and center of its integers, [groups, N] or [1, 1], and their values, of which only sums are used where
        `sums` is None.
      fmt: of the codes.
      sums: of w's values over each group, int32 [groups, N].
      kind: the TPU, as `target` says.
      seen: the dtype in which the program has the weight.
      dtype: of y, which is rounded once, in the kernel.
    """
    scale = element_scale(w, fmt, codes.shape[1])
    if _decodes(x, fmt, kind, scale.shape[0], seen):
        carrier = weight_carrier(fmt, jnp.bfloat16, kind)
        operands = _decoded(x, codes, scale, w, fmt, carrier)
        return decoded_matmul(operands, carrier, dtype=dtype, interpret=interpret)
    values_dtype, unit = _activations_dtype(x, fmt, kind)
    values = (x.values * jnp.asarray(unit, x.values.dtype)).astype(values_dtype)
    carrier = weight_carrier(fmt, values.dtype, kind)
    (m, k), (groups, n) = values.shape, scale.shape
    exact = jnp.int32 if values.dtype == jnp.int8 else jnp.float32
    left, right = [], []
    held = _held(fmt, carrier, w)
    if held is not None:
        left.append(_sums_of_groups(values, groups, exact))
        right.append(held)
    if x.center is not None:
        total = w.values.reshape(groups, -1, n).sum(1, dtype=jnp.int32) if sums is None else sums
        left.append(-x.center)
        right.append(total if w.center is None else total.astype(jnp.float32) + k // groups * w.center)

    def stacked(parts: list, shape: tuple[int, int]) -> jax.Array | None:
        return jnp.stack([jnp.broadcast_to(jnp.asarray(a).astype(exact), shape) for a in parts]) if parts else None

    rows = None if x.scale is None else jnp.broadcast_to(x.scale * jnp.float32(1 / unit), (m, 1))
    operands = Operands(values, codes, scale, rows, stacked(left, (m, groups)), stacked(right, (groups, n)))
    return packed_matmul(operands, carrier, dtype=dtype, interpret=interpret)


def _decoded(
    x: Integers, codes: jax.Array, scale: jax.Array, w: Integers, fmt: Int | Float, carrier: Carrier
) -> Scaled:
    """The operands of a product that is decoded; `scale` is of the weight's elements, [groups, N]."""
    center = _held(fmt, carrier, w)
    if center is not None:
        center = jnp.broadcast_to(jnp.asarray(center, jnp.float32), scale.shape)
    rows = None if x.scale is None else jnp.broadcast_to(x.scale, (x.values.shape[0], 1))
    return Scaled(x.centered.astype(jnp.bfloat16), codes, scale, center, rows)


def _held(fmt: Int | Float, carrier: Carrier, w: Integers) -> Any:
    """What carriers of integers have beyond `values + center`; None where it is nothing."""
    if not isinstance(fmt, Int) or (w.center is None and carrier.offset == 0):
        return None
    middle = 0 if fmt.symmetric or fmt.bits == 8 else 2 ** (fmt.bits - 1)
    return carrier.offset + middle - (0 if w.center is None else w.center)


def _sums_of_groups(values: jax.Array, groups: int, dtype: Any) -> jax.Array:
    """Of [M, K] over each group, [M, groups], as a product: of a reshaped activation XLA makes a larger copy."""
    if groups == 1:
        return values.sum(1, dtype=dtype, keepdims=True)
    k = values.shape[1]
    member = jnp.arange(k)[:, None] // (k // groups) == jnp.arange(groups)[None]
    return jnp.dot(values, member.astype(values.dtype), preferred_element_type=dtype)


def _activations_dtype(x: Integers, fmt: Int | Float, kind: str) -> tuple[Any, float]:
    """What holds an activation beside weights of a format: int8, bfloat16, or an e4m3's four significant bits; and by
    which power of two it is multiplied for that."""
    if x.largest is None or x.significant is None:
        return jnp.bfloat16, 1.0
    if isinstance(fmt, Int):
        return jnp.int8, 1.0
    held, unit = elements_dtype(kind), 1.0 if x.largest <= E4M3_LARGEST else E4M3_STEP
    if held == jnp.bfloat16 or x.significant > 4 or x.largest * unit > E4M3_LARGEST:
        return jnp.bfloat16, 1.0
    return held, unit
