"""The pytree leaves of a quantized model: weights that hold codes, and inputs that say how an activation is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.formats import Format, decode, encode


@dataclass(frozen=True)
class PerTensor:
    """One grid for the whole array (for activations: static, found by calibration)."""


@dataclass(frozen=True)
class PerChannel:
    """One grid for each output channel of a weight, i.e. for each index that the contraction does not sum over."""


@dataclass(frozen=True)
class PerToken:
    """One grid for each token, recomputed from its min and max at every call (dynamic); activations only."""


@dataclass(frozen=True)
class PerGroup:
    """One grid for each run of `size` channels along the contraction; dynamic for activations."""

    size: int


Granularity = PerTensor | PerChannel | PerToken | PerGroup


def pytree(cls: type) -> type:
    """A frozen dataclass as a pytree; fields with `metadata={"static": True}` are part of the tree's structure."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


def static(**kwargs: Any) -> Any:
    return field(metadata={"static": True}, **kwargs)


@pytree
class Grid:
    """Where a format's codes lie: `value = (code - zero) * scale`.

    Both arrays have the rank of what they quantize, and each of their axes divides the corresponding axis there: 1 is
    shared, n is one each, n/g is one for each run of g. `zero` is None for symmetric formats.
    """

    scale: jax.Array
    zero: jax.Array | None = None

    def over(self, shape: tuple[int, ...]) -> Grid:
        """The same grid, broadcastable against an array of `shape` (runs are repeated)."""
        return jax.tree.map(lambda a: expand_blocks(a, shape), self)


def expand_blocks(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats each axis of `a` that is neither 1 nor full, so that `a` broadcasts against `shape`."""
    if a.ndim != len(shape):
        a = a.reshape((1,) * (len(shape) - a.ndim) + a.shape)
    for axis, (have, want) in enumerate(zip(a.shape, shape)):
        if have not in (1, want):
            a = jnp.repeat(a, want // have, axis=axis, total_repeat_length=want)
    return a


@pytree
class QTensor:
    """A quantized weight: the array `(codes - zero) * scale` of `dtype`, of the shape of `codes`.

    With stacked layers every array has the same leading layer axis.
    """

    codes: jax.Array
    grid: Grid
    format: Format = static()
    dtype: Any = static(default=jnp.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def dequantize(self) -> jax.Array:
        """The array this leaf stands for."""
        grid = self.grid.over(self.shape)
        return decode(self.format, self.codes, grid.scale, grid.zero).astype(self.dtype)


def quantize_array(w: jax.Array, fmt: Format, grid: Grid) -> QTensor:
    """Encodes `w` on `grid`; `dequantize` of the result is the fake-quantized `w`, bit for bit."""
    spread = grid.over(w.shape)
    codes = encode(fmt, w.astype(jnp.float32), spread.scale, spread.zero)
    return QTensor(codes, grid, format=fmt, dtype=jnp.dtype(w.dtype))


@pytree
class InputQuant:
    """How the activation that a group of contractions reads is changed before they read it.

    x' = (x - shift) / scale, then fake-quantized. `shift` and `scale` (shape: the contracted axes) are the run-time
    residue of an equivalent transform that could not be folded into a producer, None where nothing is left to do.
    `grid` is the static grid, None where the granularity is dynamic. `bias` holds, by site path, what a consumer
    without a bias of its own must add to its output when `shift` is not None. `format` None: not quantized.
    """

    shift: jax.Array | None = None
    scale: jax.Array | None = None
    grid: Grid | None = None
    bias: dict[str, jax.Array] = field(default_factory=dict)
    format: Format | None = static(default=None)
    granularity: Granularity = static(default=PerTensor())
    sites: tuple[str, ...] = static(default=())


@pytree
class Transform:
    """A group's whole equivalent transform, wherever it was folded: x' = (x - shift) / scale, of the shape of x's
    channel axes."""

    shift: jax.Array | None = None
    scale: jax.Array | None = None


@pytree
class Quantized:
    """What `calibrate` returns: the parameters (some leaves are `QTensor`), the inputs of the groups by name, and the
    equivalent transforms already in both (`fold` applies them to the full-precision parameters)."""

    params: Any
    inputs: dict[str, InputQuant] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)


def is_qtensor(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def logical(tree: Any) -> Any:
    """The tree with every quantized leaf replaced by the array it stands for."""
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_qtensor(leaf) else leaf, tree, is_leaf=is_qtensor)
