"""What the TPU's compiler makes of the kernels, on a machine without a TPU: a table of kernels and targets.

    pip install "jaxq[tpu-aot]"
    python experiments/tpu_compiled.py [--targets v5e v6e v7x] [--rows 16 256] [--kernels w4a8 ...] [--plain] [--json]

Each kernel is compiled ahead of time, all the way to machine code, for a product of [rows, 4096] with [4096, 4096].
Columns: `temporary`, bytes of device memory beside arguments and result; `moved`, bytes of arguments and result;
`bundles`, instruction bundles of one grid step in the final schedule, which waits neither for memory nor for a matrix
unit; `floor`, the cycles that one step takes at least, in the matrix units or to read its weights from memory,
whichever is more; `cycles`, the greater of the two times the steps;
`plain`, with --plain, the cycles that XLA estimates for what the kernel means in plain jnp, and the temporary bytes of
that. Nothing here is a measured time.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from compiled_rows import show
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxq.formats import Float, Int
from jaxq.kernels.decoded_matmul import Scaled, decoded_matmul, plain_decoded_matmul
from jaxq.kernels.layout import HALF
from jaxq.kernels.packed_matmul import X_BYTES, Operands, packed_matmul, plain_packed_matmul
from jaxq.kernels.plain import MACHINE_FLOATS
from jaxq.kernels.tiles import SMALLEST_GROUP, whole_depth
from jaxq.kernels.tpu import STACKED_ROWS, elements_dtype, weight_carrier

K = N = 4096


@dataclass(frozen=True)
class Target:
    """One core: multiply-adds a cycle by type of the activations, bytes a cycle from device memory.

    From the published peak rates at clocks of 1.5, 1.75 and 2.2 GHz; int8 has no rate of its own on v7x.
    """

    topology: str
    kind: str
    macs: dict[str, int]
    bytes_per_cycle: float


TARGETS = {
    "v5e": Target("v5e:2x2", "TPU v5 lite", {"int8": 131072, "bfloat16": 65536}, 820 / 1.5),
    "v6e": Target("v6e:2x2", "TPU v6 lite", {"int8": 524288, "bfloat16": 262144}, 1640 / 1.75),
    "v7x": Target("tpu7x:2x2x1", "TPU7x", {"int8": 262144, "bfloat16": 262144, "float8_e4m3fn": 524288}, 3700 / 2.2),
}
Shapes = dict[str, tuple[tuple[int, ...], type]]


@dataclass(frozen=True)
class Case:
    kernel: Callable
    plain: Callable
    shapes: Shapes


def product(target: Target, rows: int, fmt: Int | Float, dtype: type, groups: int = 1, zero: bool = False) -> Case:
    """A packed product; `zero` is a correction for a zero point or the carrier's offset."""
    carrier = weight_carrier(fmt, dtype, target.kind)
    stored = ((K // 2, N), jnp.uint8) if fmt.bits == 4 else ((K, N), MACHINE_FLOATS.get(fmt, jnp.int8))
    shapes: Shapes = {"x": ((rows, K), dtype), "w": stored, "scale": ((groups, N), jnp.float32)}
    if dtype != jnp.bfloat16:
        shapes["rows"] = ((rows, 1), jnp.float32)
    if zero:
        kind = jnp.int32 if dtype == jnp.int8 else jnp.float32
        shapes |= {"left": ((1, rows, groups), kind), "right": ((1, groups, N), kind)}

    def of(function: Callable) -> Callable:
        return lambda **arrays: function(Operands(**arrays), carrier)

    return Case(of(packed_matmul), of(plain_packed_matmul), shapes)


def decoded(target: Target, rows: int, fmt: Int | Float, size: int) -> Case:
    """A product with weights in groups of `size` channels, integers with zero points, that are decoded."""
    case = product(target, rows, fmt, jnp.bfloat16, K // size)
    center = {"center": case.shapes["scale"]} if isinstance(fmt, Int) else {}
    carrier = weight_carrier(fmt, jnp.bfloat16, target.kind)

    def of(function: Callable) -> Callable:
        return lambda **arrays: function(Scaled(**arrays), carrier)

    return Case(of(decoded_matmul), of(plain_decoded_matmul), case.shapes | center)


def cases(t: Target, rows: int) -> dict[str, Case]:
    a16, e2m1, e4m3 = jnp.bfloat16, Float(2, 1), Float(4, 3, reserved=1)
    small = {
        "w4a8_g32": product(t, rows, Int(4), jnp.int8, K // 32),
        "e2m1_a16_g32": product(t, rows, e2m1, a16, K // 32),
        "e2m1_a16_g16": product(t, rows, e2m1, a16, K // 16),
        "w8a8_g32": product(t, rows, Int(8), jnp.int8, K // 32),
        "fp8_a16_g32": product(t, rows, e4m3, a16, K // 32),
    }
    return (small if rows * HALF // SMALLEST_GROUP <= STACKED_ROWS else {}) | {
        "w4a8": product(t, rows, Int(4), jnp.int8),
        "w4a8_zero": product(t, rows, Int(4, symmetric=False), jnp.int8, zero=True),
        "w4a8_g128": product(t, rows, Int(4), jnp.int8, K // 128),
        "int4_a16": product(t, rows, Int(4), a16, zero=True),
        "int4_a16_g128": product(t, rows, Int(4), a16, K // 128, zero=True),
        "e2m1_a16": product(t, rows, e2m1, a16),
        "e1m2_a16": product(t, rows, Float(1, 2), a16),
        "e3m0_a16": product(t, rows, Float(3, 0), a16),
        "e2m1_a16_g128": product(t, rows, e2m1, a16, K // 128),
        "e2m1_a4": product(t, rows, e2m1, elements_dtype(t.kind)),
        "w8a8": product(t, rows, Int(8), jnp.int8),
        "w8a8_zero": product(t, rows, Int(8, symmetric=False), jnp.int8, zero=True),
        "w8a8_g128": product(t, rows, Int(8), jnp.int8, K // 128),
        "w8a16": product(t, rows, Int(8), a16),
        "fp8_a16": product(t, rows, e4m3, a16),
        "fp8_a8": product(t, rows, e4m3, elements_dtype(t.kind)),
        "decoded_int4_g128": decoded(t, rows, Int(4), 128),
        "decoded_e2m1_g32": decoded(t, rows, e2m1, 32),
        "decoded_w8_g32": decoded(t, rows, Int(8), 32),
        "decoded_fp8_g32": decoded(t, rows, e4m3, 32),
    }


def compiled(function: Callable, shapes: Shapes, device: jax.Device) -> jax.stages.Compiled:
    on = SingleDeviceSharding(device)
    operands = {name: jax.ShapeDtypeStruct(*shape, sharding=on) for name, shape in shapes.items()}
    call = jax.jit(lambda operands: function(**operands))
    return call.trace(operands).lower(lowering_platforms=("tpu",)).compile()


def dumped(dump: Path, name: str) -> str:
    """A file of the kernel's own program."""
    (file,) = (f for f in dump.iterdir() if re.search(rf"-jaxq_\w+\.\d+-\d+-{re.escape(name)}$", f.name))
    return file.read_text()


def scheduled(analysis: str) -> int:
    """The instruction bundles of a final schedule."""
    return int(re.findall(r"total.*?(\d+)", analysis, re.IGNORECASE)[0])


def step_of(case: Case, target: Target) -> tuple[int, float]:
    """How many steps the grid has, and the cycles that one takes at least."""
    (rows, k), kind = case.shapes["x"][0], jnp.dtype(case.shapes["x"][1])
    bm, _, bn = whole_depth(rows, k, N, X_BYTES // kind.itemsize)
    least = max(bm * k * bn / target.macs[kind.name], case.shapes["w"][0][0] * bn / target.bytes_per_cycle)
    return -(-rows // bm) * -(-N // bn), least


def row(name: str, target: str, rows: int, dump: Path, plain: bool) -> dict:
    """One row of the table."""
    spec = TARGETS[target]
    device = topologies.get_topology_desc(platform="tpu", topology_name=spec.topology).devices[0]
    case = cases(spec, rows)[name]
    for file in dump.iterdir():
        file.unlink()
    kernel = compiled(case.kernel, case.shapes, device)
    schedule, program = (dumped(dump, f"{kind}final_bundles.txt") for kind in ("schedule-analysis_", ""))
    bundles = scheduled(schedule)
    instructions = Counter(re.findall(r"vmatmul[\w.]*|vmatpush[\w.]*", program))
    memory = kernel.memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    steps, least = step_of(case, spec)
    result = {
        "kernel": name, "target": target, "rows": rows, "temporary": memory.temp_size_in_bytes,
        "moved": moved, "steps": steps, "bundles": bundles,
        "floor": round(least), "cycles": round(max(bundles, least)) * steps, "instructions": _by_type(instructions),
    }  # fmt: skip
    if plain:
        xla = compiled(case.plain, case.shapes, device)
        result["plain"] = sum(map(int, re.findall(r'estimated_cycles":"(\d+)', xla.as_text())))
        result["plain_temporary"] = xla.memory_analysis().temp_size_in_bytes
    return result


def _by_type(instructions: Counter) -> dict[str, int]:
    """`vmatpush1.bf8.bf16.msra.mxu0` and the like counted as `vmatpush.bf8.bf16`."""
    counts: Counter = Counter()
    for name, count in instructions.items():
        types = re.findall(r"\.((?:s|bf|f)\d\w*)", name)
        counts[".".join([name[: 7 if name.startswith("vmatmul") else 8], *types])] += count
    return dict(counts)


def prepare(dump: Path) -> None:
    """Before libtpu is loaded, which is when it reads its options; the rest keeps it from asking for a TPU."""
    dumps = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    os.environ.update({"LIBTPU_INIT_ARGS": dumps, "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_SKIP_MDS_QUERY": "1"})
    os.environ.update({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there leaves no dump


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--rows", nargs="*", type=int, default=[16, 256])
    parser.add_argument("--kernels", nargs="*", default=list(cases(TARGETS["v6e"], 1)))
    parser.add_argument("--plain", action="store_true", help="compile the plain meaning, too (slow)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tpu_compiled_") as dump:
        prepare(Path(dump))
        rows = (
            row(name, target, count, Path(dump), args.plain)
            for target in args.targets
            for name in args.kernels
            for count in args.rows
            if name in cases(TARGETS[target], count)
        )
        show(rows, args.json)


if __name__ == "__main__":
    main()
