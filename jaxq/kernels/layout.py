"""How codes of 2 to 8 bits lie in bytes: `codes` uint8 [..., K, N], K the axis that a product sums over.

The bits of a code are split over *planes* of 8, 4, 2 or 1 bits, the widest first and with the lowest bits:

| bits | planes  | bits of a code in them | bytes for each [K] column |
|------|---------|------------------------|---------------------------|
| 2    | 2       | 0-1                    | K/4                       |
| 3    | 2, 1    | 0-1, 2                 | K/4 + K/8                 |
| 4    | 4       | 0-3                    | K/2                       |
| 5    | 4, 1    | 0-3, 4                 | K/2 + K/8                 |
| 6    | 4, 2    | 0-3, 4-5               | K/2 + K/4                 |
| 7    | 4, 2, 1 | 0-3, 4-5, 6            | K/2 + K/4 + K/8           |
| 8    | 8       | 0-7                    | K                         |

A plane of `w` bits is uint8 [..., bytes, N]. K is cut into blocks of 256 codes, a block into p = 8 / w equal parts, and
byte j of a block holds the j-th code of each part, the first part in the lowest bits:

| w | parts  | byte j of a block of 256 codes                                            |
|---|--------|---------------------------------------------------------------------------|
| 8 | 1      | code[j]                                                j = 0 .. 255       |
| 4 | 2      | code[j] | code[128 + j] << 4                           j = 0 .. 127       |
| 2 | 4      | code[j] | code[64 + j] << 2 | ... | code[192 + j] << 6  j = 0 .. 63       |
| 1 | 8      | code[j] | code[32 + j] << 1 | ... | code[224 + j] << 7  j = 0 .. 31       |

Where 256 does not divide K, the last block is shorter: its K % 256 codes, followed by zeros up to a multiple of p, in p
equal parts. Rows of 128 codes stay together, so that kernels read activations in whole vectors and interleave nothing,
and K can be sharded in multiples of 256.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq.formats import Int

BLOCK = 256
HALF = BLOCK // 2
WIDTHS = (8, 4, 2, 1)
RUNS = 16  # of a block, each of 16 codes in a row, which share bytes with none of the same run


def widths(bits: int) -> tuple[int, ...]:
    """The widths of the planes that hold codes of 2 to 8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits; possible are 2 to 8")
    return tuple(w for w in WIDTHS if bits & w)


def plane_rows(k: int, width: int) -> int:
    """How many bytes a plane of `width` bits has for `k` codes."""
    parts = 8 // width
    return k // BLOCK * BLOCK // parts + -(-(k % BLOCK) // parts)


def fits(k: int, groups: int, least: int = HALF) -> bool:
    """Whether kernels for 4-bit codes take K channels in so many groups: whole blocks, and groups of whole halves, or
    that halves consist of, of `least` channels or more."""
    size = k // groups
    return k % BLOCK == 0 and k % groups == 0 and size >= least and (size % HALF == 0 or HALF % size == 0)


def can_split(k: int, bits: int, parts: int) -> bool:
    """Whether each plane of `k` codes, cut into equal parts, gives the planes of `k / parts` codes each."""
    return k % parts == 0 and (parts == 1 or bits == 8 or k // parts % BLOCK == 0)


def pack_codes(codes: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """The planes of `codes`, uint8 [..., K, N] with values below `2**bits`: see the table above."""
    planes, below = [], 0
    for width in widths(bits):
        planes.append(_pack_plane((codes >> below) & (2**width - 1), width))
        below += width
    return tuple(planes)


def unpack_codes(planes: tuple[jax.Array, ...], bits: int, k: int) -> jax.Array:
    """The codes, uint8 [..., k, N], of which `pack_codes` made `planes`.

    Raises:
        ValueError: the planes are not those of `k` codes of `bits` bits.
    """
    want = [plane_rows(k, width) for width in widths(bits)]
    if [plane.shape[-2] for plane in planes] != want:
        found = [plane.shape[-2] for plane in planes]
        raise ValueError(f"planes of {found} rows are not those of {k} codes of {bits} bits: they have {want} rows")
    first, *others = widths(bits)
    codes, below = _unpack_plane(planes[0], first, k), first
    for plane, width in zip(planes[1:], others):
        codes = codes | (_unpack_plane(plane, width, k) << below)
        below += width
    return codes


def signed(codes: jax.Array, bits: int) -> jax.Array:
    """Codes in two's complement of so many bits, uint8, as int8; CPUs have no shifts of bytes."""
    sign = jnp.uint8(2 ** (bits - 1))
    return jax.lax.bitcast_convert_type(codes if bits == 8 else (codes ^ sign) - sign, jnp.int8)


def unpack_run(planes: tuple[jax.Array, ...], bits: int, run: int, last: bool = False) -> jax.Array:
    """Of each block of 256 codes those from `16 * run` on, uint8 [16 * blocks, N], of planes [bytes, N] of whole blocks
    and perhaps half a block after them; or (`last`) of that half those from `8 * run` on, [8, N]. Codes of 8 bits are
    as they are stored."""
    codes, below = None, 0
    for plane, width in zip(planes, widths(bits)):
        each, length = RUNS * width // 8, HALF // RUNS if last else BLOCK // RUNS
        halves = plane.shape[0] * 8 // width // HALF
        bytes_ = rows_of_blocks(plane, halves, run % each * length, length, last)
        part = bytes_ if width == 8 else (bytes_ >> (run // each * width)) & (2**width - 1)
        codes = part if codes is None else codes | (part << below)
        below += width
    assert codes is not None
    return codes


def rows_of_blocks(a: jax.Array, halves: int, first: int, count: int, last: bool = False) -> jax.Array:
    """Rows of [rows, N], which are those of so many halves of blocks: of each whole block the same `count` from `first`
    on, in one of its halves, or those of the last half. Cut in one step, as XLA would copy the blocks that another cut
    leaves."""
    each = a.shape[0] // halves
    start, offset = (halves - 1, first) if last else divmod(first, each)
    stop = halves if last else halves // 2 * 2
    cut = jax.lax.slice(
        a.reshape(halves, each, -1), (start, offset, 0), (stop, offset + count, a.shape[1]), (1 if last else 2, 1, 1)
    )
    return cut.reshape(-1, a.shape[1])


def eight_bit_integers(codes: jax.Array, fmt: Int) -> jax.Array:
    """Codes of 8 bits, uint8, as int8: an asymmetric integer's less 128."""
    return jax.lax.bitcast_convert_type(codes if fmt.symmetric else codes ^ jnp.uint8(128), jnp.int8)


def eight_bit_codes(integers: jax.Array, fmt: Int) -> jax.Array:
    """The codes, uint8, of which `eight_bit_integers` made int8."""
    codes = jax.lax.bitcast_convert_type(integers, jnp.uint8)
    return codes if fmt.symmetric else codes ^ jnp.uint8(128)


def _pack_plane(codes: jax.Array, width: int) -> jax.Array:
    parts, whole = 8 // width, codes.shape[-2] // BLOCK * BLOCK
    if parts == 1:
        return codes
    body, rest = codes[..., :whole, :], codes[..., whole:, :]
    missing = -rest.shape[-2] % parts
    rest = jnp.pad(rest, [(0, 0)] * (codes.ndim - 2) + [(0, missing), (0, 0)])
    pieces = [_join(a, blocks, width) for a, blocks in ((body, whole // BLOCK), (rest, 1)) if a.shape[-2]]
    return jnp.concatenate(pieces, -2) if pieces else codes


def _join(codes: jax.Array, blocks: int, width: int) -> jax.Array:
    """Blocks of equal length: the parts of each on top of each other."""
    *lead, k, n = codes.shape
    parts = codes.reshape(*lead, blocks, 8 // width, k * width // 8 // blocks, n)
    shifted = [parts[..., i, :, :] << (i * width) for i in range(8 // width)]
    return sum(shifted[1:], shifted[0]).reshape(*lead, k * width // 8, n)


def _unpack_plane(plane: jax.Array, width: int, k: int) -> jax.Array:
    parts, whole = 8 // width, k // BLOCK * BLOCK // (8 // width)
    if parts == 1:
        return plane
    body, rest = plane[..., :whole, :], plane[..., whole:, :]
    pieces = [_split(a, blocks, width) for a, blocks in ((body, k // BLOCK), (rest, 1)) if a.shape[-2]]
    codes = jnp.concatenate(pieces, -2) if pieces else plane
    return codes[..., :k, :]


def _split(plane: jax.Array, blocks: int, width: int) -> jax.Array:
    *lead, rows, n = plane.shape
    bytes_ = plane.reshape(*lead, blocks, 1, rows // blocks, n)
    shifts = jnp.arange(0, 8, width, jnp.uint8).reshape(*(1 for _ in lead), 1, -1, 1, 1)
    parts = (bytes_ >> shifts) & (2**width - 1)  # one expression, which XLA writes in one pass
    return parts.reshape(*lead, rows * 8 // width, n)
