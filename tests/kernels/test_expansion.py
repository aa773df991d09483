"""Each code of each format, in each place of a word, becomes the bfloat16 that stands for it, or two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import Float, Int
from jaxq.kernels.expansion import code_values, expansions

EIGHT = [Float(4, 3, reserved=1), Float(5, 2, reserved=4), Float(3, 4), Float(2, 5)]
VALUES = {  # of the codes 0 to 7, and then of 8 to 15
    Int(4): [*range(8), *range(-8, 0)],
    Int(4, symmetric=False): [*range(-8, 8)],
    Float(2, 1): [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6],
    Float(1, 2): [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 0, -0.5, -1, -1.5, -2, -2.5, -3, -3.5],
    Float(3, 0): [0, 0.25, 0.5, 1, 2, 4, 8, 16, 0, -0.25, -0.5, -1, -2, -4, -8, -16],
    Int(8): np.arange(256).astype(np.uint8).view(np.int8),
    Int(8, symmetric=False): np.arange(256).astype(np.uint8).view(np.int8),  # as they are packed: less 128
}
for fmt in EIGHT:
    code = np.arange(256)
    m, exponent = fmt.mantissa_bits, code % 128 >> fmt.mantissa_bits
    fraction = code % 2**m / 2**m
    magnitude = np.where(exponent == 0, 2 * fraction, (1 + fraction) * 2.0**exponent) / 2.0**fmt.bias
    VALUES[fmt] = np.where(code < 128, magnitude, -magnitude)


def found_in(fmt: Int | Float, words: np.ndarray, half: int, byte: int, place: int) -> np.ndarray:
    """Subnormal numbers are flushed to zero by XLA on CPU, not by a GPU: the factor is applied in numpy."""
    total = np.zeros(len(words))
    given = jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.int32)
    for e in expansions(fmt) if fmt.bits == 8 else expansions(fmt)[place : place + 1]:
        bits = np.asarray(e.bits(e.flipped(given), byte)).view(np.uint32) >> (16 * half) & 0xFFFF
        numbers = (bits << 16).view(np.float32).astype(float) * e.factor - e.less
        assert np.array_equal(numbers, numbers.astype(jnp.bfloat16).astype(float)), "bfloat16 holds it"
        total += numbers / e.unit
    return total


@pytest.mark.parametrize("fmt", VALUES, ids=str)
def test_all_codes_in_all_places(fmt):
    codes = np.arange(2**fmt.bits)
    rest = np.random.default_rng(0).integers(0, 2**32, codes.size, dtype=np.uint64)
    for half, byte, place in np.ndindex(2, 2, 8 // fmt.bits):
        at = np.uint64(16 * half + 8 * byte + 4 * place)
        kept = rest & ~(np.uint64(2**fmt.bits - 1) << at)
        words = (kept | codes.astype(np.uint64) << at).astype(np.uint32)
        assert np.array_equal(found_in(fmt, words, half, byte, place), VALUES[fmt])


@pytest.mark.parametrize("fmt", VALUES, ids=str)
def test_plain_meaning(fmt):
    assert np.array_equal(code_values(fmt, jnp.arange(2**fmt.bits).astype(jnp.uint8)), np.asarray(VALUES[fmt], float))


def test_other_formats_have_none():
    for fmt in (Float(2, 3), Int(6), Float(7, 0)):
        with pytest.raises(ValueError, match="has no expansion"):
            expansions(fmt)
