"""Finished groups kept on disk, from which an interrupted calibration goes on to the same result.

A record is a safetensors file, `00000.safetensors` for the first group that the walk comes to and so on. Its arrays are
raw bytes; its metadata hold, as JSON, what they are (see `described`) and the fingerprints of what the group was given.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxq.calibration.fingerprint import as_bytes, fingerprint, without_addresses
from jaxq.contraction import transform
from jaxq.program.trace import Program
from jaxq.steps.group import Group, Step
from jaxq.storage.described import describe, restore

FOUND = ("weights", "biases", "output_bias", "shift", "scale", "grid", "log")  # what steps change in a group


def of_calibration(
    program: Program, batches: Sequence[Any], masks: Any, propagate: str, recipe: Step
) -> dict[str, str]:
    """The fingerprints of what all groups are given, under names that a person understands."""
    from jaxq import __version__

    return {
        "the versions of jaxq and JAX": f"{__version__}, {jax.__version__}",
        "the program": fingerprint((without_addresses(str(program.closed)), program.closed.consts, program.paths)),
        "the batches": fingerprint(batches),
        "the masks": fingerprint(masks),
        "`propagate`": propagate,
        "the recipe": fingerprint(recipe),
    }


def resumed(step: Step, folder: Path, given: dict[str, str]) -> Step:
    """`step`, with each group's result kept in `folder`; where that holds a record, the group's is taken from it.

    Args:
      given: the fingerprints of what all groups are given; `step` runs in one walk only, from its start.

    Applying it raises ValueError, naming the file, for a record that is damaged or was made from something else, and
    for a result that cannot be recorded.
    """
    places = count()

    def apply(group: Group) -> Group:
        file = folder / f"{next(places):05d}.safetensors"
        mine = given | _of_group(group)
        if file.exists():
            return _with(group, _read(file, mine))
        done = step.apply(group)
        _write(file, mine, _found(group, done), group.plan.name)
        return done

    folder.mkdir(parents=True, exist_ok=True)
    return step._replace(apply=apply)


def _of_group(group: Group) -> dict[str, str]:
    return {
        "the group": fingerprint((group.plan, group.token_axes)),
        "its activation": fingerprint(group.x),
        "its parameters": fingerprint((group.weights, group.biases, group.norm_scale)),
    }


def _found(before: Group, after: Group) -> dict[str, Any]:
    """What the step changed."""
    if after.spec != before.spec:
        raise ValueError(f"{after.plan.name}: a step changed the group's `spec` while it ran, which has no record")
    found = {name: getattr(after, name) for name in FOUND}
    for name in ("weights", "biases"):
        found[name] = {p: a for p, a in found[name].items() if a is not getattr(before, name).get(p)}
    return found


def _with(group: Group, found: dict[str, Any]) -> Group:
    found |= {name: getattr(group, name) | found[name] for name in ("weights", "biases")}
    x = tuple(transform(x, found["shift"], found["scale"], group.plan.x_axes) for x in group.x)
    return replace(group, x=x, **found)


def _write(file: Path, given: dict[str, str], found: dict[str, Any], name: str) -> None:
    """The whole file or none: written aside, and renamed once it is on the disk."""
    arrays: dict[str, np.ndarray] = {}
    record = json.dumps({"given": given, "found": describe(found, name, arrays)})
    raw = {key: as_bytes(array) for key, array in arrays.items()}
    aside = file.with_suffix(".part")
    with aside.open("wb") as opened:
        opened.write(save(raw, {"record": record, "crc32": str(zlib.crc32(record.encode()))}))
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(aside, file)


def _read(file: Path, given: dict[str, str]) -> dict[str, Any]:
    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            arrays = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
        if zlib.crc32(metadata["record"].encode()) != int(metadata["crc32"]):
            raise ValueError("the checksum of its description differs")
        record = json.loads(metadata["record"])
        found = restore(record["found"], arrays)
    except (SafetensorError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, and its group alone is calibrated again") from error
    different = [name for name, value in given.items() if record["given"].get(name) != value]
    if different:
        raise ValueError(
            f"{file} was recorded by another calibration; different are {', '.join(different)}. Repeat that one, "
            f"or choose another checkpoint folder, or remove {file.parent}"
        )
    return found
