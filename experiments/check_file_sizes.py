"""Keeps the package's files short: fails above 400 lines, lists those above 200. `make lint` runs it."""

from pathlib import Path

LONG, TOO_LONG = 200, 400

root = Path(__file__).resolve().parents[1]
sizes = {path: len(path.read_text("utf-8").splitlines()) for path in sorted((root / "jaxq").rglob("*.py"))}
for path, lines in sizes.items():
    if lines > LONG:
        print(f"{path.relative_to(root)}: {lines} lines")
too_long = [str(path.relative_to(root)) for path, lines in sizes.items() if lines > TOO_LONG]
if too_long:
    raise SystemExit(f"above {TOO_LONG} lines, split by what the parts are about: {', '.join(too_long)}")
print(f"{len(sizes)} files, {sum(sizes.values())} lines, none above {TOO_LONG}")
