"""PTX as a list of instructions, for `ptx`."""

from __future__ import annotations

import re
from collections.abc import Callable


def parsed(ptx: str) -> tuple[list[tuple[str | None, str, list[str]]], dict[str, int]]:
    """(predicate, instruction, operands), and where the labels are. Names inside braces are local."""
    program: list[tuple[str | None, str, list[str]]] = []
    labels: dict[str, int] = {}
    text = ptx[ptx.index("$L__func_begin0:") : ptx.index("$L__func_end0:")]
    text = "\n".join(line.split("//")[0] for line in text.splitlines() if not line.strip().startswith(".loc"))
    depth, count = 0, 0

    def local(name: str) -> str:
        return f"{name}@{count}" if depth and not name.startswith(("%", "$")) else name

    for line in text.splitlines():
        line = line.strip()
        if line.startswith("{"):
            depth, count, line = depth + 1, count + 1, line[1:]
        closes = line.endswith("}") and not line.endswith("};")
        for part in filter(None, map(str.strip, line[: -1 if closes else None].split(";"))):
            if label := re.fullmatch(r"([\w$]+):", part):
                labels[local(label[1])] = len(program)
            elif not part.startswith((".reg", ".shared")):
                program.append(instruction(part, local))
        depth -= closes
    return program, labels


def instruction(text: str, local: Callable[[str], str]) -> tuple[str | None, str, list[str]]:
    found = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    assert found, text
    predicate, name, operands = found.groups()
    pattern = r"[%\w$]+" if name.startswith("cp.async.bulk.tensor") else r"\[[^\]]*\]|\{[^}]*\}|[^,\s]+"
    split = [local(op) if re.fullmatch(r"[A-Zp]\w*", op) else op for op in re.findall(pattern, operands)]
    return predicate and local(predicate), name, split
