"""Products of bfloat16 activations with packed 4-bit weights on Hopper GPUs (H100, H200), as a Mosaic GPU kernel.

    y[m, n] = sum_g scale[g, n] * sum_{k in g} x[m, k] c[k, n]

with c what the weight's codes stand for (an asymmetric integer's: the code less 8), and groups g of 128 channels, or
more, or all.

**It has never run on a GPU.** It is compiled ahead of time for the H200 (`experiments/gpu_compiled.py`), and what the
compiler made of it, its PTX, is run in numpy, instruction by instruction, and gives the product exactly
(`tests/kernels/ptx.py`). Timing and the order of what is asynchronous are not checked by that. So nothing uses it
unless it is asked for, by `execute(forward, "experimental")`.

The weight is the left operand of the tensor cores, transposed: 4-bit codes come from device memory through shared
memory to registers, where they are expanded and multiplied; nothing of the size of the weight is written anywhere, and
few tokens pad to 8, not to 64. One warpgroup copies, some steps ahead; one or two multiply, 128 columns each. Where
tokens are few, K is split over several blocks, whose float32 sums are added afterwards.

8-bit weights have no kernel here: XLA multiplies int8 with int8 on its tensor cores as they are stored, and Mosaic GPU
takes 8-bit operands from shared memory only where K is contiguous, which in `jaxq.kernels.layout` N is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxq.formats import Float, Int
from jaxq.kernels import hopper_registers as registers
from jaxq.kernels.expansion import Expansion, code_values, expansion
from jaxq.kernels.gpu import COLUMNS
from jaxq.kernels.hopper_registers import DEPTH
from jaxq.kernels.layout import BLOCK, HALF, fits, unpack_codes

STEP = 2 * DEPTH  # channels of one step of the pipeline: DEPTH of the low nibbles, DEPTH of the high ones
SHARED = 192 << 10  # bytes of shared memory for the steps under way
MULTIPROCESSORS = 132
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
        w: packed 4-bit codes, uint8 [K/2, N], as in `jaxq.kernels.layout`.
        scale: [G, N] float32.
        fmt: of the codes, of 4 bits.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: the shapes do not fit each other or the kernel: see `layout.fits`; or the format is not of 4 bits.
    """
    (m, k), n, groups = x.shape, w.shape[1], scale.shape[0]
    if 2 * w.shape[0] != k or scale.shape[1] != n or not fits(k, groups) or n % COLUMNS:
        raise ValueError(
            f"x {x.shape}, packed weights {w.shape}, scales {scale.shape}: the kernel takes x [M, K], weights [K/2, N] "
            "and scales [G, N], K in blocks of 256, groups in multiples of 128 and N in multiples of 128"
        )
    made = expansion(fmt)
    rows, warpgroups, splits = tiles(m, k, n, groups)
    x = jnp.pad(x, ((0, -m % rows), (0, 0)))
    steps = k // STEP // splits
    stages = SHARED // (DEPTH * COLUMNS * warpgroups + 2 * rows * DEPTH * x.dtype.itemsize)
    y = plgpu.kernel(
        partial(_kernel, expansion=made, tile=(rows, warpgroups), steps=steps, stages=min(8, stages)),
        out_type=jax.ShapeDtypeStruct((splits, x.shape[0], n), dtype if splits == 1 else jnp.float32),
        grid=(x.shape[0] // rows, n // COLUMNS // warpgroups, splits),
        grid_names=("m", "n", "split"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="jaxq_hopper_matmul",
    )(x, w, scale / jnp.float32(made.unit))
    return (y[0] if splits == 1 else y.sum(0).astype(dtype))[:m]


def tiles(m: int, k: int, n: int, groups: int) -> tuple[int, int, int]:
    """How many rows of x and warpgroups, of 128 columns each, a block multiplies, and into how many parts K is cut.

    With scales of groups there are two sets of sums, which have to fit in the registers.
    """
    rows = min(-(-m // 8) * 8, 128 if groups == 1 else 32)
    warpgroups = 2 if n % (2 * COLUMNS) == 0 else 1
    blocks, steps, splits = -(-m // rows) * (n // COLUMNS // warpgroups), k // STEP, 1
    while 2 * blocks * splits <= MULTIPROCESSORS and steps % (2 * splits) == 0 and steps // (2 * splits) >= 2:
        splits *= 2
    return rows, warpgroups, splits


def _kernel(
    x: Any, w: Any, scale: Any, out: Any, *, expansion: Expansion, tile: tuple[int, int], steps: int, stages: int
) -> None:
    rows, warpgroups = tile
    i, j, split = (lax.axis_index(name) for name in ("m", "n", "split"))
    mine = lax.axis_index("warpgroup")
    columns = pl.ds((j * warpgroups + mine) * COLUMNS, COLUMNS)
    groups, size = scale.shape[0], x.shape[1] // scale.shape[0]

    def scaled(sums: jax.Array, group: Any) -> jax.Array:
        """Sums [128, rows] as they are stored, [rows, 128], times their scales."""
        here = scale.at[group, columns]
        factors = plgpu.load(here, *NO_INDEX, layout=registers.BYTES.reduce(0), optimized=False)
        factors = plgpu.layout_cast(lax.broadcast_in_dim(factors, (rows, COLUMNS), (1,)), registers.BYTES)
        return registers.result(sums) * factors

    def halves(w_part: Any) -> list[jax.Array]:
        """The weight's channels of a step, bfloat16 [128, 64]: of the low nibbles, and of the high ones."""
        packed = plgpu.layout_cast(w_part[:, pl.ds(mine * COLUMNS, COLUMNS)], registers.BYTES)
        words = registers.pairs(packed)
        bits = [registers.fragments(expansion.bits(words, half), expansion.bits(words, 2 + half)) for half in (0, 1)]
        return [expansion.finish(part) for part in bits]

    def all_at_once(_: Any, w_part: Any, low: Any, high: Any, sums: Any) -> Any:
        for part, x_part in zip(halves(w_part), (low, high)):
            plgpu.wgmma(sums, part, x_part.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return sums

    def by_groups(at: Any, w_part: Any, low: Any, high: Any, total: jax.Array) -> jax.Array:
        block = (split * steps + at[0]) // 2
        for half, (part, x_part) in enumerate(zip(halves(w_part), (low, high))):

            def multiplied(sums: Any) -> jax.Array:
                plgpu.wgmma(sums, part, x_part.transpose((1, 0)))  # noqa: B023 - called at once
                return sums[...]

            sums = pl.run_scoped(multiplied, plgpu.WGMMAAccumulatorRef((COLUMNS, rows), jnp.float32))
            total = total + scaled(sums, (2 * block + half) * HALF // size)
        return total

    def store(y: jax.Array) -> None:
        out[split, pl.ds(i * rows, rows), columns] = y.astype(out.dtype)

    def context(run: Any) -> None:
        if groups > 1:
            zeros = plgpu.layout_cast(jnp.zeros((rows, COLUMNS), jnp.float32), registers.BYTES)
            return store(run(zeros))

        def channelwise(sums: Any) -> None:
            run(sums)
            store(scaled(sums[...], 0))

        pl.run_scoped(channelwise, plgpu.WGMMAAccumulatorRef((COLUMNS, rows), jnp.float32))

    def nibble(half: int) -> plgpu.BlockSpec:
        """The channels of x that go with the low or the high nibbles of a step."""

        def index(t: Any) -> tuple[Any, Any]:
            step = split * steps + t
            return i, step // 2 * (BLOCK // DEPTH) + step % 2 + half * (HALF // DEPTH)

        return _spec((rows, DEPTH), index)

    body: Any = all_at_once if groups == 1 else by_groups
    plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=40,
        in_specs=[_spec((DEPTH, COLUMNS * warpgroups), lambda t: (split * steps + t, j)), nibble(0), nibble(1)],
        max_concurrent_steps=stages,
        wg_axis="warpgroup",
        num_compute_wgs=warpgroups,
        compute_context=context,
    )(w, x, x)


def _spec(block: tuple[int, int], index: Any) -> plgpu.BlockSpec:
    """Blocks in shared memory in rows of 128 bytes, swizzled against bank conflicts."""
    width = 128 if block[1] % 128 == 0 else 64  # of bytes of codes, of bfloat16
    return plgpu.BlockSpec(block, index, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))


def plain_hopper_matmul(
    x: jax.Array, w: jax.Array, scale: jax.Array, fmt: Int | Float, *, dtype: Any = jnp.float32
) -> jax.Array:
    """What `hopper_matmul` means, in plain jnp, for any K and N and any size of groups that divides K."""
    values = code_values(fmt, unpack_codes((w,), 4, x.shape[1])).reshape(scale.shape[0], -1, w.shape[1])
    a = x.astype(jnp.float32).reshape(x.shape[0], scale.shape[0], -1)
    return jnp.einsum("mgk,gkn,gn->mn", a, values, scale, precision="highest").astype(dtype)
