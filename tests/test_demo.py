import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxq import demo
from jaxq.formats import Float
from jaxq.steps import nothing, os_plus, quantize
from tests.tiny import OPT, tiny_model


def run_small(monkeypatch: pytest.MonkeyPatch, out: Path) -> str:
    shown = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(demo, "console", lambda: shown)
    monkeypatch.setattr(demo, "say", shown.print)
    demo.run_demo(out, 4)
    return shown.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_and_the_plots(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load", lambda _: tiny_model(OPT))
    monkeypatch.setattr(demo, "BITS", (8,))
    monkeypatch.setattr(demo, "ACTIVATIONS", {"per tensor": demo.per_tensor})
    monkeypatch.setattr(demo, "METHODS", {"round to nearest": nothing(), "OS+": os_plus()})
    monkeypatch.setattr(demo, "PAPER", ((4, 8),))
    monkeypatch.setattr(demo, "paper_methods", lambda *_: {"MinMax FP": quantize(Float(2, 1), Float(4, 3))})
    shown = run_small(monkeypatch, tmp_path / "plots")
    words = " ".join(shown.split())
    for text in ("full precision", "W8A8 per tensor", "round to nearest", "OS+", "times the median channel"):
        assert text in words
    assert "W4A8 float" in words and "MinMax FP" in words
    for name in ("ranges.png", "search.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_whole_demo(monkeypatch, tmp_path):
    shown = run_small(monkeypatch, tmp_path)
    rows = [line for line in shown.splitlines() if any(name in line for name in ("W4A4", "W4A8", "W6A6", "W8A8"))]
    assert len(rows) == 18 + 14 and "…" not in shown, "the table fits into 80 columns"
    found = {(line.split("│")[1].strip(), line.split("│")[2].strip()): float(line.split("│")[3]) for line in rows}
    assert (
        found["W4A4 float", "LLM-FP4"] < found["W4A4 float", "MinMax FP"] < found["W4A4 per tensor", "round to nearest"]
    )


def test_the_settings_of_the_papers():
    found = [(setting.name, setting.method) for setting in demo.settings()]
    assert len(found) == len(set(found)) == 18 + 14
    assert ("W4A8 float", "MinMax INT") in found and ("W4A4 float", "OS+ shift, LLM-FP4") in found


def test_outlier_ratio():
    assert demo.outlier_ratio(np.array([-1.0, -8.0, 0.0]), np.array([2.0, 1.0, 1.0])) == 4
