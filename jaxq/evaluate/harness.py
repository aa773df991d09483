"""lm-evaluation-harness on a jaxq model: any of its tasks, and tasks from local files.

Needs the extra `eval` (`pip install "jaxq[eval]"`); nothing else of jaxq imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxq.evaluate.likelihood import likelihoods, next_tokens


class HarnessModel(TemplateLM):
    """A language model as lm-evaluation-harness asks for it.

    Args:
      forward: `forward(params, tokens [B, T]) -> logits [B, T, V]`.
      tokenizer: a transformers tokenizer.
      context: how many tokens the model reads.
    """

    def __init__(
        self,
        forward: Callable[..., jax.Array],
        params: Any,
        tokenizer: Any,
        context: int,
        batch_size: int = 8,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.forward, self.params, self.tokenizer = forward, params, tokenizer
        self.context, self.batch_size, self.progress = context, batch_size, progress

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # as the tokenizer does, but no second BOS
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return likelihoods(self.forward, self.params, pairs, self.context, self.batch_size, self.progress)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        del disable_tqdm
        windows = []
        for i, request in enumerate(requests):
            cut = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.context, 1)
            windows += [(("", str(i)), *make_disjoint_window(window)) for window in cut]
        totals = [0.0] * len(requests)
        for ((_, i), *_), (likelihood, _) in zip(windows, self._loglikelihood_tokens(windows)):
            totals[int(i)] += likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        del disable_tqdm
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("num_beams", 1) > 1:
            raise ValueError(f"{settings}: only greedy generation is offered")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = min(int(settings.get("max_gen_toks", 256)), self.context - 1)
        tokens = self.tok_encode(context)[-(self.context - most) :]
        found: list[int] = []
        while len(found) < most:
            found += next_tokens(self.forward, self.params, [*tokens, *found], self.context, min(8, most - len(found)))
            text = self.tokenizer.decode(found[: _index(found, self.eot_token_id)], skip_special_tokens=True)
            if self.eot_token_id in found or any(stop in text for stop in stops):
                break
        else:
            text = self.tokenizer.decode(found, skip_special_tokens=True)
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def _index(found: Sequence[int], token: int) -> int:
    return found.index(token) if token in found else len(found)


def run_tasks(model: HarnessModel, tasks: Sequence[str], limit: int | None = None, shots: int = 0) -> dict[str, Any]:
    """Each task's metrics, by the task's name: `{"piqa": {"acc,none": 0.7, ...}}`.

    Args:
      tasks: names that lm-evaluation-harness knows, whose data it downloads, or paths of files (`read_task`).
      limit: only the first so many items of each task.
      shots: examples before each item; of the tasks with a name.

    Raises:
      ValueError: an unknown task, or a file that is not of a known form.
    """
    local = [read_task(name) for name in tasks if name.endswith(".jsonl")]
    named = [name for name in tasks if not name.endswith(".jsonl")]
    return _run(model, local, False, limit, 0) | _run(model, named, True, limit, shots)


def _run(model: HarnessModel, tasks: list, known: bool, limit: int | None, shots: int) -> dict[str, Any]:
    """`known`: whether the harness's own tasks are looked up; that takes it half a minute."""
    if not tasks:
        return {}
    manager = TaskManager(include_defaults=known)
    try:
        found: Any = simple_evaluate(
            model,
            tasks=tasks,
            limit=limit,
            num_fewshot=shots,
            log_samples=False,
            bootstrap_iters=0,
            task_manager=manager,
        )
    except KeyError as error:
        raise ValueError(f"lm-evaluation-harness has no such task: {error}") from error
    return found["results"]


ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
FORMS: dict[frozenset[str], dict[str, Any]] = {
    # A question and its possible answers.
    frozenset({"query", "choices", "gold"}): {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [ACCURACY, ACCURACY | {"metric": "acc_norm"}],
    },
    # Two beginnings of one sentence: how likely its end is after each (winogrande's partial evaluation).
    frozenset({"context_options", "continuation", "gold"}): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": [ACCURACY],
    },
    # The last word of a text (lambada).
    frozenset({"context", "continuation"}): {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "continuation",
        "target_delimiter": " ",
        "metric_list": [PERPLEXITY, ACCURACY],
    },
}  # fmt: skip


def read_task(path: str | Path) -> dict[str, Any]:
    """A task, as lm-evaluation-harness configures one, of a file with one JSON object a line; named like the file.

    The objects have `query`, `choices` and `gold` (a number from 0), or `context_options`, `continuation` and `gold`,
    or `context` and `continuation`. Other keys are ignored.

    Raises FileNotFoundError, or ValueError if a line is no such object or not like the first.
    """
    path = Path(path)
    rows = [(i, line) for i, line in enumerate(path.read_text("utf-8").splitlines(), start=1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: no items in it")
    items = [_object(path, *row) for row in rows]
    form = next((keys for keys in FORMS if keys <= items[0].keys()), None)
    known = "; ".join(", ".join(sorted(keys)) for keys in FORMS)
    for (number, _), item in zip(rows, items):
        if form is None or not form <= item.keys():
            raise ValueError(f"{path}: line {number} has the keys {sorted(item)}; what is read: {known}")
        if "gold" in form:
            options = item["choices"] if "choices" in form else item["context_options"]
            if type(item["gold"]) is not int or not 0 <= item["gold"] < len(options):
                raise ValueError(f"{path}: line {number} says gold is {item['gold']!r}, of {len(options)} choices")
    assert form is not None
    kept = [{key: item[key] for key in form} for item in items]
    return {"task": path.stem, "custom_dataset": _dataset(kept), "test_split": "test", **FORMS[form]}


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: line {number} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: line {number} is {type(found).__name__}, not an object")
    return found


def _dataset(items: list[dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def make(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(items)}

    return make
