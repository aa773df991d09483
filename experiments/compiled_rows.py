"""How the tables of what compilers make of kernels are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable


def show(rows: Iterable[dict], as_json: bool) -> None:
    """Each row as soon as it is there: a line of JSON, or one of a Markdown table."""
    for number, found in enumerate(rows):
        if as_json:
            print(json.dumps(found), flush=True)
            continue
        if number == 0:
            print("|", " | ".join(found), "|\n|" + "---|" * len(found))
        print("|", " | ".join(map(str, found.values())), "|", flush=True)
