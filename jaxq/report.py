"""What the command line prints: tables and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")


def console(width: int | None = None) -> Console:
    """Standard output; `width` is what is printed where that is not a terminal."""
    found = Console()
    return found if width is None or found.is_terminal else Console(width=width)


def say(text: str) -> None:
    """A line of plain text; whatever it names is printed as it is, and not broken."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


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


@contextmanager
def counting(
    description: str, total: int | None = None, console: Console | None = None
) -> Iterator[Callable[[], None]]:
    """A progress bar for work that calls back: gives a function to call after each item. Off a terminal it is a line
    at the start and one at the end."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield from _lines(description, total, console)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def progress(
    iterable: Iterable[T], description: str, total: int | None = None, console: Console | None = None
) -> Iterator[T]:
    """Yields from `iterable` under a progress bar; off a terminal, a line at the start and one at the end."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with counting(description, total, console) as advance:
        for item in iterable:
            yield item
            advance()


def _lines(description: str, total: int | None, console: Console) -> Iterator[Callable[[], None]]:
    start, done = monotonic(), []
    console.print(f"{description} ..." if total is None else f"{description}: {total} ...", markup=False)
    yield lambda: done.append(None)
    console.print(f"{description}: {len(done)} done in {monotonic() - start:.1f} s", markup=False)
