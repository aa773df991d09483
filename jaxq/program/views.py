"""Re-arrangements of an array that lose nothing, and how per-channel vectors travel through them.

A weight reaches its contraction through views of its leaf (`w.T`, a reshape of heads, a cast). A per-channel vector is
kept as an array that broadcasts against the value it belongs to: full along the channel axes and 1 elsewhere. Views
carry such *spread* arrays both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Spread = Any  # a jax or numpy array that broadcasts against the value it belongs to


class ViewError(ValueError):
    """A spread array cannot follow a view, e.g. because a reshape splits the channel axis."""


@dataclass(frozen=True)
class Transpose:
    permutation: tuple[int, ...]

    def forward(self, a: Spread) -> Spread:
        return a.transpose(self.permutation)

    def backward(self, a: Spread) -> Spread:
        return a.transpose([self.permutation.index(i) for i in range(len(self.permutation))])


@dataclass(frozen=True)
class Reshape:
    before: tuple[int, ...]
    after: tuple[int, ...]

    def forward(self, a: Spread) -> Spread:
        return _reshape_spread(a, self.before, self.after)

    def backward(self, a: Spread) -> Spread:
        return _reshape_spread(a, self.after, self.before)


@dataclass(frozen=True)
class Convert:
    before: Any
    after: Any

    def forward(self, a: Spread) -> Spread:
        return a

    def backward(self, a: Spread) -> Spread:
        return a


View = Transpose | Reshape | Convert


@dataclass(frozen=True)
class Broadcast:
    """`broadcast_in_dim`, for spread arrays only: they are constant along the axes that it adds."""

    dims: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def backward(self, a: Spread) -> Spread:
        if any(n > 1 for i, n in enumerate(a.shape) if i not in self.dims):
            raise ViewError("what is broadcast along the channels has one value for several of them")
        return a.reshape([a.shape[i] for i in self.dims])


@dataclass(frozen=True)
class Columns:
    """A contraction's output axes as the weight's: axis `i` of the weight is axis `out[i]` of the output, or summed."""

    out: tuple[int | None, ...]

    def backward(self, a: Spread) -> Spread:
        if any(n > 1 for i, n in enumerate(a.shape) if i not in self.out):
            raise ViewError("the channels are not output channels of the weight")
        order = [i for i in self.out if i is not None]
        rest = [i for i in range(a.ndim) if i not in order]
        a = a.transpose(rest + order)
        return a.reshape([1 if i is None else a.shape[len(rest) + order.index(i)] for i in self.out])


@dataclass(frozen=True)
class Forward:
    """A view walked the other way."""

    view: View

    def backward(self, a: Spread) -> Spread:
        return self.view.forward(a)


@dataclass(frozen=True)
class Mixed:
    """As `Columns`, of the operand of a contraction of two activations, the equation `node`: attention's values."""

    node: int
    columns: Columns

    def backward(self, a: Spread) -> Spread:
        return self.columns.backward(a)


@dataclass(frozen=True)
class Part:
    """One output of a `split`, from `start` to `stop` of the `size` along `axis`; the others take `fill`, which
    changes nothing: a scale of 1, a shift of 0."""

    axis: int
    start: int
    stop: int
    size: int
    fill: float

    def backward(self, a: Spread) -> Spread:
        numpy = np if isinstance(a, np.ndarray) else jnp
        full = [self.stop - self.start if i == self.axis else n for i, n in enumerate(a.shape)]
        widths = [(self.start, self.size - self.stop) if i == self.axis else (0, 0) for i in range(a.ndim)]
        return numpy.pad(numpy.broadcast_to(a, full), widths, constant_values=self.fill)


Pull = Transpose | Reshape | Convert | Broadcast | Columns | Forward | Mixed | Part


def pull(chain: tuple[Pull, ...], a: Spread) -> Spread:
    """Carries a spread array against the data flow, from a value to the parameter that its chain leads to."""
    for view in chain:
        a = view.backward(a)
    return a


def factor_groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[range, range]]:
    """Splits two shapes of equal size into the smallest runs of axes with equal products: [2, 12] and [2, 3, 4] give
    ({0}, {0}) and ({1}, {1, 2})."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while prod(before[i0:i]) != prod(after[j0:j]):
            if prod(before[i0:i]) < prod(after[j0:j]):
                i += 1
            else:
                j += 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


def _reshape_spread(a: Spread, before: tuple[int, ...], after: tuple[int, ...]) -> Spread:
    """Reshapes an array that broadcasts against `before` into one that broadcasts against `after`."""
    shape: list[int] = []
    for ours, theirs in factor_groups(before, after):
        have = [a.shape[i] for i in ours]
        if prod(have) == prod(before[i] for i in ours):
            shape += [after[j] for j in theirs]
        elif prod(have) == 1:
            shape += [1] * len(theirs)
        else:
            raise ViewError(f"a per-channel vector {a.shape} cannot follow a reshape from {before} to {after}")
    return a.reshape(shape)


def look(views: tuple[View, ...], a: jax.Array) -> jax.Array:
    """The leaf `a` as its contraction sees it."""
    for view in views:
        a = a.astype(view.after) if isinstance(view, Convert) else view.forward(a)
    return a


def first_axis(views: tuple[View, ...]) -> tuple[int, tuple[View, ...]] | None:
    """The leaf's axis that is the first one of its view, and the views of the leaf without that axis.

    None if a reshape is among the views.
    """
    axis, left = 0, []
    for view in reversed(views):
        if isinstance(view, Reshape):
            return None
        if isinstance(view, Transpose):
            out, axis = axis, view.permutation[axis]
            rest = [i - (i > axis) for o, i in enumerate(view.permutation) if o != out]
            if rest != sorted(rest):
                left.append(Transpose(tuple(rest)))
        else:
            left.append(view)
    return axis, tuple(reversed(left))


SAME_VALUE = frozenset(
    [
        "copy",
        "copy_p",
        "stop_gradient",
        "optimization_barrier",
        "sharding_constraint",
        "reshard",
        "name",
        "pvary",
        "pcast",
        "device_put",
    ]
)


def view_of(name: str, params: dict[str, Any], before: Any, after: Any) -> View | None:
    """The view that an equation is, or None; `before` and `after` are the avals of its operand and result."""
    if name == "transpose":
        return Transpose(tuple(params["permutation"]))
    if name in ("squeeze", "expand_dims") or (name == "reshape" and params["dimensions"] is None):
        return Reshape(tuple(before.shape), tuple(after.shape))
    if name == "broadcast_in_dim" and before.size == after.size:
        dims = params["broadcast_dimensions"]
        return Reshape(tuple(before.shape), tuple(after.shape)) if list(dims) == sorted(dims) else None
    if name == "convert_element_type":
        floating = jnp.issubdtype(before.dtype, jnp.floating) and jnp.issubdtype(after.dtype, jnp.floating)
        return Convert(before.dtype, after.dtype) if floating else None
    if name in SAME_VALUE:
        return Convert(before.dtype, after.dtype)
    return None
