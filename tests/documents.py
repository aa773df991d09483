"""The examples of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(document: str, language: str) -> list[str]:
    """The blocks of code in a language, after as many empty lines as stand before each: errors name its own lines."""
    text = (ROOT / document).read_text("utf-8")
    found = re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in found]
