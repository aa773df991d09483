"""Each of the 16 codes of each format, in each place of a word, becomes the bfloat16 that stands for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import Float, Int, decode
from jaxq.kernels.expansion import expansion

FORMATS = [Int(4), Int(4, symmetric=False), Float(2, 1), Float(1, 2), Float(3, 0)]


def values(fmt: Int | Float, codes: np.ndarray) -> np.ndarray:
    """What 4-bit codes stand for at scale 1, an asymmetric integer's zero point being 8; float64."""
    if isinstance(fmt, Int):
        return ((codes.astype(int) ^ 8) - 8 if fmt.symmetric else codes.astype(int) - 8).astype(float)
    return np.asarray(decode(fmt, jnp.asarray(codes), jnp.ones((1, 1))), float)


@pytest.mark.parametrize("nibble", range(4))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_all_codes_in_all_places(fmt, nibble):
    """Subnormal numbers are flushed to zero by XLA on CPU, not by a GPU: the factor is applied in numpy."""
    low, high = (a.ravel() for a in np.meshgrid(np.arange(16), np.arange(16)))
    rest = np.random.default_rng(nibble).integers(0, 2**32, low.size, dtype=np.uint64)
    place = 4 * nibble
    kept = rest & ~np.uint64(0x000F000F << place)
    words = (kept | low.astype(np.uint64) << place | high.astype(np.uint64) << (16 + place)).astype(np.uint32)
    e = expansion(fmt)
    bits = np.asarray(e.bits(jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.int32), nibble)).view(np.uint32)
    for codes, half in ((low, bits & 0xFFFF), (high, bits >> 16)):
        numbers = (half.astype(np.uint32) << 16).view(np.float32).astype(float)
        found = (numbers - e.less) * e.factor
        assert np.array_equal(found / e.unit, values(fmt, codes.astype(np.uint8)[:, None])[:, 0])
        assert np.array_equal(found, found.astype(jnp.bfloat16).astype(float)), "bfloat16 holds it"


def test_other_formats_have_none():
    with pytest.raises(ValueError, match="not a format of 4 bits"):
        expansion(Float(2, 3))
