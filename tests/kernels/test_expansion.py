"""Each of the 16 codes of each format, in each place of a word, becomes the bfloat16 that stands for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import Float, Int
from jaxq.kernels.expansion import code_values, expansion

VALUES = {  # of the codes 0 to 7, and then of 8 to 15
    Int(4): [*range(8), *range(-8, 0)],
    Int(4, symmetric=False): [*range(-8, 8)],
    Float(2, 1): [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6],
    Float(1, 2): [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 0, -0.5, -1, -1.5, -2, -2.5, -3, -3.5],
    Float(3, 0): [0, 0.25, 0.5, 1, 2, 4, 8, 16, 0, -0.25, -0.5, -1, -2, -4, -8, -16],
}


@pytest.mark.parametrize("nibble", range(4))
@pytest.mark.parametrize("fmt", VALUES, ids=str)
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
        assert np.array_equal(found / e.unit, np.array(VALUES[fmt])[codes])
        assert np.array_equal(found, found.astype(jnp.bfloat16).astype(float)), "bfloat16 holds it"


@pytest.mark.parametrize("fmt", VALUES, ids=str)
def test_plain_meaning(fmt):
    assert np.array_equal(code_values(fmt, jnp.arange(16, dtype=jnp.uint8)), np.array(VALUES[fmt]))


def test_other_formats_have_none():
    with pytest.raises(ValueError, match="not a format of 4 bits"):
        expansion(Float(2, 3))
