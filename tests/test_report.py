import io

import pytest
from rich.console import Console

from jaxq.report import progress, table


def text(thing: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table():
    shown = text(table("results", ["model", "perplexity"], [("full precision", 12.34567), ("W4A4", None)]))
    assert "results" in shown and "12.35" in shown and "W4A4" in shown and " -" in shown
    assert table("", ["a", "b"], [("x", 1)]).columns[1].justify == "right"


def test_table_row_of_another_length():
    with pytest.raises(ValueError, match="'results'.*does not fit"):
        table("results", ["a", "b"], [(1, 2, 3)])


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_yields_everything_and_says_so(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    assert list(progress(range(5), "calibrating", console=console)) == list(range(5))
    assert list(progress((k for k in "ab"), "of unknown length", console=console)) == ["a", "b"]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "calibrating" in shown and "5" in shown and "of unknown length" in shown
    if not terminal:
        assert shown.splitlines()[0] == "calibrating: 5 ..." and shown.splitlines()[1].startswith(
            "calibrating: 5 done in"
        )
