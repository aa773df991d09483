"""The bytes of packed codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxq.kernels.layout import BLOCK, HALF, RUNS, pack_codes, plane_rows, signed, unpack_codes, unpack_run, widths


def random_codes(seed: int, bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)


@settings(max_examples=8, deadline=None)
@given(st.integers(2, 8), st.sampled_from([0, 5, 40, 256, 531]), st.sampled_from([(), (2,)]), st.integers(0, 9))
def test_unpack_is_the_inverse_without_waste(bits, k, lead, seed):
    codes = random_codes(seed, bits, *lead, k, 3)
    planes = jax.jit(pack_codes, static_argnums=1)(jnp.asarray(codes), bits)
    assert all(plane.dtype == jnp.uint8 for plane in planes)
    assert [plane.shape for plane in planes] == [(*lead, plane_rows(k, w), 3) for w in widths(bits)]
    if k % 8 == 0:
        assert sum(plane.size for plane in planes) == codes.size * bits // 8
    np.testing.assert_array_equal(jax.jit(unpack_codes, static_argnums=(1, 2))(planes, bits, k), codes)


def test_four_bits_are_two_halves_of_a_block():
    """The bytes as the module's table says, written out with numpy."""
    codes = random_codes(0, 4, 512 + 13, 2)
    (plane,) = pack_codes(jnp.asarray(codes), 4)
    blocks = [codes[:256], codes[256:512], np.concatenate([codes[512:], np.zeros((1, 2), np.uint8)])]
    want = np.concatenate([b[: len(b) // 2] | b[len(b) // 2 :] << 4 for b in blocks])
    np.testing.assert_array_equal(plane, want)


def test_seven_bits_are_three_planes():
    codes = random_codes(0, 7, 256, 1)
    four, two, one = pack_codes(jnp.asarray(codes), 7)
    quarters, eighths = (codes >> 4 & 3).reshape(4, 64, 1), (codes >> 6).reshape(8, 32, 1)
    np.testing.assert_array_equal(four, codes[:128] & 15 | (codes[128:] & 15) << 4)
    np.testing.assert_array_equal(two, sum(q << 2 * i for i, q in enumerate(quarters)))
    np.testing.assert_array_equal(one, sum(e << i for i, e in enumerate(eighths)))


def test_foreign_planes_are_refused():
    planes = pack_codes(jnp.zeros((32, 4), jnp.uint8), 4)
    with pytest.raises(ValueError, match=r"planes of \[16\] rows are not those of 40 codes of 4 bits: .* \[20\] rows"):
        unpack_codes(planes, 4, 40)
    with pytest.raises(ValueError, match=r"not those of 32 codes of 6 bits"):
        unpack_codes(planes, 6, 32)
    with pytest.raises(ValueError, match="9 bits; possible are 2 to 8"):
        pack_codes(jnp.zeros((32, 4), jnp.uint8), 9)


@pytest.mark.parametrize("bits", range(2, 9))
def test_runs_of_blocks_and_of_half_a_block(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (2 * BLOCK + HALF, 3)).astype(np.uint8)
    planes = pack_codes(jnp.asarray(codes), bits)
    blocks, half = codes[: 2 * BLOCK].reshape(2, RUNS, -1, 3), codes[2 * BLOCK :].reshape(RUNS, -1, 3)
    for run in range(RUNS):
        np.testing.assert_array_equal(unpack_run(planes, bits, run), blocks[:, run].reshape(-1, 3))
        np.testing.assert_array_equal(unpack_run(planes, bits, run, last=True), half[run])


@pytest.mark.parametrize("bits", range(2, 9))
def test_signs(bits):
    numbers = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8)
    codes = jnp.asarray(numbers.view(np.uint8) & np.uint8(2**bits - 1))
    np.testing.assert_array_equal(signed(codes, bits), numbers)
