"""What the GPU's compilers make of the quotients that become codes, on a machine without a GPU: a table.

    pip install "jaxq[gpu-aot]"
    python experiments/gpu_quotients.py [--json]

Codes and fake-quantized values of a bfloat16 matrix are compiled ahead of time for an H200. Columns, of the program
that makes them, in PTX instructions: `divisions` and `fused`, multiply-adds, of which there should be none; `all`,
`products` and `sums`, for each number. Nothing here is a measured time.
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
from gpu_compiled import h200
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

from jaxq.formats import AnyFloat, Float, Int, encode, fake_quant

M, K = 512, 1024
FORMATS: dict[str, Any] = {"int8": Int(8), "e2m1": Float(2, 1), "any4": AnyFloat(4)}
FUNCTIONS = {"encode": encode, "fake_quant": fake_quant}
SCALES = {"tensor": (1, 1), "token": (M, 1), "channel": (1, K), "constant": None}


def row(function: str, name: str, scales: str, dump: Path) -> dict:
    """One row of the table."""
    for file in dump.iterdir():
        file.unlink()
    on = SingleDeviceSharding(h200())
    shapes = [((M, K), jnp.bfloat16), *([(SCALES[scales], jnp.float32)] if SCALES[scales] else [])]
    given = [jax.ShapeDtypeStruct(*shape, sharding=on) for shape in shapes]
    made = partial(FUNCTIONS[function], FORMATS[name])
    device = AbstractDevice("NVIDIA H200", None, "gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("d",), (AxisType.Auto,), abstract_device=device)):
        traced = jax.jit(lambda x, s=None: made(x, jnp.full((1, 1), 0.3) if s is None else s)).trace(*given)
        traced.lower(lowering_platforms=("cuda",)).compile()
    programs = [re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]+)\s", f.read_text(), re.M) for f in dump.glob("*.ptx")]
    ptx = max(programs, key=len)
    numbers = ptx.count("cvt.f32.bf16")

    def count(*kinds: str) -> int:
        return sum(op.startswith(kinds) for op in ptx)

    return {
        "function": function, "format": name, "scales": scales, "divisions": count("div."), "fused": count("fma."),
        "all": round(len(ptx) / numbers, 1), "products": count("mul.rn.f32", "mul.f32") / numbers,
        "sums": count("add.rn.f32", "sub.rn.f32", "add.f32", "sub.f32") / numbers,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu_quotients_") as dump:
        flags = f" --xla_gpu_autotune_level=0 --xla_dump_to={dump} --xla_dump_emitter_re=.* --xla_dump_hlo_as_text"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
        rows = (row(f, name, s, Path(dump)) for f in FUNCTIONS for name in FORMATS for s in SCALES)
        show(rows, args.json)


if __name__ == "__main__":
    main()
