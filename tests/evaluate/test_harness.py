"""lm-evaluation-harness: local task files, and the same numbers as with transformers."""

import json
import logging
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install "jaxq[eval]"')
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and its libraries

from lm_eval.api.instance import Instance  # noqa: E402

from jaxq.evaluate.harness import HarnessModel, read_task, run_tasks  # noqa: E402
from jaxq.models import load  # noqa: E402

SHARED = Path(__file__).parents[3] / "shared"
LLAMA, ZEROSHOT = SHARED / "models" / "llama-stories260k", SHARED / "data" / "zeroshot"

CHOICES = [{"query": "import o", "choices": ["s", "zzzz", "q q"], "gold": 0, "extra": 1}] * 2
PARTIAL = [{"context_options": ["class", "clqss"], "continuation": "A:", "gold": 0}]
LAST = [{"context": "for i in range", "continuation": "(n):"}]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def embedded():
    model = load("stdlib-opt")
    return HarnessModel(model.forward, model.params, model.tokenizer, 64, batch_size=4)


def written(path: Path, items: list) -> str:
    path.write_text("\n".join(json.dumps(item) for item in items), "utf-8")
    return str(path)


def test_local_files_of_all_forms(embedded, tmp_path):
    files = [written(tmp_path / f"{i}.jsonl", items) for i, items in enumerate((CHOICES, PARTIAL, LAST))]
    found = run_tasks(embedded, files)
    assert found["0"]["acc,none"] == 1 and found["0"]["sample_len"] == 2
    assert found["1"]["acc,none"] == 1
    assert found["2"]["perplexity,none"] > 1


def test_generation_stops(embedded):
    def generated(**settings):
        return embedded.generate_until([Instance("generate_until", {}, ("import sys\nimport ", settings), 0)])[0]

    long = generated(until=[], max_gen_toks=12)
    assert generated(until=long[3:5], max_gen_toks=12) == long[: long.index(long[3:5])]
    with pytest.raises(ValueError, match="greedy"):
        generated(do_sample=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no items"),
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 is list"),
        ('{"query": "a"}', r"line 1 has the keys \['query'\]"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "gold is 1, of 1 choices"),
        ('\n{"query": "a", "choices": ["b"], "gold": 0}\n{"context": "a", "continuation": "b"}', "line 3 has the keys"),
    ],
)
def test_files_that_are_no_tasks(text, match, tmp_path):
    (tmp_path / "task.jsonl").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_task(tmp_path / "task.jsonl")


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA.is_dir(), reason="the small real models are not here")
def test_as_with_transformers(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("accelerate", reason="the harness needs accelerate for transformers' models")
    from lm_eval.models.huggingface import HFLM

    model = load(str(LLAMA))
    ours = HarnessModel(model.forward, model.params, model.tokenizer, 512)
    theirs = HFLM(str(LLAMA), device="cpu", batch_size=8)
    files = [str(path) for path in sorted(ZEROSHOT.glob("*.jsonl"))]
    found, wanted = run_tasks(ours, files, limit=40), run_tasks(theirs, files, limit=40)  # type: ignore[arg-type]
    assert len(found) == 7
    for task, metrics in found.items():
        for name, value in metrics.items():
            if name.endswith(",none") and "stderr" not in name:
                assert value == pytest.approx(wanted[task][name], rel=1e-4), (task, name)
    asked = Instance("loglikelihood_rolling", {}, ("Once upon a time there was a cat. " * 60,), 0)
    assert ours.loglikelihood_rolling([asked]) == pytest.approx(theirs.loglikelihood_rolling([asked]), rel=1e-5)
    asked = Instance("generate_until", {}, ("Once upon a time", {"until": ["."], "max_gen_toks": 40}), 0)
    assert ours.generate_until([asked]) == theirs.generate_until([asked])
