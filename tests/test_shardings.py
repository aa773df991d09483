"""Where a quantized model goes on a mesh, and that it computes there what it does on one device."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.quantizer import per_channel, per_group, quantize_weight
from tests.zoo.specimen import normal

MESH = AbstractMesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
ROOT = Path(__file__).parents[1]


def quantized(shape: tuple[int, ...], quantizer: jaxq.Quantizer, axes: tuple[int, ...] = (0,)) -> jaxq.QTensor:
    return quantize_weight(normal(0, *shape), quantizer, axes)


def specs(tree: object, specs: object) -> object:
    return jax.tree.map(lambda s: s.spec, jaxq.shardings(tree, specs, MESH))


def test_codes_go_with_the_weight_and_scales_along_the_axes_they_have():
    leaf = quantized((1024, 16), per_channel(jaxq.Int(4, symmetric=False)))
    found = specs({"w": leaf, "b": normal(1, 16)}, {"w": P("model", "data"), "b": P("data")})
    assert found["b"] == P("data")
    assert found["w"].codes == P("model", "data")
    assert found["w"].grid.scale == found["w"].grid.zero == P(None, "data")
    packed = specs(jaxq.pack({"w": leaf}), {"w": P("model", "data")})["w"]
    assert packed.planes == (P("model", "data"),) and packed.stored == found["w"].grid


def test_runs_of_channels_stay_whole():
    leaf = quantized((1024, 16), per_group(jaxq.Int(4), 128))
    assert specs({"w": leaf}, {"w": P("model")})["w"].grid.scale == P("model", None)
    with pytest.raises(ValueError, match=r"w: axis 0 \(2 scales, one for each 512 of the 1024\).*4 equal parts"):
        jaxq.shardings({"w": quantized((1024, 16), per_group(jaxq.Int(4), 512))}, {"w": P("model")}, MESH)


def test_heads_and_stacked_layers():
    """[layers, heads, channels, out], as Flax's attention has its output: packed along heads and channels as one."""
    leaf = quantized((2, 8, 128, 16), per_channel(jaxq.Int(4)), (1, 2))
    packed = jaxq.pack({"w": leaf})
    assert packed["w"].rows == (8, 128)
    assert specs(packed, {"w": P("data", "model")})["w"].planes == (P("data", "model", None),)
    assert specs(packed, {"w": P(None, None, None, "model")})["w"].planes == (P(None, None, "model"),)
    with pytest.raises(ValueError, match="w: axes 1 to 2 are packed as one: only axis 1"):
        jaxq.shardings(packed, {"w": P(None, None, "model")}, MESH)


def test_a_weight_stored_by_columns():
    """[layers, out, in]: its planes are [layers, bytes, out]."""
    packed = jaxq.pack({"w": quantized((2, 16, 1024), per_channel(jaxq.Int(4)), (2,))})
    assert packed["w"].planes[0].shape == (2, 512, 16)
    assert specs(packed, {"w": P("data", "model")})["w"].planes == (P("data", None, "model"),)
    assert specs(packed, {"w": P(None, None, "model")})["w"].planes == (P(None, "model", None),)


def test_what_cannot_be_cut_is_an_error_with_the_path():
    four, eight = (jaxq.pack({"w": quantized((512, 12), per_channel(jaxq.Int(b)))}) for b in (4, 8))
    with pytest.raises(ValueError, match="w: 512 codes of 4 bits, packed along axis 0 in blocks of 256.* 4 parts"):
        jaxq.shardings(four, {"w": P("model")}, MESH)
    assert specs(eight, {"w": P("model")})["w"].planes == (P("model", None),), "bytes have no blocks"
    with pytest.raises(ValueError, match=r"w: axis 1 \(12\) cannot be cut into 8"):
        jaxq.shardings(four, {"w": P(None, ("data", "model"))}, MESH)
    with pytest.raises(ValueError, match="w: its spec names 'expert'; the mesh's axes are data, model"):
        jaxq.shardings(four, {"w": P("expert")}, MESH)
    with pytest.raises(ValueError, match="w: .* has 3 entries, the parameter 2 axes"):
        jaxq.shardings(four, {"w": P(None, None, "data")}, MESH)
    with pytest.raises(ValueError, match="v"):
        jaxq.shardings(four, {"v": P()}, MESH)


def test_a_prefix_serves_a_subtree_and_inputs_are_everywhere():
    def forward(p, x):
        return (x * p["norm"]["scale"] + p["norm"]["bias"]) @ p["w"] + p["b"]

    norm = {"scale": normal(3, 1, 16), "bias": normal(4, 1, 16)}
    params, x = {"norm": norm, "w": normal(0, 16, 8), "b": normal(1, 1, 8)}, normal(2, 4, 16)
    q = jaxq.calibrate(forward, params, [x], jaxq.chain(jaxq.os_plus(), jaxq.quantize()))
    found = jaxq.shardings(q, P(), MESH)
    assert jax.tree.structure(found) == jax.tree.structure(q)
    assert q.inputs and q.transforms
    assert not any(any(s.spec) for s in jax.tree.leaves(found))


def test_specs_that_flax_keeps_beside_its_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.up = nnx.Linear(16, 8, kernel_init=init, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.up(x)

    with use_abstract_mesh(MESH):
        graph, params = nnx.split(jax.eval_shape(lambda: Model(nnx.Rngs(0))))
    params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), params)
    x = normal(0, 4, 16)
    q = jaxq.calibrate(lambda p, x: nnx.merge(graph, p)(x), params, [x], jaxq.quantize())
    found = jaxq.shardings(q, nnx.get_partition_spec(params), MESH)
    assert found.params["up"]["kernel"].get_value().codes.spec == P(None, "model")


def launch(*args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.on_mesh", *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> None:
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for out, err in said:
        assert out.endswith("the same\n"), err


@pytest.mark.slow
def test_products_on_eight_devices():
    finish(launch("products"))


@pytest.mark.slow
def test_a_model_on_eight_devices():
    finish(launch("model"))


@pytest.mark.slow
def test_a_model_in_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    finish(*(launch("process", port, str(index)) for index in range(2)))
