"""Inline."""

from __future__ import annotations

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


def _asm(ptx: str, kind: Any, *args: Any, constraint: str = "r", effects: bool = False) -> Any:
    text = ",".join([f"={constraint}"] + [constraint] * len(args))
    return llvm.inline_asm(kind, list(args), ptx, text, has_side_effects=effects, asm_dialect=0, operand_attrs=[])


def _words(register: Any) -> list:
    word = ir.IntegerType.get_signless(32)
    n = ir.VectorType(register.type).shape[0] * utils.bitwidth(ir.VectorType(register.type).element_type) // 32
    v = utils.bitcast(register, ir.VectorType.get((n,), word))
    return [_element(v, i) for i in range(n)]


def _element(v: Any, i: int) -> Any:
    return vector.extract(v, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _vector(words: list, element: Any) -> Any:
    v = vector.from_elements(ir.VectorType.get((len(words),), words[0].type), words)
    n = len(words) * 32 // utils.bitwidth(element)
    return utils.bitcast(v, ir.VectorType.get((n,), element))


def divide(a: Any, b: Any) -> jax.Array:
    """Scalars, IEEE."""
    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar, scalar), return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=scalar))
    def run(_: Any, a: Any, b: Any) -> Any:
        found = _asm("div.rn.f32 $0, $1, $2;", ir.F32Type.get(), a.registers.item(), b.registers.item(), constraint="f")
        return mgpu.FragmentedArray.splat(found, ())

    call: Any = run
    return call(jnp.float32(a), jnp.float32(b))


def reciprocal(b: jax.Array, layout: Any) -> jax.Array:
    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(b.shape, jnp.float32, layout=layout))
    def run(_: Any, b: Any) -> Any:
        f32 = ir.F32Type.get()

        def one(v: Any) -> Any:
            n = ir.VectorType(v.type).shape[0]
            found = [_asm("rcp.rn.f32 $0, $1;", f32, _element(v, i), constraint="f") for i in range(n)]
            return vector.from_elements(v.type, found)

        registers = np.vectorize(one, otypes=[object])(b.registers)
        return mgpu.FragmentedArray(_registers=registers, _layout=b.layout, _is_signed=None)

    call: Any = run
    return call(b)


def quotient(a: jax.Array, b: jax.Array, reciprocal: jax.Array, layout: Any) -> jax.Array:
    @plgpu.inline_mgpu(
        arg_types=(layout,) * 3, return_type=plgpu.ShapeDtypeStruct(a.shape, jnp.bfloat16, layout=layout)
    )
    def run(_: Any, a: Any, b: Any, reciprocal: Any) -> Any:
        word, half = ir.IntegerType.get_signless(32), ir.BF16Type.get()

        def one(a: Any, b: Any, r: Any) -> Any:
            found = []
            for a, b, r in zip(_words(a), _words(b), _words(r)):
                q = _asm("mul.rn.bf16x2 $0, $1, $2;", word, a, r)
                e = _asm("fma.rn.bf16x2 $0, $1, $2, $3;", word, q, b, a)
                found.append(_asm("fma.rn.bf16x2 $0, $1, $2, $3;", word, e, r, q))
            return _vector(found, half)

        registers = np.vectorize(one, otypes=[object])(a.registers, b.registers, reciprocal.registers)
        return mgpu.FragmentedArray(_registers=registers, _layout=a.layout, _is_signed=None)

    call: Any = run
    return call(a, b, reciprocal)


def ends(parts: list, scratch: Any, layout: Any, splat: Any) -> list:
    rows, chunk = len(parts), parts[0][0].shape[0]
    flat = [p for ps in parts for p in ps]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *(layout,) * len(flat)),
        return_type=[plgpu.ShapeDtypeStruct((), jnp.float32, layout=splat)] * (2 * rows),
    )
    def run(_: Any, scratch: Any, *flat: Any) -> Any:
        word, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        index = ir.IndexType.get()
        made = []
        for r in range(rows):
            words = [w for p in flat[r * len(parts[0]) : (r + 1) * len(parts[0])] for w in _words(p.registers.item())]

            def tree(op: str, words: list = words) -> Any:
                words = list(words)
                while len(words) > 1:
                    words = [
                        _asm(f"{op}.NaN.bf16x2 $0, $1, $2;", word, *words[i : i + 2]) if i + 1 < len(words) else words[i]
                        for i in range(0, len(words), 2)
                    ]
                return words[0]

            low, high = _asm("neg.bf16x2 $0, $1;", word, tree("min")), tree("max")
            # pairs of (-low, high)
            a, b = (utils.prmt(low, high, utils.c(p, word)) for p in (0x5410, 0x7632))
            found = _asm("max.NaN.bf16x2 $0, $1, $2;", word, a, b)
            for distance in (1, 2, 4, 8, 16):
                found = _asm("max.NaN.bf16x2 $0, $1, $2;", word, found, utils.shfl_bfly(found, distance))
            made.append(found)
        warp = utils.warp_idx(sync=False)
        warp = arith.index_cast(index, arith.andi(warp, utils.c(3, word)))
        for r, found in enumerate(made):
            at = arith.addi(warp, utils.c(4 * r, index))
            memref.store(found, scratch, [at])
        utils.warpgroup_barrier()
        out = []
        for r in range(rows):
            v = vector.load(ir.VectorType.get((4,), word), scratch, [utils.c(4 * r, index)])
            w = [_element(v, i) for i in range(4)]
            a, b = (_asm("max.NaN.bf16x2 $0, $1, $2;", word, *w[i : i + 2]) for i in (0, 2))
            found = _asm("max.NaN.bf16x2 $0, $1, $2;", word, a, b)
            low = arith.negf(utils.bitcast(arith.shli(found, utils.c(16, word)), f32))
            high = utils.bitcast(arith.andi(found, utils.c(-65536, word)), f32)
            out += [mgpu.FragmentedArray.splat(v, ()) for v in (low, high)]
        return out

    call: Any = run
    found = call(scratch, *flat)
    return [(found[2 * r], found[2 * r + 1]) for r in range(rows)]


def codes(parts: list, fmt: Int, scale: Any, zero: Any, whole_range: bool, layout: Any, splat: Any) -> list:
    chunk = parts[0].shape[0]
    reciprocal = divide(1.0, scale)
    grid = [scale, reciprocal] + ([] if zero is None else [zero])

    @plgpu.inline_mgpu(
        arg_types=((splat,) * len(grid), (layout,) * len(parts)),
        return_type=[plgpu.ShapeDtypeStruct((chunk,), jnp.int8, layout=layout)] * len(parts),
    )
    def run(_: Any, grid: Any, parts: Any) -> Any:
        word, byte, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8), ir.F32Type.get()

        def c(v: float) -> Any:
            return utils.c(v, f32)

        scale, upper, *zero = (g.registers.item() for g in grid)
        error = math.fma(arith.negf(upper), scale, c(1.0))
        lower = arith.mulf(error, upper)
        least, most, center = None, None, None
        if zero:
            most = arith.subf(c(float(fmt.qmax)), zero[0])
            least = arith.subf(c(float(fmt.qmin)), zero[0])
            center = arith.subf(zero[0], c(2.0 ** (fmt.bits - 1)))
        elif not whole_range:
            least, most = c(float(fmt.qmin)), c(float(fmt.qmax))
        if whole_range:
            least = None

        def one(a: Any) -> Any:
            q = math.fma(a, upper, arith.mulf(a, lower))
            if most is not None:
                q = arith.minimumf(q, most)
            if least is not None:
                q = arith.maximumf(q, least)
            q = arith.addf(q, c(WHOLE))
            if center is not None:
                q = arith.addf(q, center)
            return utils.bitcast(q, word)

        def four(words: list) -> Any:
            found = []
            for w in words:
                found.append(one(utils.bitcast(arith.shli(w, utils.c(16, word)), f32)))
                found.append(one(utils.bitcast(arith.andi(w, utils.c(-65536, word)), f32)))
            a, b = (utils.prmt(*found[i : i + 2], utils.c(0x0040, word)) for i in (0, 2))
            return utils.prmt(a, b, utils.c(0x5410, word))

        out = []
        for p in parts:
            words = _words(p.registers.item())
            register = _vector([four(words[i : i + 2]) for i in range(0, len(words), 2)], byte)
            out.append(
                mgpu.FragmentedArray(
                    _registers=np.asarray([register], dtype=object), _layout=p.layout, _is_signed=True
                )
            )
        return out

    call: Any = run
    return call(tuple(grid), tuple(parts))


def store(ref: Any, value: Any, splat: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat))
    def run(_: Any, ref: Any, value: Any) -> None:
        word = ir.IntegerType.get_signless(32)
        from jaxlib.mlir.dialects import scf

        first = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(utils.thread_idx(), utils.c(127, word)), utils.c(0, word))
        with ir.InsertionPoint(scf.IfOp(first).then_block):
            memref.store(value.registers.item(), ref, [])
            scf.yield_([])

    call: Any = run
    call(ref, value)
