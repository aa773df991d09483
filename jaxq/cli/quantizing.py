"""`jaxq quantize`."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
from jaxq.cli.errors import Failure
from jaxq.clipping import Clipping
from jaxq.evaluate import pack, read_documents
from jaxq.execute import execute
from jaxq.fold import fold
from jaxq.models import Model, load
from jaxq.program.trace import trace
from jaxq.qtensor import Quantized
from jaxq.recipe_steps import calibrate_recipe, to_step
from jaxq.recipes import RecipeFile, read_recipe
from jaxq.report import counting, say
from jaxq.saved import EXPORTED, save_model
from jaxq.steps.group import Group, Spec


@dataclass(frozen=True)
class Calibration:
    """The text, and what of the recipe's own calibration settings is overridden."""

    text: Path
    samples: int | None = None
    length: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Folded:
    """The equivalent transforms alone, in full precision, and how far they moved the outputs (law 1)."""

    quantized: Quantized
    error: float


def quantize_command(
    name: str, recipe_name: str, calibration: Calibration, out: Path, export: bool, checkpoint: Path | None
) -> None:
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out, or remove it first")
    started = time.perf_counter()
    recipe = read_recipe(recipe_name)
    documents = read_documents(calibration.text)
    model = load(name)
    batches = calibration_batches(model, documents, recipe, calibration)
    say(
        f"{recipe.name}: {name}, {len(batches)} batches of {batches[0].shape[0]} windows x {batches[0].shape[1]} tokens"
    )
    errors: dict[str, float] = {}
    with counting("calibrating", count_groups(model, recipe, batches[0])) as advance:

        def on_group(group: Group) -> None:
            errors[group.plan.name] = float(group.log.get("fold_error", 0.0))
            advance()

        quantized, clipping = calibrate_recipe(
            model.forward, model.params, batches, recipe, on_group=on_group, checkpoint=checkpoint
        )
    folded = check_fold(model, quantized, batches[0])
    _say_proofs(folded, errors)
    if clipping is not None:
        say(f"token-wise clipping: percentile {clipping.percentile:.3f} of {len(clipping.percentiles)} tried")
    whole = not folded.quantized.inputs
    about = _about(model, recipe, calibration, batches, time.perf_counter() - started)
    about |= {"proofs": _proofs(folded, errors), "clipping": _clipping(clipping)}
    save_model(out, model, quantized, about, folded.quantized.params if export and whole else None)
    say(f"saved to {out}" + (f", the folded full-precision model to {out / EXPORTED}" if export and whole else ""))
    if checkpoint is not None:
        say(f"{checkpoint} is no longer needed and may be removed")
    if export and not whole:
        raise Failure(_why_not_exported(folded.quantized, out))


def calibration_batches(
    model: Model, documents: list[str], recipe: RecipeFile, calibration: Calibration
) -> list[np.ndarray]:
    """Windows spread evenly over the text, int32 `[batch, length]` each; a last, smaller batch is dropped.

    Raises ValueError where the model has no tokenizer, or the text is too short or not of the model's vocabulary.
    """
    settings = recipe.calibration
    windows = model_windows(model, documents, calibration.length or settings.length, calibration.text)
    samples, size = calibration.samples or settings.samples, calibration.batch_size or settings.batch_size
    if len(windows) < samples:
        say(f"{calibration.text} makes {len(windows)} windows, {samples} were asked for: all are used")
    samples = min(samples, len(windows))
    picked = windows[np.linspace(0, len(windows) - 1, samples).astype(int)]
    size = min(size, samples)
    return list(picked[: samples // size * size].reshape(-1, size, windows.shape[1]))


def model_windows(model: Model, documents: list[str], length: int, source: object) -> np.ndarray:
    """A text as windows of at most the model's context: int32 `[windows, length]`. Errors as those of `pack`."""
    if model.tokenizer is None:
        raise ValueError(f"{model.name}: no tokenizer files in it, so text cannot be read for it")
    context = model.config.get("max_position_embeddings") or length
    if length > context:
        say(f"windows of {context} tokens: the context of {model.name}, {length} were asked for")
    vocabulary = model.config["vocab_size"]
    return pack(documents, model.tokenizer, min(length, context), vocab_size=vocabulary, source=source)


def count_groups(model: Model, recipe: RecipeFile, batch: np.ndarray) -> int:
    """How many groups the recipe works on, for the progress bar."""
    step, program = to_step(recipe), trace(model.forward, model.params, batch)
    return sum(step.plan(group, Spec()).touched for layout in program.layout.all() for group in layout.groups)


def check_fold(model: Model, quantized: Quantized, batch: np.ndarray) -> Folded:
    """Law 1 on the whole model: the transforms, without any quantization, leave its logits as they were."""
    tokens = jnp.asarray(batch[:1])
    folded = fold(model.forward, model.params, quantized.transforms, tokens)
    before = jax.jit(model.forward)(model.params, tokens).astype(jnp.float32)
    after = jax.jit(execute(model.forward))(folded, tokens).astype(jnp.float32)
    error = float(jnp.linalg.norm((after - before).ravel()) / jnp.linalg.norm(before.ravel()))
    return Folded(folded, error)


def _say_proofs(folded: Folded, errors: dict[str, float]) -> None:
    transforms = folded.quantized.transforms
    if not transforms:
        say("nothing was transformed, so there is no fold to check")
        return
    worst = max(errors, key=errors.__getitem__)
    say(
        f"{len(transforms)} groups transformed; before any rounding the logits moved by {folded.error:.2g} (relative), "
        f"the activation at {worst} by {errors[worst]:.2g} at most"
    )


def _why_not_exported(folded: Quantized, out: Path) -> str:
    names = ", ".join(sorted(folded.inputs))
    return (
        f"the quantized model is saved in {out}, but not as a Hugging Face checkpoint: {len(folded.inputs)} groups "
        f"keep a shift or scale at run time, which that format has no place for: {names}; see `jaxq sites`"
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
    model: Model, recipe: RecipeFile, calibration: Calibration, batches: Sequence[np.ndarray], seconds: float
) -> dict[str, Any]:
    versions = {"jaxq": jaxq.__version__} | {name: version(name) for name in ("jax", "flax", "numpy")}
    return {
        "name": model.name,
        "family": model.family,
        "recipe": recipe.model_dump(),
        "calibration": {"text": str(calibration.text), "batches": [len(batches), *batches[0].shape]},
        "seconds": round(seconds, 1),
        "versions": versions | {"python": platform.python_version()},
    }
