"""The Python of docs/own_model.md runs as it stands, from its beginning to its end."""

import re
from pathlib import Path

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "own_model.md"


def test_the_guide_runs(capsys):
    names: dict = {"__name__": "guide"}
    text = GUIDE.read_text("utf-8")
    for code in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        before = "\n" * text[: code.start(1)].count("\n")  # so that errors name the guide's own lines
        exec(compile(before + code[1], str(GUIDE), "exec"), names)
    assert "up/kernel" in capsys.readouterr().out
