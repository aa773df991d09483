"""What the GPU's compilers make of the Hopper kernel, on a machine without a GPU: a table of formats and shapes.

    pip install "jaxq[gpu-aot]"
    python experiments/gpu_compiled.py [--rows 1 16] [--kernels e2m1 ...] [--shapes 4096x4096 ...] [--plain] [--json]

Each kernel is compiled ahead of time for an H200, all the way to machine code, for a product of [rows, K] with [K, N].
Columns: `tile`, rows of a block and parts that K is cut into, by the blocks of a cluster;
`temporary`, bytes of device memory beside arguments and result (x padded); `weight`, bytes of the weight in bfloat16,
for comparison; `mma`, matrix instructions of one step in PTX, and `hmma` in machine code (SASS); `registers` at launch;
`spilled`, bytes; `alu`, machine instructions of the kinds that expand codes (LOP3, SHF, PRMT, IMAD, HMUL2, HFMA2), all
of the program's, for each code that a thread expands in a step; `plain`, with --plain, the temporary bytes of what XLA
makes of the plain meaning. Nothing here is a measured time.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from compiled_rows import show
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

from jaxq.formats import Float, Int
from jaxq.formats.scales import Scales
from jaxq.kernels.hopper_matmul import hopper_matmul, plain_hopper_matmul, tiles

H200 = """gpu_device_info {
    name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
    cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
    shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
    memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
    device_address_bits: 64 driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
"""
FORMATS: dict[str, Int | Float] = {
    "int4": Int(4), "uint4": Int(4, symmetric=False), "e2m1": Float(2, 1), "e1m2": Float(1, 2), "e3m0": Float(3, 0),
    "int8": Int(8), "e4m3": Float(4, 3, reserved=1),
}  # fmt: skip
# Formats, channels of a group, or 0 for per channel, and how its scales are stored; zero points are bytes.
KERNELS: dict[str, tuple[Int | Float, int, Scales]] = {
    **{name: (fmt, 0, "real") for name, fmt in FORMATS.items()},
    **{f"{name}_g128": (fmt, 128, "real") for name, fmt in FORMATS.items()},
    "mxfp4": (Float(2, 1), 32, "power_of_two"), "nvfp4": (Float(2, 1), 16, "e4m3"),
}  # fmt: skip


UNTUNED = {"xla_gpu_autotune_level": 0}  # there is nothing to try programs out on


def h200() -> jax.Device:
    """A described H200, to compile for.

    Raises:
        RuntimeError: JAX's CUDA plugin is not installed.
    """
    return topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices[0]


def compiled(function: Any, *given: Any, **named: Any) -> jax.stages.Compiled:
    """A function of arrays of these shapes (trees of `jax.ShapeDtypeStruct`), for an H200."""
    on = SingleDeviceSharding(h200())
    given, named = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), (given, named))
    device = AbstractDevice("NVIDIA H200", None, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Explicit,), abstract_device=device)):
        return jax.jit(function).trace(*given, **named).lower(lowering_platforms=("cuda",)).compile(UNTUNED)


def row(name: str, rows: int, k: int, n: int, dump: Path, plain: bool) -> dict:
    """One row of the table."""
    fmt, size, scales = KERNELS[name]
    groups, depth = k // (size or k), k * fmt.bits // 8
    for file in dump.iterdir():
        file.unlink()

    def product(x: jax.Array, w: jax.Array, scale: jax.Array, zero: jax.Array | None = None) -> jax.Array:
        return hopper_matmul(x, w, scale, fmt, zero=zero, scales=scales, dtype=jnp.bfloat16)

    x, w, byte = ((rows, k), jnp.bfloat16), ((depth, n), jnp.uint8), ((groups, n), jnp.uint8)
    scale = byte[0], jnp.float32 if scales == "real" else jnp.uint8
    given = [jax.ShapeDtypeStruct(*shape) for shape in (x, w, scale, *[byte] * (not fmt.symmetric))]
    memory = compiled(product, *given).memory_analysis()
    ptx, log, sass = (next(dump.glob(f"*.{kind}")).read_text() for kind in ("ptx", "ptxas", "sass_ctrl"))
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spilled and registers, log
    expanding = len(re.findall(r"\s(?:LOP3|SHF|PRMT|IMAD|HMUL2|HFMA2)\b", sass))
    result = {
        "kernel": name, "rows": rows, "K": k, "N": n, "tile": tiles(rows, depth, n),
        "temporary": memory.temp_size_in_bytes, "weight": 2 * k * n, "mma": ptx.count("mma.sync"),
        "hmma": len(re.findall(r"\sHMMA\.", sass)), "registers": int(registers[1]),
        "spilled": int(spilled[1]) + int(spilled[2]),
        "alu": round(expanding * fmt.bits / 1024, 2),
    }  # fmt: skip
    if plain:
        meaning = compiled(partial(plain_hopper_matmul, fmt=fmt, scales=scales), *given[:3])
        result["plain"] = meaning.memory_analysis().temp_size_in_bytes
    return result


def prepare(dump: Path) -> None:
    """Before JAX makes its first backend: no GPU is looked for, none is tried out, and Mosaic GPU leaves its files."""
    kinds = dict.fromkeys(("PTX", "PTXAS", "SASS", "SASS_CTRL"), "1")
    os.environ.update({f"MOSAIC_GPU_DUMP_{kind}": on for kind, on in kinds.items()} | {"MOSAIC_GPU_DUMP_TO": str(dump)})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there leaves no files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16, 256, 4096])
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--shapes", nargs="*", default=["4096x4096"], help="KxN")
    parser.add_argument("--plain", action="store_true", help="compile the plain meaning, too")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    parser.add_argument("--keep", type=Path, help="a folder for the last kernel's PTX and SASS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu_compiled_") as made:
        dump = args.keep or Path(made)
        prepare(dump)
        found = (
            row(name, rows, *map(int, shape.split("x")), dump, args.plain)
            for name in args.kernels
            for shape in args.shapes
            for rows in args.rows
        )
        show(found, args.json)


if __name__ == "__main__":
    main()
