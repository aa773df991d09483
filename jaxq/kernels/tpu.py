"""Which machine numbers each TPU multiplies packed codes in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxq.formats import Float, Int
from jaxq.kernels.carrier import Carrier, float_carrier, int8_carrier

# The e4m3 of the matrix units, by `jax.Device.device_kind`. Where it is e4m3fn, two of them are multiplied at twice
# the rate of bfloat16; the older ones multiply bfloat16 by any float of 8 bits at the rate of bfloat16.
E4M3 = {"TPU v5 lite": jnp.float8_e4m3b11fnuz, "TPU v6 lite": jnp.float8_e4m3b11fnuz, "TPU7x": jnp.float8_e4m3fn}


def elements_dtype(device_kind: str) -> Any:
    """What holds the elements of a float activation of 4 bits, times powers of two: e4m3fn where it is multiplied.

    Raises:
        ValueError: the kernels have not been compiled for such a device.
    """
    return jnp.float8_e4m3fn if _e4m3(device_kind) == jnp.float8_e4m3fn else jnp.bfloat16


def weight_carrier(fmt: Int | Float, activations: Any, device_kind: str) -> Carrier:
    """The carrier of 4-bit weights for a product with activations of a dtype: int8, bfloat16 or `elements_dtype`.

    Raises:
        ValueError: there is none, or the kernels have not been compiled for such a device.
    """
    e4m3 = _e4m3(device_kind)
    if isinstance(fmt, Int) and jnp.dtype(activations) == jnp.int8:
        return int8_carrier(fmt)
    if isinstance(fmt, Float) and jnp.dtype(activations) == jnp.bfloat16:
        return float_carrier(fmt, jnp.float8_e5m2)
    return float_carrier(fmt, e4m3)


def _e4m3(device_kind: str) -> Any:
    if device_kind not in E4M3:
        raise ValueError(f"no kernels for {device_kind!r}: they are compiled for {', '.join(E4M3)}; use the plain path")
    return E4M3[device_kind]
