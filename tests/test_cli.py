import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from orbax.checkpoint import v1 as ocp
from typer.testing import CliRunner

from jaxq import storage
from jaxq.cli import app
from jaxq.models import save_hf
from jaxq.qtensor import Quantized
from jaxq.storage.models import save_model
from tests.tiny import BERT, LLAMA, OPT, TEXT, VIT, tiny_model, write_model

ROOT = Path(__file__).resolve().parents[1]
SHARED = (ROOT / "../shared").resolve()
RECIPE = {
    "name": "a test",
    "method": {"name": "smooth_quant"},
    "weights": {"bits": 8},
    "activations": {"bits": 8},
    "calibration": {"samples": 4, "length": 32, "batch_size": 2},
}


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    if code == 1:
        assert result.stderr.count("error: ") == 1 and "Traceback" not in result.output
        return result.stderr
    return result.output


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), "utf-8")
    return path


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "opt", OPT)


def perplexity(model: object, text: Path, out: Path) -> float:
    shown = run("eval", model, "--perplexity", text, "--length", 32, "--json", out)
    found = json.loads(out.read_text())
    assert f"{found['perplexity']:.4g}" in shown
    assert found["tokens"] > 0 and found["seconds"] > 0 and found["length"] == 32
    return found["perplexity"]


def quantize(model: object, recipe: object, text: Path, out: Path, *more: object, code: int = 0) -> str:
    return run("quantize", model, "--recipe", recipe, "--calibration", text, "--out", out, *more, code=code)


def test_quantize_eval_and_export(opt, text, tmp_path):
    recipe = tmp_path / "os_plus.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"method": {"name": "os_plus", "search": "fast"}}), "utf-8")
    out = tmp_path / "made" / "on the way" / "out"
    shown = quantize(opt, recipe, text, out, "--export", "hf", "--export", "compressed-tensors")
    assert "calibrating" in shown and "4 groups transformed" in shown and "relative" in shown
    before, after = perplexity(opt, text, tmp_path / "a.json"), perplexity(out, text, tmp_path / "b.json")
    assert after == pytest.approx(before, rel=0.02) and after != before
    assert perplexity(out / "hf", text, tmp_path / "c.json") == pytest.approx(before, rel=1e-4), "law 1"
    config = json.loads((out / "compressed-tensors/config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    assert (out / "compressed-tensors/tokenizer.json").is_file()
    about = json.loads((out / "jaxq.json").read_text())["about"]
    assert about["recipe"]["name"] == "a test" and about["calibration"]["batches"] == [2, 2, 32]
    assert about["proofs"]["fold_error_of_logits"] < 1e-5 and "jax" in about["versions"]
    assert "exists" in quantize(opt, recipe, text, out, code=1)


def test_the_text_and_batches_can_be_chosen(opt, recipe, text, tmp_path):
    shown = quantize(opt, recipe, text, tmp_path / "out", "--samples", 5, "--length", 64, "--batch-size", 3)
    assert "1 batches of 3 windows x 32 tokens" in shown and "context" in shown


def test_what_cannot_be_folded_is_not_exported(recipe, text, tmp_path):
    model = write_model(tmp_path / "post-norm", OPT, do_layer_norm_before=False)
    exports = "--export", "hf", "--export", "compressed-tensors"
    error = quantize(model, recipe, text, tmp_path / "out", *exports, code=1)
    assert "not as hf: " in error and "layers/1/attn/q/kernel" in error and "not as compressed-tensors: " in error
    assert error.count("run time") == 2
    assert (tmp_path / "out/jaxq.json").is_file()
    assert not (tmp_path / "out/hf").exists() and not (tmp_path / "out/compressed-tensors").exists()
    perplexity(tmp_path / "out", text, tmp_path / "a.json")


def test_a_searched_percentile_is_reported(opt, text, tmp_path):
    observer = {"name": "token_quantile", "percentile": "search"}
    recipe = tmp_path / "clip.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"activations": {"bits": 8, "observer": observer}}), "utf-8")
    assert "percentile" in quantize(opt, recipe, text, tmp_path / "out")
    clipping = json.loads((tmp_path / "out/jaxq.json").read_text())["about"]["clipping"]
    assert len(clipping["losses"]) == len(clipping["percentiles"]) == 10
    assert min(clipping["losses"]) == clipping["losses"][clipping["percentiles"].index(clipping["percentile"])]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "bert", BERT)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    lines = ("def add,return a,1.0", "class Thing,class Thin,5.0", '"print(i)",name,0.5', "name = x,names = y,4.0")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def similarity(model: object, pairs: Path, out: Path) -> dict:
    shown = run("eval", model, "--sts", pairs, "--json", out)
    found = json.loads(out.read_text())
    assert "Spearman" in shown and f"{found['spearman']:.4g}" in shown
    assert found["pairs"] == 4 and found["length"] == 32 and -1 <= found["spearman"] <= 1
    return found


def test_an_encoder(bert, recipe, text, pairs, tmp_path):
    similarity(bert, pairs, tmp_path / "a.json")
    shown = quantize(bert, recipe, text, tmp_path / "out")
    assert "2 batches of 2 sentences x" in shown and "4 groups transformed" in shown
    similarity(tmp_path / "out", pairs, tmp_path / "b.json")
    assert json.loads((tmp_path / "out/jaxq.json").read_text())["about"]["proofs"]["fold_error_of_logits"] < 1e-5


def test_each_model_has_its_own_measure(opt, bert, text, pairs, tmp_path):
    refused(run("eval", bert, "--perplexity", text, code=1), "encoder", "--sts")
    refused(run("eval", opt, "--sts", pairs, code=1), "[1, 8, 1024]", "--sts")
    refused(run("eval", bert, "--sts", text, code=1), "row 1", "sentence,sentence,score")
    for given in ((), ("--sts", pairs, "--perplexity", text)):
        refused(run("eval", bert, *given, code=1), "--perplexity", "--sts")


@pytest.mark.slow
def test_a_classifier_of_sentences(opt, recipe, text, tmp_path):
    model = write_model(tmp_path / "model", BERT, architectures=["BertForSequenceClassification"])
    rows = tmp_path / "rows.tsv"
    rows.write_text("sentence1\tsentence2\tlabel\ndef add\treturn\t1\nclass\tThing\t0\nx\ty\t1\n", "utf-8")
    quantize(model, recipe, text, tmp_path / "out")
    for name in (model, tmp_path / "out"):
        shown = run("eval", name, "--classify", rows, "--json", tmp_path / "a.json")
        found = json.loads((tmp_path / "a.json").read_text())
        assert found["examples"] == 3 and found["accuracy"] * 3 % 1 == pytest.approx(0) and found["length"] == 32
        assert "accuracy" in shown and f"{found['accuracy']:.4g}" in shown and f"{found['matthews']:.4g}" in shown
    rows.write_text("def add\treturn\t2\n", "utf-8")
    refused(run("eval", model, "--classify", rows, code=1), "labels run from 2 to 2", "tells 2 apart")
    refused(run("eval", opt, "--classify", rows, code=1), "language model")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random, path = np.random.default_rng(0), tmp_path / "images.npz"
    np.savez(path, images=random.integers(0, 256, (10, 12, 12), np.uint8), labels=random.integers(0, 5, 10))
    return path


@pytest.mark.slow
def test_a_model_of_images(opt, images, text, pairs, tmp_path):
    model = write_model(tmp_path / "model", VIT)
    recipe = tmp_path / "os_plus.yaml"
    recipe.write_text(
        yaml.safe_dump(RECIPE | {"method": {"name": "os_plus", "search": "fast"}, "skip": ["classifier*"]}), "utf-8"
    )
    shown = quantize(model, recipe, images, tmp_path / "out", "--export", "hf")
    assert "2 batches of 2 images x [8, 8, 3]" in shown and "4 groups transformed" in shown
    about = json.loads((tmp_path / "out/jaxq.json").read_text())["about"]
    assert about["proofs"]["fold_error_of_logits"] < 1e-5 and about["calibration"]["batches"] == [2, 2, 8, 8, 3]
    for name in (model, tmp_path / "out", tmp_path / "out/hf"):
        shown = run("eval", name, "--images", images, "--batch-size", 4, "--json", tmp_path / "a.json")
        found = json.loads((tmp_path / "a.json").read_text())
        assert found["examples"] == 10 and found["accuracy"] * 10 % 1 == pytest.approx(0)
        assert "accuracy" in shown and f"{found['accuracy']:.4g}" in shown
    assert "patches/kernel" in run("sites", model)
    refused(run("eval", model, "--perplexity", text, code=1), "no perplexity", "--images")
    refused(run("eval", model, "--sts", pairs, code=1), "no tokenizer")
    refused(run("eval", opt, "--images", images, code=1), "reads text")
    refused(run("eval", model, "--images", text, code=1), "text.txt", "not an npz file")
    refused(quantize(model, recipe, text, tmp_path / "another", code=1), "text.txt", "not an npz file")
    refused(quantize(opt, recipe, images, tmp_path / "another", code=1), "images.npz", "UTF-8")


def test_no_percentile_is_searched_for_an_encoder(bert, text, tmp_path):
    observer = {"name": "token_quantile", "percentile": "search"}
    recipe = tmp_path / "clip.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"activations": {"bits": 8, "observer": observer}}), "utf-8")
    refused(quantize(bert, recipe, text, tmp_path / "out", code=1), "percentile", "encoder")


FLOAT = {"format": "float", "bits": 4}
# A search that takes seconds.
LLM_FP4 = {"name": "llm_fp4", "rounds": 1, "candidates": 5, "search": "exhaustive"}


@pytest.mark.slow
def test_the_float_formats_that_were_chosen_are_told(opt, text, tmp_path):
    recipe = tmp_path / "fp4.yaml"
    floats = {"weights": FLOAT | {"exponent_bits": 3}, "activations": FLOAT, "embeddings": FLOAT | {"bits": 8}}
    methods = [{"name": "channel_shift"}, LLM_FP4]
    recipe.write_text(yaml.safe_dump(RECIPE | {"method": methods, "skip": ["lm_head/*"], **floats}), "utf-8")
    shown = " ".join(quantize(opt, recipe, text, tmp_path / "out").split())
    found = json.loads((tmp_path / "out/jaxq.json").read_text())["about"]["float_formats"]
    assert found["weights"].pop("E3M0") == 12, "all six of each layer"
    assert sum(found["weights"].values()) == 2, "two tables, and the head tied to one of them"
    assert sum(found["activations"].values()) == 9 and set(found["activations"]) <= {"E1M2", "E2M1", "E3M0"}
    assert "float formats: weights 12 E3M0, " in shown and "; activations " in shown
    perplexity(tmp_path / "out", text, tmp_path / "a.json")


def test_integers_tell_no_float_formats(opt, recipe, text, tmp_path):
    assert "float formats" not in quantize(opt, recipe, text, tmp_path / "out")


def test_sites(opt, tmp_path):
    shown = run("sites", opt, "--json", tmp_path / "sites.json")
    assert "layers/*/attn/q/kernel" in shown and "layers/*/attn_norm/{scale,bias}" in shown
    assert json.loads((tmp_path / "sites.json").read_text())["sites"][0]["path"] == "embed/embedding"


def test_recipes():
    shown = run("recipes")
    for name in ("os_plus-w6a6", "llm_fp4-w4a4e4", "minmax_fp-w8a8e8", "channel_shift-llm_fp4-w4a4"):
        assert name in shown


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(error: str, *named: str) -> None:
    for name in named:
        assert name in error, f"{name!r} is not in {error!r}"


def test_damaged_weights(recipe, text, tmp_path):
    model = write_model(tmp_path / "model", OPT)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(quantize(model, recipe, text, tmp_path / "out", code=1), str(file), "safetensors")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(recipe, text, tmp_path):
    model = tiny_model(OPT)
    kernel = np.array(model.params["layers"][1]["mlp"]["up"]["kernel"])
    kernel[3, 2] = np.nan
    model.params["layers"][1]["mlp"]["up"]["kernel"] = kernel
    save_hf(model, model.params, tmp_path / "model", max_shard_bytes=30_000)
    error = run("eval", tmp_path / "model", "--perplexity", text, code=1)
    refused(error, "-of-", ".safetensors: tensor model.decoder.layers.1.fc1.weight", "1 number")
    save_model(tmp_path / "quantized", model, Quantized(model.params), {})
    error = run("eval", tmp_path / "quantized", "--perplexity", text, code=1)
    refused(error, str(tmp_path / "quantized/arrays"), "layers/1/mlp/up/kernel")


def test_missing_shard(recipe, text, tmp_path):
    model = write_model(tmp_path / "model", OPT, max_shard_bytes=30_000)
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(run("eval", model, "--perplexity", text, code=1), shard.name, "missing")


def test_wrong_vocabulary(recipe, text, tmp_path):
    model = write_model(tmp_path / "model", OPT, vocab_size=100)
    refused(quantize(model, recipe, text, tmp_path / "out", code=1), "vocabulary of 100", str(text))
    refused(run("eval", model, "--perplexity", text, code=1), "vocabulary of 100")


def test_no_tokenizer(recipe, text, tmp_path):
    model = write_model(tmp_path / "model", OPT)
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(quantize(model, recipe, text, tmp_path / "out", code=1), "no tokenizer")


def test_unknown_names(opt, recipe, text, tmp_path):
    out = tmp_path / "out"
    refused(quantize("stdlib-optt", recipe, text, out, code=1), "stdlib-optt", "stdlib-opt)")
    refused(quantize(opt, "os_plus-w6a7", text, out, code=1), "os_plus-w6a7", "os_plus-w6a6")
    refused(quantize(opt, recipe, tmp_path / "none.txt", out, code=1), "none.txt", "No such file")
    refused(run("eval", tmp_path, "--perplexity", text, code=1), "config.json")
    run("quantize", opt, code=2)
    run("nonsense", code=2)


def test_unknown_recipe_key(opt, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"weights": {"bitz": 8}}), "utf-8")
    refused(quantize(opt, recipe, text, tmp_path / "out", code=1), str(recipe), "weights.bitz", "bits")


def test_an_unquantizable_combination(opt, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"method": [{"name": "os_plus"}, LLM_FP4]}), "utf-8")
    error = quantize(opt, recipe, text, tmp_path / "out", code=1)
    refused(error, f"{recipe}: weights: llm_fp4 searches floats", f"{recipe}: activations", "format: float")


def test_a_skip_pattern_that_matches_nothing(opt, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"skip": ["lm_head/*", "embed*", "layers/*/mpl/*"]}), "utf-8")
    refused(quantize(opt, recipe, text, tmp_path / "out", code=1), "layers/*/mpl/*", "mlp")


def test_groups_that_do_not_divide(opt, text, tmp_path):
    numbers = {"bits": 4, "granularity": "group", "group_size": 5}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"weights": numbers, "activations": numbers}), "utf-8")
    refused(quantize(opt, recipe, text, tmp_path / "out", code=1), "layers/0/attn/q/kernel", "groups of 5", "16")


def test_short_or_binary_text(opt, recipe, tmp_path):
    (tmp_path / "short.txt").write_text("a", "utf-8")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_text("", "utf-8")
    for name, why in {"short": "one window", "binary": "UTF-8", "empty": "no text"}.items():
        refused(quantize(opt, recipe, tmp_path / f"{name}.txt", tmp_path / "out", code=1), f"{name}.txt", why)


def test_damaged_result(opt, recipe, text, tmp_path):
    quantize(opt, recipe, text, tmp_path / "out")
    (tmp_path / "out/config.json").unlink()
    refused(run("eval", tmp_path / "out", "--perplexity", text, code=1), "config.json", "missing")
    (tmp_path / "out/jaxq.json").write_text("{", "utf-8")
    refused(run("eval", tmp_path / "out", "--perplexity", text, code=1), "jaxq.json", "not valid JSON")


def test_out_under_a_file_is_refused_before_calibration(opt, recipe, text, tmp_path):
    result = quantize(opt, recipe, text, text / "out", code=1)
    refused(result, str(text), "no directory")
    assert "calibrating" not in result


def test_full_disk(opt, recipe, text, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(ocp, "save", full)
    refused(quantize(opt, recipe, text, tmp_path / "out", code=1), "No space left on device", "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "text.txt"], "nothing half-written is left"


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(app, ["--debug", "sites", "nonsense"])
    assert isinstance(result.exception, FileNotFoundError) and "error: " not in result.output


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--simulated",), marks=pytest.mark.slow),
        ("--cache", "int8", "--temperature", 0.5, "--seed", 3),
    ],
)
def test_generate(opt, recipe, text, tmp_path, more):
    quantize(opt, recipe, text, tmp_path / "out")
    for model in (opt, tmp_path / "out"):
        command = "generate", model, "--prompt", "def add(", "--tokens", 5, *more
        shown = run(*command, "--json", tmp_path / "r.json")
        found = json.loads((tmp_path / "r.json").read_text())
        assert "def add(" + found["text"] in shown and "decode" in shown
        assert len(found["tokens"]) == 5 and found["packed"] == ("--simulated" not in more)
        assert found["prefill"] > 0 and found["decode"] > 0 and f"{found['prefill']:.4g}" in shown
        run(*command, "--json", tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text())["tokens"] == found["tokens"]


def test_what_cannot_be_generated(opt, bert):
    refused(run("generate", opt, "--prompt", "def", "--tokens", 40, code=1), "40 more", "32", "--tokens")
    refused(run("generate", opt, "--prompt", "def", "--tokens", 4, "--cache", "int4", code=1), "'int4'", "bf16", "fp8")
    refused(run("generate", bert, "--prompt", "def", code=1), "encoder")
    assert len(run("generate", opt, "--prompt", "", "--tokens", 1).split("│")) > 3, "the model's first token will do"


# As a process of its own ----------------------------------------------------------------------------------------------


def process(*args: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_help_loads_nothing_slow():
    slow = "{'transformers', 'flax', 'orbax', 'matplotlib', 'torch'} & set(sys.modules)"
    found = process("-c", f"import sys, jaxq.cli; print({slow})")
    assert found.stdout == "set()\n", found
    assert "quantize" in process("-m", "jaxq", "--help").stdout


@pytest.mark.slow
def test_killed_while_saving(opt, recipe, text, tmp_path):
    out = tmp_path / "out"
    command = ["quantize", opt, "--recipe", recipe, "--calibration", text, "--out", out]
    killing = (
        "import os, signal, sys; from jaxq.cli import app; "
        f"os.rename = lambda *_: os.kill(os.getpid(), {int(signal.SIGKILL)}); app(sys.argv[1:])"
    )
    assert process("-c", killing, *command).returncode == -signal.SIGKILL
    assert not out.exists()
    run(*command)
    assert (out / "jaxq.json").is_file()


@pytest.mark.slow
def test_a_killed_calibration_is_resumed(opt, text, tmp_path):
    recipe, kept = tmp_path / "os_plus.yaml", tmp_path / "kept"
    recipe.write_text(yaml.safe_dump(RECIPE | {"method": {"name": "os_plus", "search": "fast"}}), "utf-8")
    command = ["quantize", opt, "--recipe", recipe, "--calibration", text, "--out", tmp_path / "out"]
    killing = (
        "import os, signal, sys; from jaxq.cli import app; replace = os.replace; "
        f"die = lambda: os.kill(os.getpid(), {int(signal.SIGKILL)}); "
        "os.replace = lambda a, b: die() if b.name.startswith('00003') else replace(a, b); app(sys.argv[1:])"
    )
    assert process("-c", killing, *command, "--checkpoint", kept).returncode == -signal.SIGKILL
    before = {file.name: file.stat().st_mtime_ns for file in kept.glob("*.safetensors")}
    assert sorted(before) == [f"0000{i}.safetensors" for i in range(3)]
    assert "kept is no longer needed" in run(*command, "--checkpoint", kept).replace("\n", "")
    assert before.items() <= {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}.items()
    run(*command[:-1], tmp_path / "at once")
    one, other = (storage.load(tmp_path / name)[0] for name in ("out", "at once"))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    recipe.write_text(yaml.safe_dump(RECIPE), "utf-8")
    again = run(*command[:-1], tmp_path / "another", "--checkpoint", kept, code=1)
    refused(again, "00000.safetensors", "different are the recipe", "another checkpoint folder")


# Real models ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, recipe, limit",
    [
        ("llama-stories260k", "os_plus-w8a8-llama", 1.02),
        ("opt-tinystories-trained-here", "os_plus-w8a8", 1.02),
        ("bloom-tinystories-trained-here", "os_plus-w8a8", 1.02),
        ("bloom-tinystories-trained-here", "os_plus-w6a6-clip985", 1.02),
    ],
)
def test_real_models(name, recipe, limit, tmp_path):
    model, data = SHARED / "models" / name, SHARED / "data/text"
    if not model.is_dir():
        pytest.skip(f"{model} is not there")
    text = tmp_path / "text.txt"
    text.write_text((data / "tinystories.valid.txt").read_text("utf-8")[:200_000], "utf-8")
    out = tmp_path / "out"
    quantize(model, recipe, data / "tinystories.train.txt", out, "--samples", 16, "--length", 128, "--batch-size", 8)
    found = []
    for m in (model, out):
        run("eval", m, "--perplexity", text, "--length", 128, "--json", tmp_path / "r.json")
        found.append(json.loads((tmp_path / "r.json").read_text())["perplexity"])
    assert found[1] < limit * found[0]


@pytest.mark.slow
def test_llama_exports_too(text, tmp_path):
    model = write_model(tmp_path / "model", LLAMA)
    recipe = tmp_path / "llama.yaml"
    method = {"name": "smooth_quant", "groups": "foldable"}
    recipe.write_text(yaml.safe_dump(RECIPE | {"method": method}), "utf-8")
    quantize(model, recipe, text, tmp_path / "out", "--export", "hf")
    before, folded = (
        perplexity(model, text, tmp_path / "a.json"),
        perplexity(tmp_path / "out/hf", text, tmp_path / "b.json"),
    )
    assert folded == pytest.approx(before, rel=1e-4)
