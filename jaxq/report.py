"""What the command line prints: tables and progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")


def cell(value: object) -> str:
    """A table cell's text: floats with four significant digits, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table for `Console().print`: columns that hold only numbers are right-aligned.

    Raises ValueError where a row has not as many cells as there are columns.
    """
    rows = [tuple(row) for row in rows]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table {title!r}: row {row} does not fit the columns {columns}")
    result = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[k], int | float | None) for row in rows)
        result.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        result.add_row(*map(cell, row))
    return result


def progress(
    iterable: Iterable[T], description: str, total: int | None = None, console: Console | None = None
) -> Iterator[T]:
    """Yields from `iterable` under a progress bar; off a terminal, a line at the start and one at the end."""
    console = console or Console(stderr=True)
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not console.is_terminal:
        yield from _lines(iterable, description, total, console)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        yield from bar.track(iterable, total=total, description=description)


def _lines(iterable: Iterable[T], description: str, total: int | None, console: Console) -> Iterator[T]:
    start, count = monotonic(), 0
    console.print(f"{description} ..." if total is None else f"{description}: {total} ...", markup=False)
    for count, item in enumerate(iterable, 1):  # noqa: B007
        yield item
    console.print(f"{description}: {count} done in {monotonic() - start:.1f} s", markup=False)
