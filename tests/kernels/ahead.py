"""What compilers make of the kernels, from the experiments that print it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rows_of(script: str, *arguments: str) -> list[dict]:
    """The rows of an experiment's table, from a process of its own: compilers read their options once."""
    command = [sys.executable, str(ROOT / "experiments" / script), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
