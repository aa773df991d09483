"""Records of models that were saved as version 1: all grids in float32, and none says which numbers its scales are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxq.pack import held_by_bytes
from jaxq.qtensor import Grid, Packed
from jaxq.storage.described import RECORDS


def _grid(**parts: Any) -> Grid:
    """A block format's scales are told from their values: both kinds are exact where they are numbers of both."""
    grid = Grid(**parts)
    if grid.outer is None:
        return grid
    kinds = (replace(grid, scales="power_of_two"), replace(grid, scales="e4m3"))
    return next((kind for kind in kinds if held_by_bytes(kind)[0]), grid)


def _packed(grid: Grid, **parts: Any) -> Packed:
    if not all(held_by_bytes(grid)):
        raise ValueError(
            "zero points of a packed weight are no whole numbers from 0 to 255: round and clip, pack again"
        )
    return Packed(stored=grid.to_bytes(), **parts)


RECORDS_1 = {**RECORDS, "Grid": _grid, "Packed": _packed}
