"""The leaves of a quantized model: weights that hold codes, and inputs that say how an activation is quantized."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import prod
from typing import Any, TypeVar, dataclass_transform, get_args

import jax
import jax.numpy as jnp
from jax.export import register_pytree_node_serialization

from jaxq.formats import Float, Format, Int, decode, encode
from jaxq.formats.floating import power_of_two
from jaxq.formats.integer import narrow
from jaxq.formats.scales import Scales, expand_blocks, from_bytes, to_bytes
from jaxq.kernels.layout import can_split, eight_bit_codes, plane_rows, signed, unpack_codes, widths


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
    """One grid for each run of `size` channels along the contraction; dynamic for activations.

    `scales`: the numbers that a block's scale may be, as in the hardware's block formats, see `jaxq.blocks`.

    Raises:
        ValueError: `size` is not a positive integer, or `scales` none of the three.
    """

    size: int
    scales: Scales = "real"

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"PerGroup: size is {self.size!r}; it must be a positive integer")
        if self.scales not in get_args(Scales):
            raise ValueError(f"PerGroup: scales is {self.scales!r}; possible are {', '.join(get_args(Scales))}")


Granularity = PerTensor | PerChannel | PerToken | PerGroup
T = TypeVar("T")
FORMATS: tuple[type, ...] = get_args(Format)


def static(**kwargs: Any) -> Any:
    return field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(field, static))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass as a pytree, which `jax.export` can serialize too; fields with `metadata={"static": True}` are
    part of the tree's structure."""
    cls = jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))
    register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxq.{cls.__name__}",
        serialize_auxdata=lambda statics: json.dumps([_described(value) for value in statics]).encode(),
        deserialize_auxdata=lambda text: tuple(_restored(value) for value in json.loads(text)),
        from_children=lambda aux_data, children: _with_children(cls, aux_data, children),
    )
    return cls


def _described(value: Any) -> Any:
    """A static field as JSON: a format or granularity by its name and fields; a dtype; tuple, integer, string, None."""
    if isinstance(value, get_args(Granularity) + FORMATS):
        return {"type": type(value).__name__, "fields": asdict(value)}
    if value is None or isinstance(value, tuple | int | str):
        return value
    return {"dtype": jnp.dtype(value).name}


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if value is None or isinstance(value, int | str):
        return value
    if "dtype" in value:
        return jnp.dtype(value["dtype"])
    known = {cls.__name__: cls for cls in get_args(Granularity) + FORMATS}
    return known[value["type"]](**value["fields"])


def _with_children(cls: type, statics: Any, children: Sequence[Any]) -> Any:
    names = [f.name for f in fields(cls) if not f.metadata.get("static")]
    fixed = [f.name for f in fields(cls) if f.metadata.get("static")]
    return cls(**dict(zip(names, children)), **dict(zip(fixed, statics)))


@pytree
class Grid:
    """Where a format's codes lie: `value = (code - zero) * scale`, or `element(code) * scale` for floats.

    All arrays have the rank of what they quantize, and each of their axes divides the corresponding axis there: 1 is
    shared, n is one each, n/g is one for each run of g. `zero` is None for symmetric formats; `mantissa` (int8) holds
    the mantissa bits of an `AnyFloat`, None for its usual split and for other formats. The hardware's block formats
    have two factors, `scale * outer` in place of `scale`: what is stored for each block, and for the whole tensor;
    `scales` is what `PerGroup.scales` says of the former.
    """

    scale: jax.Array
    zero: jax.Array | None = None
    mantissa: jax.Array | None = None
    outer: jax.Array | None = None
    scales: Scales = static(default="real")

    @property
    def factor(self) -> jax.Array:
        """What an element is multiplied by, one number for each run."""
        return self.scale if self.outer is None else self.scale * self.outer

    def over(self, shape: tuple[int, ...]) -> Grid:
        """The same grid for a format's functions: the two factors multiplied, runs repeated, so that it broadcasts
        against an array of `shape`."""
        return jax.tree.map(lambda a: expand_blocks(a, shape), Grid(self.factor, self.zero, self.mantissa))

    def to_bytes(self) -> Grid:
        """The same grid with a byte (uint8) for each zero point, and for each scale unless those are real numbers.
        Exact for whole zero points from 0 to 255 and scales that are what `scales` says."""
        zero = None if self.zero is None else narrow(self.zero.astype(jnp.float32), jnp.uint8)
        return replace(self, scale=to_bytes(self.scales, self.scale), zero=zero)

    def from_bytes(self) -> Grid:
        """The float32 grid of which `to_bytes` made this one; NaN for a scale's byte that stands for no number."""
        zero = None if self.zero is None else self.zero.astype(jnp.float32)
        return replace(self, scale=from_bytes(self.scales, self.scale), zero=zero)


@pytree
class QTensor:
    """A quantized weight: the array `decode(codes) * 2**exponents` of `dtype`, of the shape of `codes`.

    `exponents` (int8, one for each input channel, broadcastable against `codes`) is None where there is nothing to
    multiply with. With stacked layers every array has the same layer axis. `looked_up`: whether all that the program
    does with it is to pick rows, which `pack` then keeps together.
    """

    codes: jax.Array
    grid: Grid
    format: Format = static()
    dtype: Any = static(default=jnp.float32)
    exponents: jax.Array | None = None
    looked_up: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def dequantize(self) -> jax.Array:
        """The array this leaf stands for."""
        grid = self.grid.over(self.shape)
        values = decode(self.format, self.codes, grid.scale, grid.zero, grid.mantissa)
        if self.exponents is not None:
            values = values * power_of_two(self.exponents.astype(jnp.int32))
        return values.astype(self.dtype)


@pytree
class Packed:
    """A `QTensor` whose codes lie in memory as `jaxq.kernels.layout` says: what `jaxq.pack` makes of it.

    The codes of a [*lead, *rows, *columns] weight are planes of uint8 [*lead, bytes, columns], packed along `rows`, the
    axes that an output channel sums over, and so are those of one stored as [*lead, *columns, *rows] (`rows_last`); a
    table of [*lead, row] that is only looked up has planes [*lead, bytes].
    Integers of 8 bits are there as products read them: int8, an asymmetric one's code less 128. `stored` is the grid as
    `Grid.to_bytes` has it. Everything else is the QTensor's. `sums` (int32, of the leaf's rank) holds the sums of the
    integers over `rows`, or over each group there, by which zero points of activations are corrected; None where no
    activation has one. `reach` is how much the exponents of one weight differ at most. `split` is the format; of an
    `AnyFloat` the one that all codes have, None where they differ.
    """

    planes: tuple[jax.Array, ...]
    stored: Grid
    format: Format = static()
    rows: tuple[int, ...] = static()
    columns: tuple[int, ...] = static()
    dtype: Any = static(default=jnp.float32)
    exponents: jax.Array | None = None
    sums: jax.Array | None = None
    reach: int = static(default=0)
    split: Int | Float | None = static(default=None)
    rows_last: bool = static(default=False)
    looked_up: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Under `shard_map` the shape of the shard, hence the first of the rows and of the columns are counted."""
        others = self.columns[1:]
        columns = (self.planes[0].shape[-1] // prod(others), *others) if self.columns else ()
        lead = self.planes[0].shape[: self.lead]
        return (*lead, *columns, *self.local_rows) if self.rows_last else (*lead, *self.local_rows, *columns)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def lead(self) -> int:
        """How many axes lie before the rows and the columns."""
        return self.planes[0].ndim - 1 - bool(self.columns)

    @property
    def row_axes(self) -> tuple[int, ...]:
        """Where `rows` lie among the axes."""
        start = self.ndim - len(self.rows) if self.rows_last else self.lead
        return tuple(range(start, start + len(self.rows)))

    @property
    def grid(self) -> Grid:
        """The QTensor's grid, made of its bytes at every call."""
        return self.stored.from_bytes()

    @property
    def local_rows(self) -> tuple[int, ...]:
        """`rows`, or under `shard_map` what a shard has of them, if it is one of equal shards of whole blocks."""
        count, bits = prod(self.rows), self.format.bits
        whole, here = plane_rows(count, widths(bits)[0]), self.planes[0].shape[-2 if self.columns else -1]
        parts = whole // max(here, 1)
        if parts < 2 or here * parts != whole or self.rows[0] % parts or not can_split(count, bits, parts):
            return self.rows
        return (self.rows[0] // parts, *self.rows[1:])

    def laid_out(self, a: jax.Array) -> jax.Array:
        """An array [*lead, row, columns], as the planes are, in the leaf's shape."""
        return (a.swapaxes(-1, -2) if self.rows_last else a).reshape(self.shape)

    def unpack(self) -> QTensor:
        """The QTensor that was packed, bit for bit."""
        planes = self.planes if self.columns else tuple(plane[..., None] for plane in self.planes)
        if isinstance(self.format, Int) and planes[0].dtype == jnp.int8:
            planes = (eight_bit_codes(planes[0], self.format),)
        codes = self.laid_out(unpack_codes(planes, self.format.bits, prod(self.local_rows)))
        if self.format.code_dtype == jnp.int8:
            codes = signed(codes, self.format.bits)
        kept = {"format": self.format, "dtype": self.dtype, "looked_up": self.looked_up}
        return QTensor(codes, self.grid, exponents=self.exponents, **kept)

    def dequantize(self) -> jax.Array:
        """The array this leaf stands for."""
        return self.unpack().dequantize()


def quantize_array(w: jax.Array, fmt: Format, grid: Grid) -> QTensor:
    """Encodes `w` on `grid`; `dequantize` of the result is the fake-quantized `w`, bit for bit."""
    spread = grid.over(w.shape)
    codes = encode(fmt, w.astype(jnp.float32), spread.scale, spread.zero, spread.mantissa)
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
    """Whether a leaf of a parameter tree holds codes, packed or not."""
    return isinstance(leaf, QTensor | Packed)


def logical(tree: Any) -> Any:
    """The tree with every quantized leaf replaced by the array it stands for."""
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_qtensor(leaf) else leaf, tree, is_leaf=is_qtensor)
