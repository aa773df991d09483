"""What `check_weights` finds in a saved model's arrays."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import pytest

import jaxq
from jaxq import storage
from jaxq.quantizer import quantize_weight
from jaxq.storage.models import check_weights
from tests.zoo.specimen import weight


@pytest.mark.parametrize("quantizer", [jaxq.mxfp4(), jaxq.nvfp4(), jaxq.per_channel(jaxq.Int(4))])
def test_a_packed_scale_that_is_no_number(quantizer, tmp_path):
    leaf = jaxq.pack({"w": quantize_weight(weight(0, 64, 8), quantizer, (0,))})["w"]
    scale = leaf.stored.scale
    no_number = scale.at[0, 3].set(255 if scale.dtype == jnp.uint8 else jnp.nan)
    for name, stored in {"right": leaf.stored, "wrong": replace(leaf.stored, scale=no_number)}.items():
        storage.save(tmp_path / name, jaxq.Quantized({"layer": {"w": replace(leaf, stored=stored)}}), {})
    check_weights(tmp_path / "right")
    with pytest.raises(ValueError, match=r"arrays: layer/w holds NaN or infinity; quantize the model or copy it again"):
        check_weights(tmp_path / "wrong")
