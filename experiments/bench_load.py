"""What loading costs: memory and time of a checkpoint of 1 GB, and the time of `import jaxq`.

    python experiments/bench_load.py [--gigabytes 1] [--repeats 5]

A random LLaMA in shards in a temporary folder, as float32 and as bfloat16, loaded without a `dtype`, and bfloat16 with
one, too: float32 converts all of it, to twice the files. Each run is a process of its own and starts with the files
dropped from the page cache: one only reads their bytes, the others load and then touch every page of the parameters.
Peak memory is the kernel's count for the process (mapped pages of the files included) less what it was after the
imports.
Runs of what is compared alternate; medians. Loading has a part of about 17 ms a layer that does not depend on its size:
Flax makes the model's layout.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

CONFIG = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 4096, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
LAYER = 4 * 1024**2 + 3 * 1024 * 4096  # its parameters, nearly


def write(folder: Path, gigabytes: float, dtype: str) -> None:
    import jax
    import ml_dtypes
    import numpy as np

    from jaxq.models.build import build, model_of
    from jaxq.models.hf import save_hf

    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    config = CONFIG | {"num_hidden_layers": round(gigabytes * 1e9 / LAYER / kind.itemsize)}
    random = np.random.default_rng(0)
    layout = build(config, "config").layout
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32).astype(kind), layout)
    save_hf(model_of(config, params), params, folder, max_shard_bytes=300_000_000)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop(folder: Path) -> None:
    for file in files(folder):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one(what: str, folder: Path) -> None:
    """Prints the seconds and the peak bytes of this process."""
    import jax
    import ml_dtypes
    import numpy as np

    from jaxq.models import load

    before, start = peak(), time.perf_counter()
    if what == "read":
        buffer = bytearray(1 << 24)
        for file in files(folder):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    else:
        model = load(folder, {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}.get(what))
        for leaf in jax.tree.leaves(model.params):
            leaf.ravel("K").view("uint8")[::1024].max()
    print(time.perf_counter() - start, peak() - before)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loading(gigabytes: float, repeats: int) -> None:
    cases = (("float32", "default"), ("bfloat16", "default"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
    for stored, asked in cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            subprocess.run([sys.executable, __file__, "--write", stored, str(folder), str(gigabytes)], check=True)
            size = sum(file.stat().st_size for file in files(folder))
            runs: dict[str, list[tuple[float, float]]] = {"read": [], asked: []}
            for _ in range(repeats):
                for what, found in runs.items():
                    drop(folder)
                    command = [sys.executable, __file__, "--one", what, str(folder)]
                    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                    found.append((float(out[-2]), float(out[-1])))
        (read, _), (seconds, memory) = ([median(column) for column in zip(*found)] for found in runs.values())
        print(
            f"{stored}, {size / 1e9:.2f} GB, dtype {asked}: peak {memory / size:.2f} times its size, {seconds:.2f} s: "
            f"{seconds / read:.2f} times reading the files ({read:.2f} s, {size / read / 1e9:.1f} GB/s)"
        )


def importing(repeats: int) -> None:
    seconds: dict[str, list[float]] = {"import jax, flax": [], "import jaxq": []}
    for _ in range(repeats):
        for code, found in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            found.append(time.perf_counter() - start)
    (base, b), (ours, o) = ((code, median(found)) for code, found in seconds.items())
    print(f"`{ours}` {o:.2f} s, `{base}` {b:.2f} s, ratio {o / b:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], Path(args.one[1]))
    elif args.write:
        write(Path(args.write[1]), float(args.write[2]), args.write[0])
    else:
        importing(args.repeats)
        loading(args.gigabytes, args.repeats)
