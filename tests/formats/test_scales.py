"""Scales of few bits against ml_dtypes' types, byte by byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxq.formats.scales import from_bytes, to_bytes

DTYPES = {"power_of_two": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn}
BYTES = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("scales", DTYPES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_every_byte_is_the_machines_number(scales, transform):
    found = np.asarray(transform(lambda a: from_bytes(scales, a))(jnp.asarray(BYTES)))
    want = BYTES.view(DTYPES[scales]).astype(np.float32)
    want = np.where(np.signbit(want), np.nan, want)  # scales are positive
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    numbers = ~np.isnan(want)
    assert found[numbers].tobytes() == want[numbers].tobytes()  # E8M0's 2**-127, which is subnormal, among them


@pytest.mark.parametrize("scales", DTYPES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_every_normal_number_is_its_byte(scales, transform):
    values = BYTES.view(DTYPES[scales]).astype(np.float32)
    normal = np.isfinite(values) & (values >= 2.0**-126)
    found = transform(lambda a: to_bytes(scales, a))(jnp.asarray(values))
    assert found.dtype == jnp.uint8 and normal.sum() == {"power_of_two": 254, "e4m3": 126}[scales]
    np.testing.assert_array_equal(np.asarray(found)[normal], BYTES[normal])


def test_real_scales_stay_as_they_are():
    a = jnp.array([0.3, -1.0, jnp.nan])
    assert from_bytes("real", a) is a and to_bytes("real", a) is a
