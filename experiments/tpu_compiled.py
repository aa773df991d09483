"""What the TPU's compiler makes of the kernels, on a machine without a TPU: a table of kernels and targets.

    pip install "jaxq[tpu-aot]"
    python experiments/tpu_compiled.py [--targets v5e v6e v7x] [--rows 16 256] [--kernels w4a8 ...] [--json]

Each kernel is compiled ahead of time, all the way to machine code, for a product of [rows, 4096] with [4096, 4096].
Columns: `temporary`, bytes in device memory beside arguments and result; `moved`, bytes of arguments and result, weights
once for each block of rows; `bundles`, instruction bundles of one grid step in the final schedule, without waiting for
memory; `floor`, the cycles that one step takes at least, for the matrix units or for reading its weights from memory,
whichever is more; `XLA`, the cycles that XLA estimates for what the kernel means in plain jnp, beside those of
the kernel (bundles times steps); `instruction`, the matrix units' instructions. Nothing here is a measured time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

DUMP = Path(tempfile.mkdtemp(prefix="tpu_compiled_"))
# Before JAX is imported: libtpu reads it once. The rest only keeps it from asking for a TPU.
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
os.environ.update({"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"})
os.environ.update({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "JAX_ENABLE_COMPILATION_CACHE": "0"})

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxq.formats import Float, Int
from jaxq.kernels.carrier import float_carrier, int8_carrier
from jaxq.kernels.packed_matmul import blocks, packed_matmul, plain_packed_matmul

K = N = 4096


@dataclass(frozen=True)
class Target:
    """One core: multiply-adds a cycle by type of the operands, bytes a cycle from device memory."""

    topology: str
    macs: dict[str, int]
    bytes_per_cycle: float


TARGETS = {
    "v5e": Target("v5e:2x2", {"int8": 131072, "bfloat16": 65536, "float8_e4m3fn": 65536}, 820 / 1.5),
    "v6e": Target("v6e:2x2", {"int8": 524288, "bfloat16": 262144, "float8_e4m3fn": 262144}, 1640 / 1.75),
    "v7x": Target("tpu7x:2x2x1", {"int8": 262144, "bfloat16": 262144, "float8_e4m3fn": 524288}, 3700 / 2.2),
}


def cases(target: str, rows: int) -> dict[str, tuple[Callable, dict]]:
    """Each kernel's options and its operands' shapes, by name."""
    e4m3 = jnp.float8_e4m3fn if target == "v7x" else jnp.float8_e4m3b11fnuz
    elements = jnp.float8_e4m3fn if target == "v7x" else jnp.bfloat16  # of LLM-FP4's activations
    weights = float_carrier(Float(2, 1), jnp.float8_e4m3fn if target == "v7x" else jnp.float8_e5m2)
    a16 = {"x": ((rows, K), jnp.bfloat16)}
    a8 = {"x": ((rows, K), jnp.int8), "rows": ((rows, 1), jnp.float32)}
    packed = {"w": ((K // 2, N), jnp.uint8), "scale": ((1, N), jnp.float32)}
    grouped = packed | {"scale": ((K // 128, N), jnp.float32)}

    def zero(groups: int, kind: type) -> dict:
        return {"left": ((1, rows, groups), kind), "right": ((1, groups, N), kind)}

    e2m1, int4 = float_carrier(Float(2, 1), jnp.float8_e5m2), float_carrier(Int(4), e4m3)
    return {
        "w4a8": (int8_carrier(Int(4)), a8 | packed),
        "w4a8_zero": (int8_carrier(Int(4, symmetric=False)), a8 | packed | zero(1, jnp.int32)),
        "w4a8_g128": (int8_carrier(Int(4)), a8 | grouped),
        "int4_a16": (int4, a16 | packed | zero(1, jnp.float32)),
        "int4_a16_g128": (int4, a16 | grouped | zero(K // 128, jnp.float32)),
        "e2m1_a16": (e2m1, a16 | packed),
        "e2m1_a16_g128": (e2m1, a16 | grouped),
        "e2m1_a4": (weights, packed | {"x": ((rows, K), elements), "rows": a8["rows"]}),
    }


def compiled(function: Callable, shapes: dict, device: jax.Device) -> jax.stages.Compiled:
    for file in DUMP.iterdir():
        file.unlink()
    on = SingleDeviceSharding(device)
    operands = {name: jax.ShapeDtypeStruct(*shape, sharding=on) for name, shape in shapes.items()}
    call = jax.jit(lambda operands: function(**operands))
    return call.trace(operands).lower(lowering_platforms=("tpu",)).compile()


def dumped(suffix: str) -> str:
    """The file of the kernel's own program with this name, before which only a number stands."""
    (file,) = (f for f in DUMP.iterdir() if re.search(rf"-jaxq_\w+\.\d+-\d+-{re.escape(suffix)}$", f.name))
    return file.read_text()


def row(target: str, name: str, rows: int) -> dict:
    spec = TARGETS[target]
    device = topologies.get_topology_desc(platform="tpu", topology_name=spec.topology).devices[0]
    carrier, shapes = cases(target, rows)[name]
    kernel = compiled(partial(packed_matmul, carrier=carrier), shapes, device)
    bundles = int(re.findall(r"total.*?(\d+)", dumped("schedule-analysis_final_bundles.txt"), re.I)[0])
    text = dumped("final_bundles.txt")
    instructions = Counter(re.findall(r"(vmatmul[\w.]*|vmatpush[\w.]*|vmatprep[\w.]*)", text))
    xla = compiled(partial(plain_packed_matmul, carrier=carrier), shapes, device)
    kind = jnp.dtype(shapes["x"][1])
    bm, bn = blocks(rows, K, N, kind.itemsize, shapes["w"][0][0])
    step = shapes["w"][0][0] * bn
    memory = kernel.memory_analysis()
    return {
        "target": target, "kernel": name, "rows": rows, "block": (bm, K, bn),
        "temporary": memory.temp_size_in_bytes, "weights": shapes["w"][0][0] * N,
        "moved": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "bundles": bundles,
        "floor": round(max(bm * K * bn / spec.macs[kind.name], step / spec.bytes_per_cycle)),
        "cycles": bundles * -(-rows // bm) * -(-N // bn),
        "xla": sum(map(int, re.findall(r'estimated_cycles":"(\d+)', xla.as_text()))),
        "xla_temporary": xla.memory_analysis().temp_size_in_bytes,
        "instructions": dict(instructions),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--rows", nargs="*", type=int, default=[16, 256])
    parser.add_argument("--kernels", nargs="*", default=list(cases("v6e", 1)))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for target in args.targets:
        for name in args.kernels:
            for rows in args.rows:
                print(json.dumps(row(target, name, rows)), flush=True)


if __name__ == "__main__":
    main()
