"""Products of bfloat16 activations with packed weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

    y[m, n] = sum_g scale[g, n] * sum_{k in g} x[m, k] c[k, n]

with c what the weight's codes stand for (an asymmetric 4-bit integer's: the code less 8), and groups g of 128 channels,
or more, or all.

The weight is the left operand of the tensor cores, transposed: codes come from device memory through shared memory to
registers, where they are expanded and multiplied; nothing of the size of the weight is written anywhere, and few tokens
pad to 8, not to 64. A block is one warpgroup, which multiplies 128 columns and copies some steps ahead; several share a
multiprocessor, so that one expands while another waits. Where tokens are few, K is split over several blocks, whose
float32 sums are added afterwards. The tensor cores add bfloat16 products exactly: sums of integers below 2**24 are
exact, which was seen on an H100 (`experiments/RESULTS.md` has the times). Without a GPU the kernel is compiled
(`experiments/gpu_compiled.py`) and its PTX run in numpy, instruction by instruction (`tests/kernels/ptx.py`).

Four multiplying warpgroups in one block, with a fifth that copies, hang: their registers do not fit those that the
block starts with, which `setmaxnreg` waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Float, Int
from jaxq.kernels import hopper_registers as registers
from jaxq.kernels.expansion import expansions, packed_values
from jaxq.kernels.gpu import COLUMNS
from jaxq.kernels.hopper_registers import DEPTH
from jaxq.kernels.layout import BLOCK, HALF, fits

SHARED = 208 << 10  # bytes of shared memory of a multiprocessor, for the steps under way of its blocks
BLOCKS = 250  # of 132 multiprocessors
NO_INDEX = (None,) if jax.__version_info__ < (0, 11) else ()  # of `plgpu.load`, which JAX 0.10 must be told


def hopper_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    fmt: Int | Float,
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The product above as one kernel. `plain_hopper_matmul` is its meaning, but for the order of summation.

    Args:
        x: [M, K] bfloat16.
        w: packed codes, uint8 [K/2, N] of 4 bits, as in `jaxq.kernels.layout`, or [K, N] of 8.
        scale: [G, N] float32.
        fmt: of the codes, one that `jaxq.kernels.expansion` has.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: the shapes do not fit each other or the kernel: see `layout.fits`; or it does not take the format.
    """
    (m, k), n, groups = x.shape, w.shape[1], scale.shape[0]
    made = expansions(fmt)
    if 8 * w.shape[0] != k * fmt.bits or scale.shape[1] != n or not fits(k, groups) or n % COLUMNS:
        raise ValueError(
            f"x {x.shape}, packed weights {w.shape} of {fmt}, scales {scale.shape}: the kernel takes x [M, K], weights "
            "[K * bits / 8, N] and scales [G, N], K in blocks of 256, groups in multiples of 128 and N in multiples of "
            "128"
        )
    rows, splits = tiles(m, w.shape[0], n, groups)
    x = jnp.pad(x, ((0, -m % rows), (0, 0)))
    y = plgpu.kernel(
        partial(_kernel, fmt=fmt, rows=rows, steps=-(-w.shape[0] // DEPTH // splits)),
        out_type=jax.ShapeDtypeStruct((splits, x.shape[0], n), dtype if splits == 1 else jnp.float32),
        grid=(x.shape[0] // rows, n // COLUMNS, splits),
        grid_names=("m", "n", "split"),
        kernel_name="jaxq_hopper_matmul",
    )(x, w, scale / jnp.float32(made[0].unit))
    return (y[0] if splits == 1 else y.sum(0).astype(dtype))[:m]


def tiles(m: int, depth: int, n: int, groups: int) -> tuple[int, int]:
    """How many rows of x a block multiplies, and into how many parts K is cut, for weights of `depth` bytes a column:
    as many as make two blocks for nearly each multiprocessor. With scales of groups there are three sets of sums to
    hold in registers."""
    rows = min(-(-m // 8) * 8, 128 if groups == 1 else 32)
    blocks, steps = -(-m // rows) * (n // COLUMNS), depth // DEPTH
    splits = max(1, min(-(-BLOCKS // blocks), steps // 2, depth // (8 * rows)))
    return rows, -(-steps // -(-steps // splits))


def _kernel(x: Any, w: Any, scale: Any, out: Any, *, fmt: Int | Float, rows: int, steps: int) -> None:
    i, j, split = (lax.axis_index(name) for name in ("m", "n", "split"))
    columns = pl.ds(j * COLUMNS, COLUMNS)
    made, codes = expansions(fmt), 8 // fmt.bits  # in a byte
    groups, size = scale.shape[0], x.shape[1] // scale.shape[0]

    def factors(here: Any) -> jax.Array:
        """A group's scales of this warpgroup's columns, for each row."""
        found = plgpu.load(here, *NO_INDEX, layout=registers.BYTES.reduce(0), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(found, (rows, COLUMNS), (1,)), registers.BYTES)

    def multiply(w_part: Any, x_parts: Sequence[Any], sums: Sequence[Any]) -> None:
        """While one expansion is multiplied, the next is made."""
        words = registers.pairs(plgpu.layout_cast(w_part[...], registers.BYTES))
        for number, expansion in enumerate(made):
            bits = registers.fragments(expansion.bits(words, 0), expansion.bits(words, 1))
            plgpu.wgmma(sums[number % codes], expansion.finish(bits), x_parts[number % codes].transpose((1, 0)))

    def index(code: int, unit: int, step: Any) -> Any:
        """In units of so many channels, where those of a step are that have their code in this place of a byte."""
        byte = (split * steps + step) * DEPTH
        return (byte if codes == 1 else byte // HALF * BLOCK + code * HALF + byte % HALF) // unit

    def x_spec(code: int) -> plgpu.BlockSpec:
        return _spec((rows, DEPTH), lambda t: (i, index(code, DEPTH, t)), x.dtype)

    def scale_spec(code: int) -> plgpu.BlockSpec:
        return plgpu.BlockSpec((1, COLUMNS), lambda t: (index(code, size, t), j))

    def pipeline(body: Any, specs: Sequence[plgpu.BlockSpec], carry: jax.Array | None = None) -> Any:
        every = [_spec((DEPTH, COLUMNS), lambda t: (split * steps + t, j), w.dtype), *map(x_spec, range(codes)), *specs]
        operands = [w, *[x] * codes, *[scale] * len(specs)]
        step_bytes = DEPTH * (COLUMNS + codes * rows * x.dtype.itemsize) + len(specs) * COLUMNS * scale.dtype.itemsize
        resident = (
            4 if rows <= 32 else 2
        )  # blocks of a multiprocessor, which the registers of their sums leave room for
        stages = min(SHARED // resident // step_bytes, steps)
        run = plgpu.emit_pipeline(body, grid=(steps,), in_specs=every, max_concurrent_steps=stages, init_carry=carry)
        return run(*operands)

    def channelwise(sums: Any) -> None:
        def body(_: Any, w_part: Any, *x_parts: Any) -> None:
            multiply(w_part, x_parts, [sums] * codes)
            plgpu.wgmma_wait(0)

        pipeline(body, [])
        store(registers.result(sums[...]) * factors(scale.at[0, columns]))

    def by_groups(_: Any, w_part: Any, *rest: Any) -> jax.Array:
        x_parts, scales, total = rest[:codes], rest[codes:-1], rest[-1]
        scales = [factors(part.at[0]) for part in scales]

        def multiplied(*sums: Any) -> list[jax.Array]:
            multiply(w_part, x_parts, sums)
            return [part[...] for part in sums]

        for sums, its in zip(pl.run_scoped(multiplied, *[accumulator] * codes), scales):
            total = total + registers.result(sums) * its
        return total

    def store(y: jax.Array) -> None:
        out[split, pl.ds(i * rows, rows), columns] = y.astype(out.dtype)

    accumulator = plgpu.WGMMAAccumulatorRef((COLUMNS, rows), jnp.float32)
    if groups == 1:
        pl.run_scoped(channelwise, accumulator)
    else:
        zeros = plgpu.layout_cast(jnp.zeros((rows, COLUMNS), jnp.float32), registers.BYTES)
        store(pipeline(by_groups, list(map(scale_spec, range(codes))), zeros))


def _spec(block: tuple[int, int], index: Any, dtype: Any) -> plgpu.BlockSpec:
    """Blocks in shared memory in rows of 128 bytes, swizzled against bank conflicts."""
    width = 128 // dtype.itemsize
    return plgpu.BlockSpec(block, index, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))


def plain_hopper_matmul(
    x: jax.Array, w: jax.Array, scale: jax.Array, fmt: Int | Float, *, dtype: Any = jnp.float32
) -> jax.Array:
    """What `hopper_matmul` means, in plain jnp, for any K and N and any size of groups that divides K."""
    values = packed_values(fmt, w, x.shape[1]).reshape(scale.shape[0], -1, w.shape[1])
    a = x.astype(jnp.float32).reshape(x.shape[0], scale.shape[0], -1)
    return jnp.einsum("mgk,gkn,gn->mn", a, values, scale, precision="highest").astype(dtype)
