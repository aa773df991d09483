"""Scales that are stored as bytes, in a Hopper GPU's registers: what `jaxq.formats.scales.from_bytes` means, in few
instructions for bytes that stand for numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxq.formats.scales import Scales
from jaxq.kernels.hopper_registers import as_vector, element, moved


def real(scales: Scales, stored: jax.Array, layout: Any) -> jax.Array:
    """Float32 numbers, of one dimension, an even number of them in a lane."""
    if scales == "real":
        return stored.astype(jnp.float32)
    if scales == "power_of_two":  # 2**-127, byte 0, is subnormal
        bits = jnp.maximum(jnp.left_shift(stored.astype(jnp.int32), 23), jnp.int32(1 << 22))
        return lax.bitcast_convert_type(bits, jnp.float32)
    return moved(_e4m3, [stored], layout, stored.shape, jnp.float32, layout)


def _e4m3(registers: np.ndarray) -> np.ndarray:
    """By the machine's own conversion, of two at a time."""
    word, half, number = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16), ir.F32Type.get()
    found = np.empty(registers.shape, object)
    for i, bytes_ in np.ndenumerate(registers):
        (count,) = ir.VectorType(bytes_.type).shape
        halves = utils.bitcast(bytes_, ir.VectorType.get((count // 2,), half))
        numbers = []
        for j in range(count // 2):
            both = llvm.inline_asm(word, [element(halves, j)], "cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h")
            both = as_vector(both, ir.F16Type.get(), 2)
            numbers += [arith.extf(number, element(both, side)) for side in (0, 1)]
        found[i] = vector.from_elements(ir.VectorType.get((count,), number), numbers)
    return found
