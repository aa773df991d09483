"""The README's Python runs as it stands, and is as short as it says."""

import re
from pathlib import Path

from jaxq.qtensor import Packed
from jaxq.recipes import RecipeFile
from jaxq.yaml_file import read_yaml

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_examples_run(capsys):
    checkpoint, own_model, quantizing, floats, packing, coverage = blocks("python")
    assert len(checkpoint.splitlines()) <= 6 and len(quantizing.splitlines()) <= 5
    names: dict = {}
    exec(checkpoint, names)
    assert "Perplexity(perplexity=" in capsys.readouterr().out
    names = {}
    exec(own_model + quantizing + floats + packing + coverage, names)
    assert names["logits"].shape == (16, 10)
    assert names["qparams"].params["up"]["kernel"].format == names["jaxq"].AnyFloat(4)
    assert isinstance(names["packed"].params["up"]["kernel"].get_value(), Packed)
    assert "up/kernel" in capsys.readouterr().out


def test_the_recipe_is_one(tmp_path):
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    assert read_yaml(tmp_path / "recipe.yaml", RecipeFile).name == "OS+ W6A6"
