"""What compilers make of `execute` on packed weights, without the device: every pair of formats, on TPUs and an H200.

    pip install "jaxq[tpu-aot]"    # for the H200: jaxq[gpu-aot]
    python experiments/compiled_paths.py [--targets v5e v6e v7x h200] [--rows 16 256] [--paths w8a8 ...] [--xla]

`execute` runs a product of [rows, 4096] with [4096, 4096], the activation and the result in bfloat16, compiled ahead of
time; with --xla without kernels. Columns: `by`, Pallas (`jaxq.kernels.packed_matmul` or `decoded_matmul`) or XLA;
`temporary`, bytes of device memory beside arguments and result; `moved`, bytes that the program's operations read from
device memory and write to it, a buffer that the compiler keeps on the chip not counted; `bytes`, `moved` over the bytes
of arguments and result, which is the floor; `bundles`, of a TPU, the instruction bundles that all operations run
through in their final schedules, which wait neither for memory nor for a matrix unit (the compiler's own estimates of
cycles are up to twice as many); `floor`, the cycles that the matrix units or the memory take at least, whichever is
more. Nothing here is a measured time.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from compiled_rows import show
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh
from tpu_compiled import TARGETS, Target, scheduled
from tpu_compiled import prepare as prepare_tpu

import jaxq
from jaxq.formats import Float, Int
from jaxq.kernels.packed_matmul import X_BYTES
from jaxq.kernels.plain import Products
from jaxq.kernels.tiles import whole_depth

K = N = 4096
KERNELS = "jaxq_packed_matmul", "jaxq_decoded_matmul"
UINT4, E2M1, E4M3 = Int(4, symmetric=False), Float(2, 1), Float(4, 3, reserved=1)
PATHS = {  # weights, activations, the type of the fastest matrix units that hold both exactly
    "bf16": (None, None, "bfloat16"),
    "w8a8": (Int(8), Int(8), "int8"),
    "w8a8_zero": (Int(8, symmetric=False), Int(8, symmetric=False), "int8"),
    "w8a8_token": (Int(8), jaxq.per_token(Int(8)), "int8"),
    "w4a8": (Int(4), Int(8), "int8"),
    "w4a8_token": (Int(4), jaxq.per_token(Int(8)), "int8"),
    "w4a8_zero": (UINT4, Int(8, symmetric=False), "int8"),
    "w4a8_g128": (jaxq.per_group(Int(4), 128), jaxq.per_token(Int(8)), "int8"),
    "w4a8_g128_zero": (jaxq.per_group(UINT4, 128), Int(8, symmetric=False), "int8"),
    "w8a16": (Int(8), None, "bfloat16"),
    "w4a16": (Int(4), None, "bfloat16"),
    "w4a16_g128": (jaxq.per_group(UINT4, 128), None, "bfloat16"),
    "fp4a4": (E2M1, E2M1, "float8_e4m3fn"),
    "fp4a16": (E2M1, None, "bfloat16"),
    "fp4a16_g128": (jaxq.per_group(E2M1, 128), None, "bfloat16"),
    "fp8a8": (E4M3, E4M3, "float8_e4m3fn"),
    "fp8a16": (E4M3, None, "bfloat16"),
    "w4a16_g32": (jaxq.per_group(UINT4, 32), None, "bfloat16"),
    "w4a8_g32": (jaxq.per_group(Int(4), 32), jaxq.per_token(Int(8)), "int8"),
    "mxfp4a16": (jaxq.mxfp4(), None, "bfloat16"),
    "nvfp4a16": (jaxq.nvfp4(), None, "bfloat16"),
    "mxfp8a16": (jaxq.mxfp8(), None, "bfloat16"),
    "w8a16_g32": (jaxq.per_group(Int(8), 32), None, "bfloat16"),
    "w8a8_g32": (jaxq.per_group(Int(8), 32), jaxq.per_token(Int(8)), "int8"),
}  # fmt: skip
# 132 multiprocessors at 1.83 GHz, 4.8 TB/s. FP8 is multiplied in bfloat16: the tensor cores' sums of FP8 are not exact.
H200 = Target("h200", "NVIDIA H200", {"int8": 132 * 4096, "bfloat16": 132 * 2048}, 4800 / 1.83)
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")  # type, sizes, layout
SIZES = {"pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def linear(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def packed(path: str) -> jaxq.Quantized:
    draw = np.random.default_rng(0)
    x, w = (jnp.asarray(draw.standard_normal(shape, np.float32), jnp.bfloat16) for shape in ((4, K), (K, N)))
    weights, activations, _ = PATHS[path]
    if weights is None:
        return jaxq.Quantized({"w": w})
    return jaxq.pack(jaxq.calibrate(linear, {"w": w}, [x], jaxq.quantize(weights, activations)))


def compiled(tree: jaxq.Quantized, rows: int, device: jax.Device, products: Products) -> jax.stages.Compiled:
    on = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((rows, K), jnp.bfloat16, sharding=on)
    tree = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), tree)
    platform = "tpu" if device.platform == "tpu" else "cuda"
    kind = AbstractDevice(device.device_kind, None, "tpu" if platform == "tpu" else "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=kind)):
        traced = jax.jit(jaxq.execute(linear, products)).trace(tree, x)
        return traced.lower(lowering_platforms=(platform,)).compile(
            {"xla_gpu_autotune_level": 0} if kind.platform == "gpu" else None
        )


def moved(program: str) -> int:
    """Bytes read and written by the operations of the main computation; `S(1)` marks what stays on the chip."""
    lines = program[program.index("\nENTRY") :].splitlines()[2:]
    found = (re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(?:, |$)", line) for line in lines)
    operations = [op.groups() for op in found if op]
    shapes = {name: shape for name, shape, *_ in operations}
    total = 0
    for _, shape, kind, operands in operations:
        if kind in ("parameter", "bitcast", "tuple", "get-tuple-element", "constant") or kind.endswith("-done"):
            continue
        if kind == "slice-start":  # ((from), to, ...)
            total += in_memory(shape.split("), ")[1].split("}")[0] + "}") + sum(map(size_of, SHAPE.findall(shape)[1:2]))
            continue
        if kind.endswith("-start"):  # (to, from, ...)
            total += in_memory(shape.split("}")[0] + "}") + sum(map(in_memory, [shapes[operands.split(",")[0]]]))
            continue
        total += in_memory(shape) + sum(in_memory(shapes[name]) for name in re.findall(r"%[\w.-]+", operands))
    return total


def bundles(program: str, dump: Path, rows: int) -> int:
    """Of the schedules that a TPU's compiler has left in a folder, each as often as its operation's loop goes round."""
    total = 0
    for file in dump.glob("*-schedule-analysis_final_bundles.txt"):
        name = re.sub(r"^\d+-|-\d+-schedule-analysis_final_bundles.txt$", "", file.name)
        operation = re.search(rf"%{re.escape(name)} = .*", program)
        if operation is None:  # what starts and ends the program
            continue
        bounds = re.search(r'iteration_bounds":\[(.*?)\]', operation[0])
        rounds = prod(int(n) for n in re.findall(r"\d+", bounds[1])) if bounds else 1
        if any(kernel in name for kernel in KERNELS):
            x = re.search(rf"(\w+)\[{rows},{K}\]", operands_of(operation[0], program))
            assert x is not None
            bm, _, bn = whole_depth(rows, K, N, X_BYTES // int(bytes_of(x[1])))
            rounds = -(-rows // bm) * -(-N // bn)
        total += scheduled(file.read_text()) * rounds
    return total


def operands_of(operation: str, program: str) -> str:
    """The shapes of an operation's operands."""
    names = re.findall(r"%[\w.-]+", operation.split("custom-call(")[1].split(")")[0])
    return " ".join(found[1] for name in names if (found := re.search(rf"{re.escape(name)} = (\S+)", program)))


def in_memory(shape: str) -> int:
    """Bytes of a shape, or of a tuple of them, that are in device memory."""
    return sum(size_of(found) for found in SHAPE.findall(shape) if "S(" not in found[2])


def size_of(shape: tuple[str, str, str]) -> int:
    """Bytes of what `SHAPE` finds."""
    kind, sizes, _ = shape
    return int(bytes_of(kind) * prod(int(n) for n in sizes.split(",") if n))


def bytes_of(kind: str) -> float:
    return SIZES.get(kind, 1)  # the others are floats of 8 bits


def device_of(spec: Target) -> jax.Device:
    if spec is H200:
        from gpu_compiled import h200  # which needs a jaxlib with Mosaic GPU

        return h200()
    return topologies.get_topology_desc(platform="tpu", topology_name=spec.topology).devices[0]


def row(path: str, tree: jaxq.Quantized, target: str, rows: int, dump: Path, products: Products) -> dict:
    """One row of the table."""
    spec = H200 if target == "h200" else TARGETS[target]
    for file in dump.iterdir():
        file.unlink()
    program = compiled(tree, rows, device_of(spec), products)
    text, memory = program.as_text(), program.memory_analysis()
    least = sum(a.nbytes for a in jax.tree.leaves(tree)) + rows * (K + N) * 2
    rate = spec.macs.get(PATHS[path][2], spec.macs["bfloat16"])
    by_kernel = any(kernel in text for kernel in KERNELS)
    return {
        "path": path, "target": target, "rows": rows, "by": "Pallas" if by_kernel else "XLA",
        "temporary": memory.temp_size_in_bytes, "moved": moved(text), "bytes": round(moved(text) / least, 2),
        "bundles": 0 if spec is H200 else bundles(text, dump, rows),
        "floor": round(max(rows * K * N / rate, least / spec.bytes_per_cycle)),
    }  # fmt: skip


def prepare(targets: list[str], dump: Path) -> None:
    if "h200" in targets:
        from gpu_compiled import prepare as prepare_gpu

        prepare_gpu(dump)
    if set(targets) & set(TARGETS):
        prepare_tpu(dump)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=[*TARGETS, "h200"])
    parser.add_argument("--rows", nargs="*", type=int, default=[16, 256])
    parser.add_argument("--paths", nargs="*", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--xla", action="store_true", help="without kernels")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tpu_paths_") as dump:
        prepare(args.targets, Path(dump))
        trees = {path: packed(path) for path in args.paths}
        rows = (
            row(path, tree, target, count, Path(dump), "xla" if args.xla else "int8")
            for path, tree in trees.items()
            for target in args.targets
            for count in args.rows
        )
        show(rows, args.json)


if __name__ == "__main__":
    main()
