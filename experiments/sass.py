"""What can be read off the machine code (SASS) of a Hopper kernel that multiplies by warpgroups."""

from __future__ import annotations

import re

PRODUCT = re.compile(r"\b[HI]GMMA\.64x(\d+)x\d+\S*\s+R(\d+), R(\d+),")
NO_NUMBERS = "ST|BRA|SYNCS|BAR|WARP|EXIT|CCTL|FENCE|R2UR|ISETP|UTMA|NANOSLEEP|DEPBAR|PLOP3|NOP|U"  # write no registers


def multiplying_loop(sass: str) -> list[str]:
    """The instructions of the innermost loop with products."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(\S.*)$", line):
            instructions.append(found[1])
            target = re.match(r"BRA.*?(\.L_x_\d+)", found[1])
            body = instructions[labels[target[1]] :] if target and target[1] in labels else []
            if any(map(PRODUCT.search, body)):
                loops.append(body)
    return min(loops, key=len)


def overwritten(loop: list[str]) -> list[str]:
    """The instructions that write registers which a product under way reads or adds to, in two turns of a loop: ptxas
    does not keep them from doing so where the product was begun a turn before."""
    groups: list[list[set[int]]] = [[]]
    found = []
    for text in [*loop, *loop]:
        if product := PRODUCT.search(text):
            rows, sums, left = map(int, product.groups())
            groups[-1].append({*range(left, left + 4), *range(sums, sums + rows // 2)})
            groups += [[]] if "gsb0" in text else []
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", text):
            groups = groups[len(groups) - 1 - int(wait[1]) :]
        elif (to := re.match(r"(\S+)\s+(?:P\d, )?R(\d+)\b", text)) and not re.match(NO_NUMBERS, text):
            wide = 4 if ".128" in to[1] else 2 if ".64" in to[1] or "WIDE" in to[1] else 1
            written = {*range(int(to[2]), int(to[2]) + wide)}
            found += [text for group in groups for used in group if used & written]
    return found
