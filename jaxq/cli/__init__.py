"""The command line: `jaxq quantize`, `eval`, `generate`, `sites`, `recipes` and `demo`.

Everything slow to import (transformers, Orbax, Flax) is imported inside the command that needs it.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jaxq.cli import errors
from jaxq.cli.errors import readable_errors

app = typer.Typer(
    help="Post-training quantization of JAX programs.", no_args_is_help=True, pretty_exceptions_enable=False
)

MODEL_HELP = "Embedded model (stdlib-opt), directory in Hugging Face format, or hub name (owner/model)."
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result to FILE, too.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Windows, sentences or images in a batch.")]
Length = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window, or a sentence at most; at most the model's context.")
]


class Export(StrEnum):
    HF = "hf"
    COMPRESSED_TENSORS = "compressed-tensors"


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    errors.debug.set(debug)


@app.command()
@readable_errors
def quantize(
    model: ModelName,
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of a recipe of jaxq's own (`jaxq recipes`).")],
    calibration: Annotated[
        Path,
        typer.Option(
            help="Text; <|endoftext|> between documents, or, for an encoder, a sentence a line. For a model of images, "
            "an npz file as of `eval --images`, whose labels are not used."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    samples: Annotated[
        int | None, typer.Option(min=1, help="Windows, sentences or images; default: the recipe's.")
    ] = None,
    length: Length = None,
    batch_size: BatchSize = None,
    export: Annotated[
        list[Export] | None,
        typer.Option(
            help="Also write OUT/hf, the folded full-precision model as a Hugging Face checkpoint, or "
            "OUT/compressed-tensors, the quantized one as vLLM and transformers read it. May be given twice."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep finished groups in DIR; the same command resumes from them."),
    ] = None,
) -> None:
    """Quantize a language model, an encoder or a model of images by a recipe, check the folds, and save it."""
    from jaxq.cli.quantizing import Calibration, quantize_command

    what = Calibration(calibration, samples, length, batch_size)
    quantize_command(model, recipe, what, out, export or (), checkpoint)


@app.command("eval")
@readable_errors
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"What `jaxq quantize` wrote. Or: {MODEL_HELP}")],
    perplexity: Annotated[
        Path | None, typer.Option(help="Text file to measure a language model's perplexity on.")
    ] = None,
    sts: Annotated[
        Path | None, typer.Option(help="CSV file, sentence,sentence,score, to measure an encoder on.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Tasks of lm-evaluation-harness, or .jsonl files, with commas between them."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many items of each task.")] = None,
    classify: Annotated[
        Path | None,
        typer.Option(
            help="File of sentences or pairs with labels, to measure a classifier on: sentence, [sentence,] label in "
            "each row; GLUE's headers are understood. Tabs between cells, or, in a .csv file, commas."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="npz file to measure a classifier of images on: images (uint8 [n, h, w] or [n, h, w, 3]) and labels."
        ),
    ] = None,
    length: Length = 512,
    batch_size: BatchSize = None,
    json: Json = None,
) -> None:
    """Measure a model, quantized or not, in one of the ways below."""
    from jaxq.cli import evaluating as run

    assert length is not None
    if sum(what is not None for what in (perplexity, sts, tasks, classify, images)) != 1:
        raise ValueError("give one of --perplexity FILE, --sts FILE, --tasks LIST, --classify FILE and --images FILE")
    rows = batch_size or 8
    with run.blaming_weights(model):
        if perplexity is not None:
            run.perplexity_command(model, perplexity, length, batch_size, json)
        elif sts is not None:
            run.sts_command(model, sts, length, rows, json)
        elif tasks is not None:
            run.tasks_command(model, [name.strip() for name in tasks.split(",")], limit, rows, json)
        elif classify is not None:
            run.classify_command(model, classify, length, rows, json)
        elif images is not None:
            run.images_command(model, images, rows, json)


@app.command()
@readable_errors
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"What `jaxq quantize` wrote. Or: {MODEL_HELP}")],
    prompt: Annotated[str, typer.Option(help="The text to go on with.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens.")] = 64,
    cache: Annotated[
        str, typer.Option(help="What keys and values are kept as: float32, bf16, int8 or fp8 (E4M3).")
    ] = "bf16",
    packed: Annotated[
        bool, typer.Option("--packed/--simulated", help="Multiply packed codes, or simulate low precision.")
    ] = True,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the likeliest token; else drawn, from logits divided by this.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    json: Json = None,
) -> None:
    """Go on with a text, and say how fast."""
    from jaxq.cli.generating import generate_command

    generate_command(model, prompt, tokens, cache, packed, temperature, seed, json)


@app.command()
@readable_errors
def sites(model: ModelName, json: Json = None) -> None:
    """Show what in a model can be quantized, where transforms can be folded, and what is left out."""
    from jaxq.cli.evaluating import sites_command

    sites_command(model, json)


@app.command()
@readable_errors
def recipes() -> None:
    """List the recipes that come with jaxq."""
    from jaxq.recipes.file import read_recipe, recipe_files
    from jaxq.report import console, table

    rows = [(name, read_recipe(name).name) for name in sorted(recipe_files())]
    console().print(table("recipes", ["--recipe", "what it is"], rows))


@app.command()
@readable_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("demo"),
    windows: Annotated[int, typer.Option(min=1, help="Windows of held-out text to evaluate on.")] = 32,
) -> None:
    """Quantize the embedded model in several ways, offline, and compare perplexities (about 3 minutes)."""
    from jaxq.demo import run_demo

    run_demo(out, windows)
