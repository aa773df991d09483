"""What the GPU's compilers make of the Hopper kernel for many rows, on a machine without a GPU: see `gpu_compiled.py`.

    python experiments/gpu_compiled_many.py [--rows 64 2048] [--kernels int4 int8_int4 ...] [--shapes 4096x4096 ...]

Columns that are not there or mean something else: `kernel`, the weight's format, with int8_ before it where
activations are int8; `tile`, slices of 64 columns of a warpgroup, rows of a block and parts that K is cut into;
`depth`, of a step, in rows of packed bytes; `wgmma`, matrix instructions of one step in PTX, and `gmma` in machine
code; `serialized`, whether ptxas warns that it waits for each of them; `registers`, the most that a thread uses;
`spilled`, instructions of a step that keep them in memory; `overwritten`, those that write registers of a product under
way; `alu`, the expanding instructions of a step for each code that a thread expands. Nothing here is a measured time.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from compiled_rows import show
from gpu_compiled import FORMATS, KERNELS, compiled, prepare
from sass import multiplying_loop, overwritten

from jaxq.kernels import hopper_tiles
from jaxq.kernels.gpu import in_int8
from jaxq.kernels.hopper_many import hopper_many
from jaxq.kernels.hopper_tiles import Groups, shape_of
from jaxq.kernels.hopper_weights import weights

NAMES = [*KERNELS, *(f"int8_{name}" for name, fmt in FORMATS.items() if in_int8(fmt))]


def row(name: str, rows: int, k: int, n: int, dump: Path, vectors: bool) -> dict:
    """One row of the table; `vectors` are those of the rows, and zero points of both sides."""
    of, dtype = (name, jnp.bfloat16) if name in KERNELS else (name.removeprefix("int8_"), jnp.int8)
    fmt, size, scales = KERNELS[of]
    dtype, each = jnp.dtype(dtype), (k // (size or k), n)
    shapes = {"x": ((rows, k), dtype), "w": ((k * fmt.bits // 8, n), jnp.uint8)}
    shapes["scale"] = each, jnp.float32 if scales == "real" else jnp.uint8
    if not fmt.symmetric and dtype == jnp.bfloat16:
        shapes["zero"] = each, jnp.uint8
    if vectors:
        shapes |= {"row": ((rows,), jnp.float32), "left": ((2, rows), jnp.float32), "right": ((2, n), jnp.float32)}
    given = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    for file in dump.iterdir():
        file.unlink()

    product: Any = partial(hopper_many, fmt=fmt, scales=scales, dtype=jnp.bfloat16)
    memory = compiled(product, **given).memory_analysis()
    ptx, log, sass = (next(dump.glob(f"*.{kind}")).read_text() for kind in ("ptx", "ptxas", "sass_ctrl"))
    groups = Groups(
        k // each[0], scales, sum(given[a].dtype.itemsize for a in ("scale", "zero") if size and a in given)
    )
    shape, loop = shape_of(rows, k, n, fmt.bits, dtype, weights(fmt, dtype), groups), multiplying_loop(sass)
    codes = shape.depth * shape.columns * shape.codes // 128  # that a thread expands
    expanding = sum(bool(re.match(r"(?:LOP3|SHF|PRMT|IMAD|HMUL2|HFMA2)\b", text)) for text in loop)
    return {
        "kernel": name, "rows": rows, "K": k, "N": n,
        "tile": (shape.slices, shape.rows, shape.splits), "depth": shape.depth,
        "temporary": memory.temp_size_in_bytes, "weight": 2 * k * n,
        "wgmma": ptx.count("wgmma.mma_async"), "gmma": len(re.findall(r"\s[HI]GMMA\.", sass)),
        "registers": 1 + max(map(int, re.findall(r"\bR(\d+)\b", sass))),
        "spilled": sum(bool(re.match(r"(?:LDL|STL)\b", text)) for text in loop), "serialized": "serialized" in log,
        "overwritten": len(overwritten(loop)), "alu": round(expanding / codes, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", type=int, default=[64, 2048])
    parser.add_argument("--kernels", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--shapes", nargs="*", default=["4096x4096"], help="KxN")
    parser.add_argument("--tile", nargs=3, type=int, help="other than the kernel's own choice")
    parser.add_argument("--vectors", action="store_true", help="with scales of rows and zero points of both sides")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    parser.add_argument("--keep", type=Path, help="a folder for the last kernel's PTX and SASS")
    args = parser.parse_args()
    if args.tile:
        hopper_tiles.tiles = lambda *_: tuple(args.tile)
    with tempfile.TemporaryDirectory(prefix="gpu_compiled_") as made:
        dump = args.keep or Path(made)
        prepare(dump)
        found = (
            row(name, rows, int(k), int(n), dump, args.vectors)
            for name in args.kernels
            for k, n in (shape.split("x") for shape in args.shapes)
            for rows in args.rows
        )
        show(found, args.json)


if __name__ == "__main__":
    main()
