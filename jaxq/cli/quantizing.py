"""`jaxq quantize`."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq.cli.calibration import Batches, Calibration, calibration_batches
from jaxq.cli.errors import Failure
from jaxq.cli.exporting import exports
from jaxq.clipping import Clipping
from jaxq.execute import execute
from jaxq.fold import fold
from jaxq.formats import AnyFloat, Float, Format
from jaxq.models import Model, cast_once, load
from jaxq.program.trace import trace
from jaxq.qtensor import Grid, Quantized, is_qtensor
from jaxq.recipes.file import RecipeFile, read_recipe
from jaxq.recipes.steps import calibrate_recipe, searches_percentile, to_step
from jaxq.report import counting, say
from jaxq.steps.group import Group, Spec
from jaxq.storage.models import save_model


@dataclass(frozen=True)
class Folded:
    """The equivalent transforms alone, in full precision, and how far they moved the outputs (law 1)."""

    quantized: Quantized
    error: float


def quantize_command(
    name: str,
    recipe_name: str,
    calibration: Calibration,
    out: Path,
    wanted: Collection[str],
    checkpoint: Path | None,
) -> None:
    _check_out(out)
    started = time.perf_counter()
    recipe = read_recipe(recipe_name)
    model = load(name)
    _check_recipe(model, recipe)
    batches = calibration_batches(model, recipe, calibration)
    say(f"{recipe.name}: {name}, {batches}")
    errors: dict[str, float] = {}
    with counting("calibrating", count_groups(model, recipe, batches.inputs[0])) as advance:

        def on_group(group: Group) -> None:
            errors[group.plan.name] = float(group.log.get("fold_error", 0.0))
            advance()

        quantized, clipping = calibrate_recipe(
            model.forward,
            model.params,
            batches.inputs,
            recipe,
            masks=batches.masks,
            on_group=on_group,
            checkpoint=checkpoint,
        )
    folded = check_fold(model, quantized, batches.inputs[0])
    _say_proofs(folded, errors)
    if clipping is not None:
        say(f"token-wise clipping: percentile {clipping.percentile:.3f} of {len(clipping.percentiles)} tried")
    formats = float_formats(quantized)
    _say_formats(formats)
    about = _about(model, recipe, calibration, batches, time.perf_counter() - started)
    about |= {"proofs": _proofs(folded, errors), "clipping": _clipping(clipping), "float_formats": formats}
    writers, refused = exports(model, quantized, folded.quantized, wanted)
    save_model(out, model, quantized, about, writers)
    say(f"saved to {out}" + "".join(f", {kind} to {out / kind}" for kind in writers))
    if checkpoint is not None:
        say(f"{checkpoint} is no longer needed and may be removed")
    if refused:
        why = "; ".join(f"not as {kind}: {reason}" for kind, reason in refused.items())
        raise Failure(f"the quantized model is saved in {out}, but {why}")


def _check_out(out: Path) -> None:
    """Before anything is computed: whether there is a place for it."""
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out, or remove it first")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"{out}: {place} is no directory that can be written to; choose another --out")


def _check_recipe(model: Model, recipe: RecipeFile) -> None:
    if not model.causal and searches_percentile(recipe):
        raise ValueError(
            f"{recipe.name}: `percentile: search` goes by a language model's loss, {model.name} is an encoder: give a "
            "percentile in the recipe"
        )


def count_groups(model: Model, recipe: RecipeFile, inputs: tuple) -> int:
    """How many groups the recipe works on, for the progress bar."""
    step, program = to_step(recipe), trace(model.forward, model.params, *inputs)
    return sum(step.plan(group, Spec()).touched for layout in program.layout.all() for group in layout.groups)


def check_fold(model: Model, quantized: Quantized, inputs: tuple) -> Folded:
    """Law 1 on the whole model: the transforms, without any quantization, leave its outputs as they were."""
    if not quantized.transforms:
        return Folded(Quantized(model.params), 0.0)
    first = [jnp.asarray(x[:1]) for x in inputs]
    before = jax.jit(model.forward)(cast_once(model, model.params), *first).astype(jnp.float32)
    folded = fold(model.forward, model.params, quantized.transforms, *first)
    once = replace(folded, params=cast_once(model, folded.params))
    after = jax.jit(execute(model.forward))(once, *first).astype(jnp.float32)
    error = float(jnp.linalg.norm((after - before).ravel()) / jnp.linalg.norm(before.ravel()))
    return Folded(folded, error)


def float_formats(quantized: Quantized) -> dict[str, dict[str, int]]:
    """How many weights (tables among them) and how many activations have which float format, by its name (E2M1)."""
    leaves = jax.tree.leaves(quantized.params, is_leaf=is_qtensor)
    return {
        "weights": _count((leaf.format, leaf.grid) for leaf in leaves if is_qtensor(leaf)),
        "activations": _count((quant.format, quant.grid) for quant in quantized.inputs.values()),
    }


def _count(numbers: Iterable[tuple[Format | None, Grid | None]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for fmt, grid in numbers:
        if isinstance(fmt, AnyFloat) and grid is not None and grid.mantissa is not None:
            found.update(f"E{fmt.bits - 1 - m}M{m}" for m in np.ravel(grid.mantissa).tolist())
        elif isinstance(fmt, Float | AnyFloat):
            split = fmt.usual if isinstance(fmt, AnyFloat) else fmt
            found[f"E{split.exponent_bits}M{split.mantissa_bits}"] += 1
    return dict(found.most_common())


def _say_formats(formats: dict[str, dict[str, int]]) -> None:
    told = [f"{what} {', '.join(f'{n} {fmt}' for fmt, n in found.items())}" for what, found in formats.items() if found]
    if told:
        say(f"float formats: {'; '.join(told)}")


def _say_proofs(folded: Folded, errors: dict[str, float]) -> None:
    transforms = folded.quantized.transforms
    if not transforms:
        say("nothing was transformed, so there is no fold to check")
        return
    worst = max(errors, key=errors.__getitem__)
    say(
        f"{len(transforms)} groups transformed; before any rounding the outputs moved by {folded.error:.2g} (relative)"
        f", the activation at {worst} by {errors[worst]:.2g} at most"
    )


def _proofs(folded: Folded, errors: dict[str, float]) -> dict[str, Any]:
    return {
        "fold_error_of_logits": folded.error,
        "largest_fold_error_of_an_activation": max(errors.values(), default=0.0),
        "transforms_left_at_run_time": sorted(folded.quantized.inputs),
    }


def _clipping(clipping: Clipping | None) -> dict[str, Any] | None:
    if clipping is None:
        return None
    return {"percentile": clipping.percentile, "percentiles": clipping.percentiles, "losses": clipping.losses}


def _about(
    model: Model, recipe: RecipeFile, calibration: Calibration, batches: Batches, seconds: float
) -> dict[str, Any]:
    versions = {"jaxq": jaxq.__version__} | {name: version(name) for name in ("jax", "flax", "numpy")}
    return {
        "name": model.name,
        "family": model.family,
        "recipe": recipe.model_dump(),
        "calibration": {"file": str(calibration.file), "batches": [*batches.shape]},
        "seconds": round(seconds, 1),
        "versions": versions | {"python": platform.python_version()},
    }
