"""What `jaxq.kernels.hopper_quantize` computes in registers, instruction by instruction.

Pallas has neither fused multiply-adds nor exact divisions, both of which Mosaic GPU would approximate, and does not say
which instructions it packs bytes with; a lane holds a few successive channels of each chunk, two to a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, memref, vector

from jaxq.formats import Int
from jaxq.formats.integer import WHOLE
from jaxq.kernels.hopper_registers import element

SCALAR = plgpu.Layout.WG_SPLAT(())
WARPS = 4  # of a warpgroup
UPPER_HALF = -(1 << 16)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b` of float32 scalars, as IEEE has it."""

    def run(_: Any, a: Any, b: Any) -> Any:
        return _scalar(_ptx("div.rn.f32", ir.F32Type.get(), a.registers.item(), b.registers.item()))

    return _inline(run, (SCALAR, SCALAR), plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR))(a, b)


def reciprocal(b: jax.Array, layout: Any) -> jax.Array:
    """`1 / b`, float32 of one dimension, as IEEE has it."""

    def each(b: Any) -> Any:
        found = [_ptx("rcp.rn.f32", ir.F32Type.get(), element(b, i)) for i in range(ir.VectorType(b.type).shape[0])]
        return vector.from_elements(b.type, found)

    def run(_: Any, b: Any) -> Any:
        return _array([each(r) for r in b.registers.flat], b.layout)

    return _inline(run, (layout,), plgpu.ShapeDtypeStruct(b.shape, jnp.float32, layout=layout))(b)


def quotient(a: jax.Array, negated: jax.Array, reciprocal: jax.Array, layout: Any) -> jax.Array:
    """`a / b`, bfloat16 of one dimension, correctly rounded, given -b and the correctly rounded 1 / b.

    What the first quotient is off by is exact, and divided likewise. So all 128 x 128 pairs of significands come out
    right (Markstein, IBM Journal of Research and Development 34, 1990), for |a| from 2**-110 on; infinite ones as NaN.
    """

    def each(a: Any, negated: Any, r: Any) -> Any:
        q = _packed("mul.rn", a, r)
        return _packed("fma.rn", _packed("fma.rn", q, negated, a), r, q)

    def run(_: Any, *arrays: Any) -> Any:
        words = zip(*(_words(a) for a in arrays))
        return _array([_vector([each(*w) for w in words], ir.BF16Type.get())], arrays[0].layout)

    result = plgpu.ShapeDtypeStruct(a.shape, jnp.bfloat16, layout=layout)
    return _inline(run, (layout,) * 3, result)(a, negated, reciprocal)


def ends(rows: Sequence[Sequence[jax.Array]], scratch: Any, layout: Any) -> list[tuple[jax.Array, jax.Array]]:
    """The smallest and the largest number of each row, float32 scalars; NaN if it has one.

    Args:
      rows: of chunks, bfloat16 of one dimension.
      scratch: int32 [4 len(rows)] in shared memory, which no other thread may still be reading.
    """
    count = len(rows[0])

    def run(_: Any, scratch: Any, *chunks: Any) -> list:
        index, word = ir.IndexType.get(), ir.IntegerType.get_signless(32)
        warp = arith.index_cast(index, arith.andi(utils.warp_idx(sync=False), _word(WARPS - 1)))
        for r in range(len(rows)):
            both = _ends_of_warp([w for chunk in chunks[r * count : (r + 1) * count] for w in _words(chunk)])
            memref.store(both, scratch, [arith.addi(warp, utils.c(WARPS * r, index))])
        utils.warpgroup_barrier()
        found = []
        for r in range(len(rows)):
            parts = vector.load(ir.VectorType.get((WARPS,), word), scratch, [utils.c(WARPS * r, index)])
            negated, high = _floats(_tree("max.NaN", [element(parts, i) for i in range(WARPS)]))
            found += [_scalar(arith.negf(negated)), _scalar(high)]
        return found

    result = [plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR)] * (2 * len(rows))
    types = (plgpu.RefType(), *(layout,) * (len(rows) * count))
    found = _inline(run, types, result)(scratch, *(chunk for row in rows for chunk in row))
    return list(zip(found[::2], found[1::2]))


def _ends_of_warp(words: Sequence[Any]) -> Any:
    """A warp's largest number and its largest negated one, as the halves of a word."""
    low, high = _packed("neg", _tree("min.NaN", words)), _tree("max.NaN", words)
    both = _packed("max.NaN", *(_bytes(halves, low, high) for halves in (0x5410, 0x7632)))
    for distance in (1, 2, 4, 8, 16):
        both = _packed("max.NaN", both, utils.shfl_bfly(both, distance))
    return both


def codes(
    chunks: Sequence[jax.Array], fmt: Int, scale: jax.Array, zero: jax.Array | None, spanned: bool, layout: Any
) -> list[jax.Array]:
    """The integers of a row's chunks, int8: codes, an asymmetric format's less `2**(bits - 1)`.

    Args:
      chunks: bfloat16 of one dimension.
      scale, zero: float32 scalars.
      spanned: whether the grid spans the row, so that at most an asymmetric one's upper end is to be clipped: there
        both ends of the range may round outwards.
    """
    upper = divide(jnp.float32(1), scale)

    def run(_: Any, grid: Any, chunks: Any) -> list:
        scale, upper, *zero = (g.registers.item() for g in grid)
        # The reciprocal to twice float32's precision: the quotient is then rounded but once, and a tie stays one.
        lower = arith.mulf(math.fma(arith.negf(upper), scale, _float(1)), upper)
        low, high, offset = _float(fmt.qmin), _float(fmt.qmax), None
        if zero:
            low, high = arith.subf(low, zero[0]), arith.subf(high, zero[0])
            offset = arith.subf(zero[0], _float(2 ** (fmt.bits - 1)))

        def code(a: Any) -> Any:
            found = math.fma(a, upper, arith.mulf(a, lower))
            found = found if spanned and not zero else arith.minimumf(found, high)
            found = found if spanned else arith.maximumf(found, low)
            found = arith.addf(found, _float(WHOLE))
            found = found if offset is None else arith.addf(found, offset)  # after rounding: it may be odd
            return utils.bitcast(found, ir.IntegerType.get_signless(32))

        def four(words: Sequence[Any]) -> Any:
            first, second = (_bytes(0x0040, *map(code, _floats(word))) for word in words)
            return _bytes(0x5410, first, second)

        def chunk(a: Any) -> Any:
            words = _words(a)
            found = [four(words[i : i + 2]) for i in range(0, len(words), 2)]
            return _array([_vector(found, ir.IntegerType.get_signless(8))], a.layout, signed=True)

        return [chunk(a) for a in chunks]

    grid = (scale, upper, *(() if zero is None else (zero,)))
    result = [plgpu.ShapeDtypeStruct(a.shape, jnp.int8, layout=layout) for a in chunks]
    return _inline(run, ((SCALAR,) * len(grid), (layout,) * len(chunks)), result)(grid, tuple(chunks))


# Registers ------------------------------------------------------------------------------------------------------------


def _inline(run: Callable, types: Any, result: Any) -> Callable:
    made: Any = plgpu.inline_mgpu(arg_types=types, return_type=result)(run)  # JAX gives it its own first argument
    return made


def _ptx(name: str, kind: Any, *operands: Any) -> Any:
    letter = "f" if isinstance(kind, ir.F32Type) else "r"
    constraints = ",".join([f"={letter}", *[letter] * len(operands)])
    text = f"{name} {', '.join(f'${i}' for i in range(len(operands) + 1))};"
    return llvm.inline_asm(kind, operands, text, constraints, asm_dialect=0, operand_attrs=[])


def _packed(name: str, *operands: Any) -> Any:
    """An operation on words of two bfloat16."""
    return _ptx(f"{name}.bf16x2", ir.IntegerType.get_signless(32), *operands)


def _bytes(chosen: int, first: Any, second: Any) -> Any:
    """A word of four bytes of two words, of which the first's are 0 to 3 and the second's 4 to 7."""
    return utils.prmt(first, second, _word(chosen))


def _tree(name: str, words: Sequence[Any]) -> Any:
    """All words by an operation on two, in few steps that wait for each other."""
    while len(words) > 1:
        pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
        words = [_packed(name, *pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return words[0]


def _words(a: Any) -> list:
    """The words of a chunk of bfloat16."""
    (register,) = a.registers.flat
    count = ir.VectorType(register.type).shape[0] // 2
    words = utils.bitcast(register, ir.VectorType.get((count,), ir.IntegerType.get_signless(32)))
    return [element(words, i) for i in range(count)]


def _floats(word: Any) -> tuple[Any, Any]:
    """A word's two bfloat16 in float32."""
    lower, upper = arith.shli(word, _word(16)), arith.andi(word, _word(UPPER_HALF))
    return utils.bitcast(lower, ir.F32Type.get()), utils.bitcast(upper, ir.F32Type.get())


def _vector(words: Sequence[Any], kind: Any) -> Any:
    together = vector.from_elements(ir.VectorType.get((len(words),), words[0].type), words)
    return utils.bitcast(together, ir.VectorType.get((len(words) * 32 // utils.bitwidth(kind),), kind))


def _array(registers: list, layout: Any, signed: bool | None = None) -> Any:
    return mgpu.FragmentedArray(_registers=np.array(registers, object), _layout=layout, _is_signed=signed)


def _scalar(value: Any) -> Any:
    return mgpu.FragmentedArray.splat(value, ())


def _word(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _float(value: float) -> Any:
    return utils.c(float(value), ir.F32Type.get())
