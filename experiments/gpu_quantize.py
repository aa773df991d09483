"""What the GPU's compilers make of the quantizing Hopper kernel, on a machine without a GPU: a table.

    pip install "jaxq[gpu-aot]"
    python experiments/gpu_quantize.py [--kernels int8_vectors ...] [--shapes 16384x8192 ...] [--json]

Each kernel is compiled ahead of time for an H200 (`gpu_compiled.py`). A kind is a format, `_static` with one grid for
all rows, `_vectors` with a shift and a divisor. Columns: `tile`, channels of a chunk, rows of a warpgroup and
warpgroups of a block; `registers` at launch; `spilled`, bytes; `instructions` of the loop over rows in machine code
(SASS), for each number of its rows. Nothing here is a measured time.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from compiled_rows import show
from gpu_compiled import compiled, prepare

from jaxq.formats import Int
from jaxq.kernels.hopper_quantize import hopper_quantize, tiles
from jaxq.qtensor import Grid

KINDS = [f"{sign}8{static}_vectors" for sign in ("int", "uint") for static in ("", "_static")]


def program(kind: str, m: int, k: int) -> jax.stages.Compiled:
    name, *options = kind.split("_")
    fmt = Int(int(name[-1]), symmetric=not name.startswith("u"))
    one, vector = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1), (k,)))
    grid = Grid(one, None if fmt.symmetric else one) if "static" in options else None
    vectors = [vector, vector] if "vectors" in options else []
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    return compiled(lambda x, grid, *vectors: hopper_quantize(x, fmt, grid, *vectors), x, grid, *vectors)


def loop(sass: str) -> int:
    """The instructions of the longest loop."""
    lines = [line for line in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/|^\.L", line)]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L")}
    jumps = [(i, labels[found[1]]) for i, line in enumerate(lines) if (found := re.search(r"BRA.*`\((\.L\w+)\)", line))]
    return max(sum(not line.startswith(".L") for line in lines[to : at + 1]) for at, to in jumps if to < at)


def row(kind: str, m: int, k: int, dump: Path) -> dict:
    """One row of the table."""
    for file in dump.iterdir():
        file.unlink()
    program(kind, m, k)
    log, sass = (next(dump.glob(f"*.{ending}")).read_text() for ending in ("ptxas", "sass_ctrl"))
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spilled and registers, log
    tile = tiles(m, k)
    return {
        "kernel": kind, "rows": m, "K": k, "tile": tile, "registers": int(registers[1]),
        "spilled": int(spilled[1]) + int(spilled[2]), "instructions": round(loop(sass) * 128 / tile[1] / k, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", nargs="*", default=KINDS)
    parser.add_argument("--shapes", nargs="*", default=["16384x768", "16384x4096", "16384x8192", "16384x11008"])
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    parser.add_argument("--keep", type=Path, help="a folder for the last kernel's PTX and SASS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu_quantize_") as made:
        dump = args.keep or Path(made)
        prepare(dump)
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
        show((row(kind, m, k, dump) for kind in args.kernels for m, k in shapes), args.json)


if __name__ == "__main__":
    main()
