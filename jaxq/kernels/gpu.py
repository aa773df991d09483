"""What a Hopper GPU does in place of `jaxq.kernels.plain.product`, where it is asked to: see `hopper_matmul`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq.formats import Float, Format, Int
from jaxq.kernels.devices import device_kind
from jaxq.kernels.layout import fits
from jaxq.kernels.plain import Integers, element_scale

COLUMNS = 128  # of the weight, that a warpgroup multiplies at once
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")  # how `jax.Device.device_kind` begins


def target(*operands: jax.Array) -> str | None:
    """The kind of GPU that a program is traced for, if there is a kernel for it that can have these operands."""
    kind = device_kind(*operands)
    return kind if kind is not None and kind.startswith(HOPPER) else None


def has_kernel(x: Integers, fmt: Format | None, columns: int, groups: int = 1) -> bool:
    """Whether `packed_product` multiplies [M, K] with `columns` columns of weights of a format in so many groups: of 4
    bits, with an activation in bfloat16 that is not quantized. Integers XLA multiplies, exactly, in int8."""
    if not isinstance(fmt, Int | Float) or fmt.bits != 4 or x.bound is not None or x.values.dtype != jnp.bfloat16:
        return False
    return fits(x.values.shape[1], groups) and columns % COLUMNS == 0


def packed_product(x: Integers, codes: jax.Array, w: Integers, fmt: Int | Float) -> jax.Array:
    """`jaxq.kernels.plain.product` of `has_kernel`'s operands, by the kernel: y [M, N], float32.

    The codes of an asymmetric integer are multiplied less 8, and its center after that, in each group:
    x (W + b) = x W + b sum(x).

    Args:
      x: as there.
      codes: of the weights, packed: uint8 [K/2, N].
      w: scale and center of its integers, [groups, N] or [1, 1]; their values are not used.
      fmt: of the codes.
    """
    from jaxq.kernels.hopper_matmul import hopper_matmul  # not above: not every jaxlib comes with Mosaic GPU

    scale = element_scale(w, fmt, codes.shape[1])
    y = hopper_matmul(x.values, codes, scale, fmt)
    if w.center is None:
        return y
    totals = x.values.reshape(x.values.shape[0], scale.shape[0], -1).sum(2, dtype=jnp.float32)
    return y + jnp.dot(totals, w.center * scale, precision="highest")
