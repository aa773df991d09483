"""Which device a program is traced for."""

from __future__ import annotations

from typing import Any

import jax


def traced_for() -> Any:
    """The device, or what describes one: the abstract device of the mesh in scope, else the default device."""
    config: Any = jax.config
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or config.jax_default_device
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device or jax.devices()[0]


def on_gpu() -> bool:
    """Whether it is a GPU."""
    return traced_for().platform in ("gpu", "cuda", "rocm")


def on_accelerator() -> bool:
    """Whether it is a GPU or a TPU."""
    return traced_for().platform != "cpu"


def device_kind(*operands: jax.Array) -> str | None:
    """Its kind, if a kernel can have these operands there.

    XLA partitions no kernels: arrays on a mesh of several devices are theirs only inside `shard_map`.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in operands)]
    if any(mesh.shape[name] > 1 for mesh in meshes for name in {*mesh.axis_names} - {*mesh.manual_axes}):
        return None
    return traced_for().device_kind
