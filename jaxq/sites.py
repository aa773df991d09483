"""`sites`: what in a function can be quantized, what belongs together, where transforms can go, what is left out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxq.program.fold import Edit
from jaxq.program.groups import GroupPlan, Layout
from jaxq.program.trace import Program, trace
from jaxq.qtensor import Quantized

WIDTH = 150  # of str(sites(...))


@dataclass(frozen=True)
class SiteRow:
    """One contraction or look-up, or a parameter that none reads.

    Attributes:
      path: the weight's path in the parameter tree; for two activations the nearest common path plus `dot0`, and which
        operand it is (`:lhs`, `:rhs`), for each is quantized by itself.
      kind: "linear", "conv", "ragged", "attention" (two activations), "lookup"; of what cannot be quantized, the
        primitive; "parameter" for one that no contraction reads.
      shapes: of the activation, of the weight (the other operand) and of the output, at the sample inputs' shapes.
      group: the name that its group has in `calibrate(...).inputs`; the same activation feeds all sites of a group.
      bias: the parameter that takes the shift (z W), if the site has one of its own.
      scale_into, shift_into: the parameters that make the group's activation and can take a per-channel scale or shift.
      scale_reason, shift_reason: where there are none, why the transform would stay at run time.
      left_out: why it cannot be quantized; empty where it can.
    """

    path: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    group: str = ""
    bias: str = ""
    scale_into: tuple[str, ...] = ()
    shift_into: tuple[str, ...] = ()
    scale_reason: str = ""
    shift_reason: str = ""
    left_out: str = ""


@dataclass(frozen=True)
class Sites:
    """The coverage report of a function; iterates over its `rows`, prints as a table in which equal layers are one."""

    rows: tuple[SiteRow, ...]

    def __iter__(self) -> Iterator[SiteRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it: `sites`, and what is `left_out`."""
        rows = [asdict(row) for row in self.rows]
        return {"sites": [r for r in rows if not r["left_out"]], "left_out": [r for r in rows if r["left_out"]]}

    def __rich__(self) -> Table:
        return _table(self.rows)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]


def sites(forward: Callable, params: Any, *inputs: Any) -> Sites:
    """The coverage report: every place where low-bit numbers could meet in `forward(params, *inputs)`.

    Nothing is computed and no parameter is read: shapes are enough (`jax.ShapeDtypeStruct` for any of the arguments).
    With what `calibrate` or `pack` returns as `params`, it is the report of the function that was quantized.

    Raises whatever `forward` raises when it is traced on such shapes.
    """
    program = trace(forward, params.params if isinstance(params, Quantized) else params, *inputs)
    layouts = program.layout.all()
    rows = [row for layout in layouts for group in layout.groups for row in _rows_of(group)]
    skipped = [SiteRow(s.path, s.kind, s.shapes, left_out=s.reason) for layout in layouts for s in layout.skipped]
    known = {path for row in rows + skipped for path in (row.path, row.bias)}
    return Sites((*rows, *skipped, *_unread(program, layouts, known)))


def _rows_of(group: GroupPlan) -> Iterator[SiteRow]:
    fold = group.fold
    for member in group.members:
        site = member.site
        x, w = site.operands.x, site.operands.w
        path = group.name if group.kind == "attention" else site.path
        shapes = (site.shapes[x], site.shapes[w], site.shapes[2]) if group.kind != "lookup" else site.shapes
        bias = member.bias.path if member.bias else ""
        into = _paths(fold.scale), _paths(fold.shift), fold.scale_reason, fold.shift_reason
        yield SiteRow(path, group.kind, shapes, group.name, bias, *into)


def _paths(edits: tuple[Edit, ...] | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(edit.path for edit in edits or ()))


def _unread(program: Program, layouts: list[Layout], known: set[str]) -> Iterator[SiteRow]:
    """Matrices that no site reads: used in another way, or not at all. They stay as they are."""
    read = {path.partition("#")[0] for path in known}
    shapes = {path: shape for layout in layouts for path, shape in layout.graph.leaf_shapes.items()}
    for path in program.paths:
        if path not in read and len(shapes.get(path, ())) > 1 and sum(n > 1 for n in shapes[path]) > 1:
            yield SiteRow(path, "parameter", (shapes[path],), left_out="no contraction or look-up reads it as it is")


# The table ------------------------------------------------------------------------------------------------------------


def _table(rows: tuple[SiteRow, ...]) -> Table:
    result = Table(title=_title(rows), title_justify="left", padding=(0, 1, 0, 0))
    result.add_column("site", overflow="fold")
    result.add_column("times", justify="right")
    result.add_column("kind")
    result.add_column("reads x weight", overflow="fold")
    result.add_column("a scale goes into")
    result.add_column("a shift goes into")
    before = None
    for row, times in _merged(rows):
        if row.left_out:
            into = f"left out: {row.left_out}", ""
        else:
            same = row.kind == "linear" and (row.group, row.kind) == before
            into = ("as above", "as above") if same else _targets(row)
        result.add_row(row.path, str(times), row.kind, _sizes(row), *into)
        before = row.group, row.kind
    return result


def _title(rows: tuple[SiteRow, ...]) -> str:
    fit = [row for row in rows if not row.left_out]
    groups = {(row.group, row.kind) for row in fit}
    return f"{len(fit)} sites in {len(groups)} groups, {len(rows) - len(fit)} left out"


def _merged(rows: tuple[SiteRow, ...]) -> list[tuple[SiteRow, int]]:
    """Rows that differ by one number in their paths (a transformer's layers), as one row with `*` for the number."""
    counts: dict[SiteRow, int] = {}
    for row in rows:
        starred = _starred(row)
        counts[starred] = counts.get(starred, 0) + 1
    once = {_starred(row): row for row in rows}
    return [(row if n > 1 else once[row], n) for row, n in counts.items()]


def _starred(row: SiteRow) -> SiteRow:
    def star(text: str) -> str:
        return re.sub(r"(^|/)\d+(?=/)", r"\1*", text)

    texts = {name: star(value) for name, value in vars(row).items() if isinstance(value, str)}
    folds = tuple(map(star, row.scale_into)), tuple(map(star, row.shift_into))
    return SiteRow(**{**vars(row), **texts, "scale_into": folds[0], "shift_into": folds[1]})


def _targets(row: SiteRow) -> tuple[str, str]:
    if row.kind in ("attention", "lookup"):
        return "-", "-"
    scale = _braced(row.scale_into) or f"run time: {row.scale_reason}"
    shift = _braced(row.shift_into) or f"run time: {row.shift_reason}"
    return scale, "as the scale" if scale == shift else shift


def _braced(paths: tuple[str, ...]) -> str:
    """`norm/scale` and `norm/bias` as `norm/{scale,bias}`."""
    heads = {path.rpartition("/")[0] for path in paths}
    if len(paths) < 2 or len(heads) > 1:
        return ", ".join(paths)
    return f"{heads.pop()}/{{{','.join(path.rpartition('/')[2] for path in paths)}}}"


def _sizes(row: SiteRow) -> str:
    return " x ".join(str(list(shape)).replace(" ", "") for shape in row.shapes[:2])
