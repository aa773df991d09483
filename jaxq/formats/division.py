"""Division as IEEE has it, whatever XLA is compiling."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxq.devices import on_accelerator

# The sign, the exponent and half of the significand (12 of 24 bits): products of two such halves are exact.
UPPER = 0xFFFFF000


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, correctly rounded in every context (on GPUs and TPUs: see `_divide_by_reciprocal`); equal ranks.

    XLA turns a division by a broadcast or constant into a multiplication by the reciprocal, and `(a / b) / c` into
    `a / (b * c)`, depending on what it is compiled with. That moves values across rounding ties, so that the codes of
    the same `x` would differ between eager and jit, or between a scale and its repetition. Operands that are selected
    elementwise are left alone.
    """
    if on_accelerator():
        return _divide_by_reciprocal(a, b)
    return jnp.where(b == b, a, b) / jnp.where(a == a, b, jnp.ones_like(b))


def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b` of float32 numbers, to be rounded to codes; equal ranks; not differentiable on GPUs and TPUs.

    As `divide`, but there faster: of quotients that float32 does not hold, one in some thousands is a neighbour of
    the nearest number. Ties between codes are exact, so that their codes are the same.
    """
    return _ratio_by_reciprocal(a, b) if on_accelerator() else divide(a, b)


@jax.custom_jvp
@partial(jax.jit, inline=True)
def _divide_by_reciprocal(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b` for GPUs and TPUs, where XLA's own division is not exact: on GPUs it is slow and yet up to two units in
    the last place from the nearest number, on TPUs it is a product with an estimate of the reciprocal.

    A quotient by the reciprocal, which has the shape of `b`, so that there is no division for each number; and what
    that quotient times `b` exceeds `a` by, exactly, divided likewise and taken off. XLA makes no fused multiply-add, so
    the exact product is Dekker's, of halves (Numerische Mathematik 18, 1971). Quotients that float32 holds, among them
    all ties between codes, come out exactly; of the others a few in a million are a neighbour of the nearest number.

    So it is for |a| from 2**-120 and |b| from 2**-126 on. Quotients of numbers of 8 bits (bfloat16) are nowhere near a
    tie between such: the first one already rounds to the right one.
    """
    dtype = jnp.result_type(a, b)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    reciprocal, halves = 1 / b, _halves(b)
    quotient = a * reciprocal
    if dtype == jnp.bfloat16:
        return quotient.astype(dtype)
    upper, lower = _halves(quotient)
    excess = _excess(upper, a, halves) + lower * halves[0] + lower * halves[1]
    return _corrected(quotient, quotient, excess, reciprocal).astype(dtype)


@_divide_by_reciprocal.defjvp
def _divide_by_reciprocal_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (a, b), (da, db) = primals, tangents
    quotient = _divide_by_reciprocal(a, b)
    return quotient, (da - quotient * db) / b


@partial(jax.jit, inline=True)
def _ratio_by_reciprocal(a: jax.Array, b: jax.Array) -> jax.Array:
    """The excess not of the whole quotient but of its upper half, which takes the lower half's place: that one then has
    the errors of two roundings, some 2**-11 units of the quotient's last place."""
    reciprocal = 1 / b
    quotient = a * reciprocal
    upper, _ = _halves(quotient)
    return _corrected(quotient, upper, _excess(upper, a, _halves(b)), reciprocal)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two numbers of 12 bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = jax.lax.bitcast_convert_type(bits & jnp.uint32(UPPER), jnp.float32)
    return upper, x - upper


def _excess(upper: jax.Array, a: jax.Array, b: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`upper * b - a`, exactly. This way around a zero keeps its sign."""
    return (upper * b[0] - a) + upper * b[1]


def _corrected(quotient: jax.Array, part: jax.Array, excess: jax.Array, reciprocal: jax.Array) -> jax.Array:
    """What is left of `part` of the quotient, less the excess. There is none, or an infinite one, of quotients by 0 or
    infinity, or larger than float32's largest."""
    return jnp.where(jnp.abs(excess) < jnp.inf, part - excess * reciprocal, quotient)
