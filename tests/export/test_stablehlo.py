"""Read back by JAX alone, in a process that has no jaxq."""

import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

import jaxq
from jaxq import Float, Int, per_group, per_token
from jaxq.export import stablehlo
from tests.tiny import OPT, tiny_model

pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers, which JAX does not install")
TOKENS = np.random.default_rng(0).integers(0, 1024, (2, 8), np.int32)
RECIPES = {
    "W8A8": jaxq.quantize(Int(8), Int(8)),
    "W4A8": jaxq.quantize(per_group(Int(4, False), 8), per_token(Int(8, False))),
    "FP4": jaxq.quantize(Float(2, 1), Float(2, 1)),
}
ALONE = """
import sys
import jax, jax.export, numpy as np
found = dict(np.load("arrays.npz"))
tokens = found.pop("tokens")
exported = jax.export.deserialize(bytearray(open("forward.bin", "rb").read()))
np.save("logits.npy", exported.call(found, tokens))
assert not [name for name in sys.modules if name.startswith(("jaxq", "flax"))]
"""


@pytest.fixture(scope="module")
def model():
    return tiny_model(OPT, num_hidden_layers=1)


@pytest.mark.parametrize("packed", (False, True), ids=("simulated", "packed"))
@pytest.mark.parametrize(
    "step",
    [RECIPES["W8A8"], pytest.param(RECIPES["W4A8"], marks=pytest.mark.slow), RECIPES["FP4"]],
    ids=RECIPES.keys(),
)
def test_one_file_for_three_platforms(model, step, packed):
    q = jaxq.calibrate(model.forward, model.params, [TOKENS], jaxq.skip(["embed/*"], step))
    q = jaxq.pack(q) if packed else q
    data, arrays = stablehlo(model.forward, q, jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype))
    again = jax.export.deserialize(bytearray(data))
    assert again.platforms == ("cpu", "tpu", "cuda")
    run = jax.jit(jaxq.execute(model.forward))
    np.testing.assert_array_equal(again.call(arrays, TOKENS), run(q, TOKENS))
    assert any(name.startswith(".params['layers'][0]['mlp']['up']['kernel'].") for name in arrays)
    assert not [name for name in arrays if name.startswith(".transforms")]


@pytest.mark.slow
def test_it_runs_where_there_is_no_jaxq(model, tmp_path):
    step = jaxq.chain(jaxq.os_plus(), jaxq.quantize())
    q = jaxq.pack(jaxq.calibrate(model.forward, model.params, [TOKENS], jaxq.skip(["embed/*"], step)))
    data, arrays = stablehlo(model.forward, q, TOKENS, platforms=("cpu",))
    (tmp_path / "forward.bin").write_bytes(data)
    np.savez(tmp_path / "arrays.npz", tokens=TOKENS, **arrays)
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True)
    want = jax.jit(jaxq.execute(model.forward))(q, TOKENS)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), want)
