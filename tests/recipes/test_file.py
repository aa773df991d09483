import re
from pathlib import Path

import pytest
import yaml

from jaxq.recipes import RecipeFile, read_recipe, recipe_files
from jaxq.recipes.file import FloatMethod, OSPlus
from jaxq.recipes.numbers import Activations, TokenQuantile

STEM = re.compile(
    r"(?P<method>os_plus|rtn|smooth_quant|gamma_migration)-w(?P<weights>\d)a(?P<activations>\d)"
    r"(-(?P<token>token)|-group(?P<group>\d+))?(-clip(?P<clip>\d+|_search))?(?P<llama>-llama)?(?P<no_down>-no_down)?"
    r"(?P<attention>-attention)?"
)
FLOAT_STEM = re.compile(
    r"(?P<methods>(os_plus-|smooth_quant-|channel_shift-)?llm_fp4|fpq_baseline|minmax_fp|minmax_int)"
    r"-w(?P<weights>\d)a(?P<activations>\d)(e(?P<embeddings>\d))?"
)
ALL = sorted(recipe_files())
MINIMAL = {"name": "a test", "method": {"name": "os_plus"}, "weights": {"bits": 6}, "activations": {"bits": 6}}


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}), "utf-8")
    return path


def test_every_setting_is_there():
    names = set(recipe_files())
    assert {"os_plus-w8a8", "os_plus-w6a6", "os_plus-w5a5-token", "os_plus-w4a4-token-llama"} <= names
    assert {"os_plus-w4a4-group1024", "os_plus-w6a6-clip985", "os_plus-w8a8-clip_search"} <= names
    for setting in ("w8a8", "w6a6", "w5a5-token", "w4a4-token", "w4a4-group1024"):
        assert {f"{method}-{setting}" for method in ("os_plus", "rtn", "smooth_quant", "gamma_migration")} <= names
    of_os_plus = {name for name in names if not FLOAT_STEM.fullmatch(name)}
    plain = {name for name in of_os_plus if not name.endswith("-attention")}
    assert of_os_plus == plain | {f"{name}-attention" for name in plain}
    composed = {f"{first}-llm_fp4-w4a4" for first in ("os_plus", "smooth_quant", "channel_shift")}
    settings = ("w4a4", "w4a4e4", "w4a8", "w4a8e4", "w6a6e6", "w8a8e8")
    alone = {f"{m}-{setting}" for m in ("llm_fp4", "fpq_baseline", "minmax_fp", "minmax_int") for setting in settings}
    assert names - of_os_plus == composed | alone


@pytest.mark.parametrize("name", [name for name in ALL if FLOAT_STEM.fullmatch(name)])
def test_name_and_content_agree_for_llm_fp4(name):
    recipe, said = read_recipe(name), FLOAT_STEM.fullmatch(name)
    assert said and recipe_files()[name].read_text("utf-8").startswith("# ")
    methods = [m.name for m in recipe.method]
    assert methods == (["none"] if said["methods"].startswith("minmax") else said["methods"].split("-"))
    found = {"weights": recipe.weights, "activations": recipe.activations, "embeddings": recipe.embeddings}
    assert {k: n and str(n.bits) for k, n in found.items()} == {k: said[k] for k in found}
    for numbers in filter(None, found.values()):
        assert numbers.format == ("int" if said["methods"] == "minmax_int" else "float")
        assert numbers.exponent_bits == ({4: 2, 6: 3, 8: 4}[numbers.bits] if said["methods"] == "minmax_fp" else None)
        assert said["methods"][:3] != "min" or numbers.observer.name == "min_max"
    assert recipe.weights and recipe.weights.granularity == "channel"
    assert recipe.activations and recipe.activations.granularity == "tensor" and recipe.attention is None
    assert ("embed*" in recipe.skip) == (recipe.embeddings is None) and "lm_head/*" in recipe.skip


@pytest.mark.parametrize("name", [name for name in ALL if not FLOAT_STEM.fullmatch(name)])
def test_name_and_content_agree(name):
    recipe, path = read_recipe(name), recipe_files()[name]
    assert recipe == read_recipe(path) == read_recipe(str(path))
    assert path.read_text("utf-8").startswith("# "), "the first line says which setting this is"
    said = STEM.fullmatch(name)
    assert said, name
    (method,) = recipe.method
    assert method.name == {"rtn": "none"}.get(said["method"], said["method"])
    assert recipe.weights is not None and recipe.activations is not None
    assert recipe.weights.bits == int(said["weights"]) and recipe.activations.bits == int(said["activations"])
    kind = "token" if said["token"] else "group" if said["group"] else "tensor"
    assert recipe.activations.granularity == kind
    assert recipe.activations.group_size == recipe.weights.group_size == (int(said["group"]) if said["group"] else None)
    int8 = recipe.weights.bits == 8
    assert recipe.weights.granularity == ("group" if said["group"] else "tensor" if int8 else "channel")
    assert recipe.weights.symmetric == recipe.activations.symmetric == int8
    clip = {None: None, "_search": "search", "985": 0.985, "995": 0.995}[said["clip"]]
    observer = recipe.activations.observer
    assert (observer.percentile if isinstance(observer, TokenQuantile) else None) == clip
    if isinstance(method, OSPlus):
        found = method.shift, method.lower, method.groups
        assert found == ((False, 0.1, "foldable") if said["llama"] else (True, 1.0, "norms"))
    assert ("*/down/*" in recipe.skip) == bool(said["no_down"])
    per_token = Activations(bits=recipe.activations.bits, symmetric=int8, granularity="token")
    assert recipe.attention == ((per_token if said["group"] else recipe.activations) if said["attention"] else None)


def test_no_two_recipes_say_the_same():
    contents = {name: read_recipe(name).model_dump_json() for name in recipe_files()}
    assert len(set(contents.values())) == len(contents)
    assert len({read_recipe(name).name for name in contents}) == len(contents)


def test_defaults(tmp_path):
    recipe = read_recipe(written(tmp_path))
    assert recipe.attention is None and recipe.skip == ["lm_head/*", "embed*"]
    assert recipe.activations is not None and recipe.activations.observer.name == "average_min_max"
    assert recipe.weights is not None and recipe.weights.observer.name == "min_max"
    assert recipe.embeddings is None and recipe.weights.format == "int" and recipe.weights.exponent_bits is None
    assert RecipeFile.model_validate(recipe.model_dump(exclude_unset=True)) == recipe
    only_transform = read_recipe(written(tmp_path, weights=None, activations=None))
    assert only_transform.weights is None and only_transform.activations is None


def test_a_single_method_is_a_list_of_one(tmp_path):
    assert read_recipe(written(tmp_path, method=[{"name": "os_plus"}])) == read_recipe(written(tmp_path))
    two = read_recipe(written(tmp_path, method=[{"name": "channel_shift"}, {"name": "smooth_quant"}]))
    assert [m.name for m in two.method] == ["channel_shift", "smooth_quant"]


def test_float_recipes(tmp_path):
    numbers = {"format": "float", "bits": 4}
    changes = {"weights": numbers | {"exponent_bits": 3}, "activations": numbers, "embeddings": numbers}
    path = written(tmp_path, method={"name": "llm_fp4"}, skip=["lm_head/*"], **changes)
    recipe, (method,) = read_recipe(path), read_recipe(path).method
    assert recipe.embeddings is not None and recipe.embeddings.granularity == "row"
    assert RecipeFile.model_validate(recipe.model_dump(exclude_unset=True)) == recipe
    assert isinstance(method, FloatMethod) and (method.rounds, method.candidates, method.search) == (3, 100, "fast")


TOKEN_QUANTILE = {"bits": 8, "observer": {"name": "token_quantile", "percentile": "serch"}}
DYNAMIC = {"bits": 8, "granularity": "token", "observer": {"name": "min_max"}}
FLOAT, LLM_FP4 = {"format": "float", "bits": 4}, {"name": "llm_fp4"}
FLOATS = {"method": LLM_FP4, "weights": FLOAT, "activations": FLOAT}
ASYMMETRIC_LSQ = {"bits": 8, "symmetric": False, "observer": {"name": "lsq_plus"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weigths": {}}, r"weigths: unknown key; did you mean 'weights'"),
        ({"method": {"name": "os_plus", "lowr": 1.0}}, r"method\.lowr: unknown key; did you mean 'lower'"),
        ({"method": {"name": "os_pluss"}}, r"method\.name: unknown; did you mean 'os_plus'.*gamma_migration"),
        ({"method": {"alpha": 0.5}}, r"method\.name: this key is missing; one of .*smooth_quant"),
        ({"method": "os_plus"}, r"method: should be a mapping with keys of .*'lower'.*found 'os_plus'"),
        (
            {"method": {"name": "smooth_quant", "alpha": 2}},
            r"method\.alpha: should be less than or equal to 1, found 2",
        ),
        ({"method": {"name": "os_plus", "lower": "1e-3"}}, r"method\.lower: should be a valid number, found '1e-3'"),
        ({"method": {"name": "os_plus", "candidates": 0}}, r"method\.candidates: should be greater than 0, found 0"),
        ({"method": {"name": "os_plus", "batches": 0}}, r"method\.batches: should be greater than 0, found 0"),
        ({"method": {"name": "os_plus", "batches": "all"}}, r"method\.batches: should be a valid integer, found 'all'"),
        ({"weights": {}}, r"weights\.bits: this key is missing"),
        ({"weights": {"bits": "8"}}, r"weights\.bits: should be a valid integer, found '8'"),
        ({"weights": {"bits": True}}, r"weights\.bits: should be a valid integer, found True"),
        ({"weights": {"bits": 16}}, r"weights\.bits: should be less than or equal to 8, found 16"),
        (
            {"weights": {"bits": 8, "granularity": "token"}},
            r"weights\.granularity: should be 'tensor', 'channel' or 'group'",
        ),
        ({"weights": {"bits": 8, "granularity": "group"}}, r"weights: .*group_size.*belong together"),
        ({"activations": {"bits": 8, "group_size": 128}}, r"activations: .*group_size.*belong together"),
        ({"weights": ASYMMETRIC_LSQ}, r"weights: the observer lsq_plus is for symmetric weights"),
        ({"weights": TOKEN_QUANTILE}, r"weights\.observer\.name: unknown; did you mean '.*_quantile'"),
        ({"activations": DYNAMIC}, r"activations: `granularity: token` takes .* leave `observer` out"),
        ({"activations": TOKEN_QUANTILE}, r"activations\.observer\.percentile: should be 'search', found 'serch'"),
        ({"attention": {"bits": 8, "bit": 8}}, r"attention\.bit: unknown key; did you mean 'bits'"),
        ({"skip": "lm_head"}, r"skip: should be a valid list, found 'lm_head'"),
        ({"skip": ["a", 1]}, r"skip\.1: should be a valid string, found 1"),
        ({"calibration": {"lenght": 3}}, r"calibration\.lenght: unknown key; did you mean 'length'"),
        ({"calibration": {"propagate": "float"}}, r"calibration\.propagate: should be 'quantized' or 'full_precision'"),
        ({"name": None}, r"name: should be a valid string, found None"),
        ({"method": []}, r"method: .*at least 1 item"),
        ({"method": [{"name": "os_plus"}, {"name": "llm_fp5"}]}, r"method\.1\.name: unknown; did you mean 'llm_fp4'"),
        ({"method": [{"name": "os_plus"}, {"rounds": 3}]}, r"method\.1\.name: this key is missing; one of"),
        ({"method": [{"name": "os_plus"}, "llm_fp4"]}, r"method\.1: should be a mapping .*found 'llm_fp4'"),
        ({"method": [{"name": "none"}, LLM_FP4 | {"round": 3}]}, r"method\.1\.round: unknown key; .* 'rounds'"),
        ({"method": LLM_FP4 | {"rounds": 0}}, r"method\.rounds: should be greater than 0, found 0"),
        ({"method": LLM_FP4 | {"clips": "lin"}}, r"method\.clips: should be 'log' or 'linear', found 'lin'"),
        ({"method": LLM_FP4 | {"lowest": 1.5}}, r"method: clip ratios from 1\.5 to 2\.0 do not contain 1"),
        ({"method": LLM_FP4 | {"clips": "linear", "highest": 0.9}}, r"method: clip ratios from 0\.2 to 0\.9"),
        (
            FLOATS | {"method": [LLM_FP4, {"name": "os_plus"}]},
            r"method: llm_fp4 quantizes.*put it last; found llm_fp4, os_plus",
        ),
        (FLOATS | {"weights": {"bits": 4}}, r"weights: llm_fp4 searches floats: add `format: float`"),
        (FLOATS | {"attention": {"bits": 8}}, r"attention: llm_fp4 searches floats"),
        (
            FLOATS | {"activations": FLOAT | {"observer": {"name": "mse"}}},
            r"activations: llm_fp4 .* leave `observer` out",
        ),
        (
            FLOATS | {"activations": FLOAT | {"granularity": "token"}},
            r"activations: .*granularity: tensor`, found 'token'",
        ),
        ({"weights": {"format": "flaot", "bits": 4}}, r"weights\.format: should be 'int' or 'float', found 'flaot'"),
        ({"weights": FLOAT | {"symmetric": True}}, r"weights: floats are always symmetric: leave `symmetric` out"),
        ({"weights": FLOAT | {"bits": 2}}, r"weights: floats have 3 to 8 bits, found `bits: 2`"),
        ({"weights": FLOAT | {"exponent_bits": 4}}, r"weights: .* at most 3 `exponent_bits`.* found 4"),
        ({"weights": {"bits": 4, "exponent_bits": 2}}, r"weights: `exponent_bits` is for floats.*format: float"),
        ({"weights": FLOAT | {"exponent_bit": 2}}, r"weights\.exponent_bit: unknown key; did you mean 'exponent_bits'"),
        ({"embeddings": FLOAT}, r"skip: 'embed\*'.*`skip: \[\"lm_head/\*\"\]`"),
        (
            {"embeddings": FLOAT | {"granularity": "channel"}},
            r"embeddings\.granularity: should be 'row', found 'channel'",
        ),
    ],
)
def test_errors_name_file_key_and_remedy(tmp_path, changes, expected):
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}: {expected}"):
        read_recipe(path)


def test_all_faults_are_told_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        read_recipe(written(tmp_path, weigths={}, calibration={"lenght": 3}))
    assert "weigths" in str(error.value) and "calibration.lenght" in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: 1\nb: [\n", "not valid YAML.*line 3"),
        (b"name: a\nname: b\n", "the key 'name' is given twice.*line 1"),
        (b"weights: {bits: 8, bits: 6}\n", "the key 'bits' is given twice"),
        (b"\xff\xfe\xfa", "not valid YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"", "should be a mapping"),
        (b"- 1\n", "should be a mapping"),
    ],
)
def test_bad_yaml(tmp_path, content, expected):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*{expected}"):
        read_recipe(path)


def test_anchors_and_merges_are_plain_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: a test\nmethod: {name: none}\nweights: null\n"
        "activations: &a {bits: 8, granularity: token}\nattention: {<<: *a, bits: 6}\n"
    )
    recipe = read_recipe(path)
    assert recipe.attention is not None and (recipe.attention.bits, recipe.attention.granularity) == (6, "token")


def test_unknown_name_suggests_near_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"os_plus-w8a9: no such file.*os_plus-w8a8"):
        read_recipe("os_plus-w8a9")
    with pytest.raises(FileNotFoundError, match="missing"):
        read_recipe(tmp_path / "missing.yaml")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_recipe(tmp_path)
