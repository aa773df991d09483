"""Times on a GPU of products with packed weights, as `execute` runs them, against those with bfloat16 weights.

    python experiments/bench_gpu.py [--shapes 4096x11008 ...] [--rows 1 16 ...] [--paths w4a16 ...] [--out FILE]

A product is of [rows, K] with [K, N], activation and result in bfloat16. Columns: `us`, what the GPU's own counters
(CUPTI) give for all kernels of a product, the launches between them not counted, median of the rounds; the weights are
there several times over, so that none of them is in the cache; `speedup`, of bfloat16's weights over it; `GB/s`, the
bytes of the weights, the activation and the result over that time; `roofline`, the share of the time that is needed at
least: those bytes at the speed of a copy, or the product at the speed of a bfloat16 product of 8192^3 (twice that for
int8), both measured once all is compiled. Then the same for activations that are quantized: bytes read and written, of
a copy's speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from compiled_paths import PATHS, linear
from compiled_rows import show
from jax.experimental.mosaic.gpu import profiler

import jaxq
from jaxq.formats import Int
from jaxq.formats.integer import narrow
from jaxq.products import read_input

CACHE = 120 << 20  # bytes of weights between two readings of the same ones
ROUNDS, THREADS, COPIES = 9, 10, 50
QUANTIZERS = {
    "int8 per tensor": jaxq.per_tensor(Int(8)),
    "int8 per token": jaxq.per_token(Int(8)),
    "uint8 per token": jaxq.per_token(Int(8, symmetric=False)),
}


def tree(path: str, k: int, n: int) -> Any:
    """A packed weight, drawn at random."""
    x, w = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate([(4, k), (k, n)]))
    weights, activations, _ = PATHS[path]
    if weights is None:
        return jaxq.Quantized({"w": w})
    return jaxq.pack(jaxq.calibrate(linear, {"w": w}, [x], jaxq.quantize(weights, activations)))


def size(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def product(trees: list, x: jax.Array) -> list[jax.Array]:
    run = jax.jit(jaxq.execute(linear))  # traced once
    return [run(tree, x) for tree in trees]


def program(path: str, rows: int, k: int, n: int) -> tuple:
    """Compiled, with how often it multiplies."""
    small = jax.eval_shape(lambda: jnp.zeros((rows, k), jnp.bfloat16))
    made = tree(path, k, n)
    count = max(2, min(8, CACHE // size(made)))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), made)
    return jax.jit(product).lower([shapes] * count, small).compile(), count, made


def kernels(run: Any, *args: Any) -> list[float]:
    """Microseconds that the GPU is busy in each round."""
    _, rounds = profiler.Cupti(finalize=False).measure(run, aggregate=True, iterations=ROUNDS)(*args)
    return [1e3 * ms for ms in rounds]


def ceilings() -> tuple[float, float]:
    """Bytes a microsecond, read and written, of a copy, and multiplications a microsecond in bfloat16."""
    a, copy = jax.random.normal(jax.random.key(0), (1 << 29,), jnp.bfloat16), jax.jit(jnp.copy)
    copy(a).block_until_ready()
    start = time.perf_counter()
    for _ in range(COPIES):  # half a millisecond each: nearly nothing between them
        copied = copy(a)
    copied.block_until_ready()
    copied = 2e-6 * COPIES * a.nbytes / (time.perf_counter() - start)
    b = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    return copied, 8192**3 / median(kernels(jax.jit(jnp.dot), b, b))


def programs(cases: list[tuple[str, int, int, int]]) -> list[tuple]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda case: program(*case), cases))


def times(cases: list[tuple[str, int, int, int]], made: list[tuple], copied: float, rate: float) -> Iterator[dict]:
    """Rows of the table; bfloat16's comes first."""
    base: dict[tuple, float] = {}
    for (path, m, k, n), (run, count, tree) in zip(cases, made):
        x = jax.random.normal(jax.random.key(2), (m, k), jnp.bfloat16)
        trees = [tree, *(jax.tree.map(jnp.copy, tree) for _ in range(count - 1))]
        us = median(kernels(run, trees, x)) / count
        base.setdefault((m, k, n), us)
        moved = size(tree) + 2 * m * (k + n)
        floor = max(moved / copied, m * k * n / rate / (2 if PATHS[path][2] == "int8" else 1))
        row = {"path": path, "rows": m, "K": k, "N": n, "us": round(us, 2), "speedup": round(base[m, k, n] / us, 2)}
        yield row | {"GB/s": round(moved / us / 1e3), "roofline": round(floor / us, 2)}


def quantized(quant: Any, x: jax.Array) -> Any:
    """As a packed product reads its activation, in 8 bits."""
    found = read_input(quant, x, (1,))
    return narrow(found.values, jnp.int8) if found.int8 is None else found.int8, found.scale, found.center


def quantizers(rows: list[int], k: int, copied: float) -> Iterator[dict]:
    for m in rows:
        x = jax.random.normal(jax.random.key(3), (m, k), jnp.bfloat16) + 0.5
        for name, activations in QUANTIZERS.items():
            w = {"w": jnp.ones((k, 8), jnp.bfloat16)}
            q = jaxq.calibrate(linear, w, [x[:4]], jaxq.quantize(None, activations))
            (quant,) = q.inputs.values()
            vector = jnp.full((k,), 1.5, jnp.float32)
            quant = jaxq.InputQuant(vector, vector, quant.grid, {}, quant.format, quant.granularity, quant.sites)
            us = median(kernels(jax.jit(quantized), quant, x))
            moved = 3 * x.size / us
            row = {"quantize": name, "rows": m, "K": k, "us": round(us, 2), "GB/s": round(moved / 1e3)}
            yield row | {"of a copy": round(moved / copied, 2)}


def noted(rows: Iterator[dict], found: list[dict]) -> Iterator[dict]:
    for row in rows:
        found.append(row)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["4096x4096", "4096x11008", "8192x28672"], help="KxN")
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16, 128, 2048])
    parser.add_argument("--paths", nargs="*", default=[path for path in PATHS if path != "bf16"], choices=list(PATHS))
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    cases = [[(path, m, k, n) for m in args.rows for path in ["bf16", *args.paths]] for k, n in shapes]
    compiled = [programs(of_shape) for of_shape in cases]
    copied, rate = ceilings()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {time.strftime('%d %B %Y')}")
    print(f"a copy {copied / 1e6:.2f} TB/s, a bfloat16 product {2 * rate / 1e6:.0f} TFLOP/s")
    found: list[dict] = []
    for of_shape, made in zip(cases, compiled):
        show(noted(times(of_shape, made, copied, rate), found), False)
    show(noted(quantizers([16, 2048, 16384], 8192, copied), found), False)
    if args.out:
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
