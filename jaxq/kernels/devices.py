"""Which device a program is traced for, as far as kernels go."""

import jax


def device_kind(*operands: jax.Array) -> str | None:
    """The kind of device that a program is traced for, if a kernel can have these operands there.

    XLA partitions no kernels: arrays on a mesh of several devices are theirs only inside `shard_map`.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in operands)]
    if any(mesh.shape[name] > 1 for mesh in meshes for name in {*mesh.axis_names} - {*mesh.manual_axes}):
        return None
    device = getattr(meshes[0], "abstract_device", None) or jax.devices()[0]
    return device.device_kind
