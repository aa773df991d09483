"""The Python of docs/own_model.md runs as it stands, from its beginning to its end."""

from tests.documents import blocks


def test_the_guide_runs(capsys):
    names: dict = {"__name__": "guide"}
    for code in blocks("docs/own_model.md", "python"):
        exec(compile(code, "docs/own_model.md", "exec"), names)
    assert "up/kernel" in capsys.readouterr().out
