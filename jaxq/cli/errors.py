"""Errors as one readable line."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec

import typer

P = ParamSpec("P")
debug: ContextVar[bool] = ContextVar("debug", default=False)  # set by `jaxq --debug`
EXPECTED = (ValueError, OSError)  # what the library raises for bad input, with a message that says what would work


class Failure(Exception):
    """What a command could not do, although nothing went wrong."""


def readable_errors(command: Callable[P, None]) -> Callable[P, None]:
    """The command with errors printed to stderr and exit code 1; with `jaxq --debug`, with their traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug.get():
                raise
            typer.echo(f"error: {describe(error)}", err=True)
            raise typer.Exit(1) from None

    return run


def describe(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (*EXPECTED, Failure)) and text:
        return text
    first = text.splitlines()[0] if text else "no message"
    return f"{type(error).__name__}: {first} (`jaxq --debug ...` shows where)"
