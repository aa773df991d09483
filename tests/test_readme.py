"""The README's Python runs as it stands, and is as short as it says."""

from jaxq.qtensor import Packed
from jaxq.recipes import RecipeFile
from jaxq.recipes.yaml_file import read_yaml
from tests.documents import blocks


def test_the_examples_run(capsys):
    checkpoint, own_model, quantizing, floats, packing, coverage = blocks("README.md", "python")
    assert len(checkpoint.strip().splitlines()) <= 6 and len(quantizing.strip().splitlines()) <= 5
    names: dict = {}
    exec(compile(checkpoint, "README.md", "exec"), names)
    assert "Perplexity(perplexity=" in capsys.readouterr().out
    names = {}
    for code in (own_model, quantizing, floats, packing, coverage):
        exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (16, 10)
    assert names["qparams"].params["up"]["kernel"].format == names["jaxq"].AnyFloat(4)
    assert isinstance(names["packed"].params["up"]["kernel"].get_value(), Packed)
    assert "up/kernel" in capsys.readouterr().out


def test_the_recipe_is_one(tmp_path):
    (recipe,) = blocks("README.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    assert read_yaml(tmp_path / "recipe.yaml", RecipeFile).name == "OS+ W6A6"
