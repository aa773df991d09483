"""Quantized models give on a mesh what they give on one device.

`test_shardings` runs it in processes of its own, which have other devices than the tests': `python -m tests.on_mesh`
`products` and `model` on eight, `process PORT INDEX` on two of each of two processes.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxq
from jaxq.kernels import bands
from jaxq.kernels.plain import Integers, activation_integers, product, weight_integers
from jaxq.kernels.tpu import packed_product
from jaxq.qtensor import PerTensor
from jaxq.quantizer import per_channel, per_tensor, quantize_weight
from tests.tiny import OPT, tiny_model

WIDTH = 1024  # four blocks of packed codes
ASYMMETRIC = jaxq.Int(8, symmetric=False)
RECIPES = {
    "w8a8": jaxq.chain(jaxq.smooth_quant(), jaxq.quantize(jaxq.Int(8), ASYMMETRIC)),
    "w4a8": jaxq.quantize(jaxq.Int(4), ASYMMETRIC),
    "e2m1": jaxq.quantize(jaxq.Float(2, 1), jaxq.Float(2, 1)),
    "w3": jaxq.quantize(jaxq.Int(3), None),
}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spec_of(keys: tuple, leaf: np.ndarray) -> P:
    """Columns of q, k, v and up, rows of out and down."""
    *_, module, name = (str(getattr(key, "key", key)) for key in keys)
    if module in ("q", "k", "v", "up"):
        return P(None, "model") if name == "kernel" else P("model")
    return P("model") if module in ("out", "down") and name == "kernel" else P()


def place(tree, specs, mesh: Mesh):
    return jax.device_put(tree, jaxq.shardings(tree, specs, mesh))


def whole(a: jax.Array) -> np.ndarray:
    """An array of all processes, on the host."""
    return np.asarray(a) if a.is_fully_addressable else multihost_utils.process_allgather(a, tiled=True)


def check_same(got: np.ndarray, want: np.ndarray, what: str) -> None:
    """But for the order of float sums, and what that brings to the other side of a rounding: a few tokens, slightly."""
    assert np.median(np.abs(got - want)) <= 1e-6 * np.abs(want).max(), what
    check_near(got, want, what)


def check_near(got: np.ndarray, want: np.ndarray, what: str) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * np.abs(want).max(), err_msg=what)


def check_model(mesh: Mesh, names: list[str]) -> None:
    """Data and tensor parallel, simulated and packed; then calibrated there."""
    model = tiny_model(
        OPT, num_hidden_layers=1, hidden_size=WIDTH, ffn_dim=WIDTH, vocab_size=128, word_embed_proj_dim=WIDTH
    )
    params = jax.tree.map(lambda a: a * np.float32(0.1) if a.ndim > 1 else a, model.params)
    specs = jax.tree_util.tree_map_with_path(spec_of, params)
    tokens = np.random.default_rng(0).integers(0, 128, (8, 16)).astype(np.int32)
    run, data = jax.jit(jaxq.execute(model.forward)), jax.device_put(tokens, NamedSharding(mesh, P("data")))
    for name in names:
        recipe = jaxq.skip(["embed*"], RECIPES[name])
        q = jaxq.calibrate(model.forward, params, [tokens], recipe)
        for tree in (q, jaxq.pack(q)):
            want, placed = np.asarray(run(tree, tokens)), place(tree, specs, mesh)
            rows = jax.tree.leaves(placed.params["layers"][0]["mlp"]["down"]["kernel"])[0]
            assert rows.addressable_shards[0].data.shape[0] == rows.shape[0] // 2
            got = run(placed, data)
            assert len(got.sharding.device_set) == mesh.size
            check_same(whole(got), want, name)
    there = jaxq.pack(jaxq.calibrate(model.forward, place(params, specs, mesh), [data], recipe))
    check_near(whole(run(place(there, specs, mesh), data)), want, f"{name}, calibrated on the mesh")


def mlp(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


MLP = {"up": draw(0, 256, WIDTH), "down": draw(1, WIDTH, 64)}
MLP_SPECS = {"up": P(None, "model"), "down": P("model")}


def check_integers(mesh: Mesh) -> None:
    """Sums of integers are the same in whatever parts they are taken, hence all that is made of them, bit for bit."""
    x = draw(2, 32, 256)
    for weights, activations in ((jaxq.Int(8), jaxq.Int(8)), (jaxq.Int(4), ASYMMETRIC)):
        packed = jaxq.pack(jaxq.calibrate(mlp, MLP, [x], jaxq.quantize(weights, activations)))
        run = jax.jit(jaxq.execute(mlp))
        got = run(place(packed, MLP_SPECS, mesh), jax.device_put(x, NamedSharding(mesh, P("data"))))
        np.testing.assert_array_equal(got, run(packed, x))


def check_explicit(mesh: Mesh) -> None:
    """Where the mesh's axes are part of the types, and the program says how a product is sharded."""
    mesh, x = Mesh(mesh.devices, mesh.axis_names, (AxisType.Explicit,) * 2), draw(2, 32, 256)
    data = NamedSharding(mesh, P("data"))

    def told(params, x):
        return jnp.dot(jax.nn.relu(x @ params["up"]), params["down"], out_sharding=data)

    q = jaxq.calibrate(mlp, MLP, [x], jaxq.quantize(jaxq.Int(4), ASYMMETRIC))
    for tree in (q, jaxq.pack(q)):
        want = jax.jit(jaxq.execute(mlp))(tree, x)
        got = jax.jit(jaxq.execute(told))(place(tree, MLP_SPECS, mesh), jax.device_put(x, data))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def check_shard_map(mesh: Mesh) -> None:
    """Each device multiplies its columns of `up` with its rows of `down`: the parts of the sum are added here."""
    x = draw(2, 32, 256)
    for weights in (jaxq.Int(4, symmetric=False), jaxq.Int(5), jaxq.Float(2, 1)):
        q = jaxq.calibrate(mlp, MLP, [x], jaxq.quantize(weights, ASYMMETRIC))
        for tree in (q, jaxq.pack(q)):
            specs = jax.tree.map(lambda s: s.spec, jaxq.shardings(tree, MLP_SPECS, mesh))
            parts = jax.shard_map(
                lambda tree, x: jax.lax.psum(jaxq.execute(mlp)(tree, x), "model"),
                mesh=mesh,
                in_specs=(specs, P("data")),
                out_specs=P("data"),
            )
            want = jax.jit(jaxq.execute(mlp))(tree, x)
            np.testing.assert_allclose(jax.jit(parts)(tree, x), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def check_kernels(mesh: Mesh) -> None:
    """The TPU's kernel, interpreted, on each device's tokens and columns: what it means on one device."""
    x, w = draw(2, 16, WIDTH), draw(3, WIDTH, 512)
    for fmt, inputs in ((jaxq.Int(4), ASYMMETRIC), (jaxq.Float(2, 1), jaxq.Float(2, 1)), (jaxq.Int(4), None)):
        leaf = jaxq.pack({"w": quantize_weight(jnp.asarray(w), per_channel(fmt), (0,))})["w"]
        grid = None if inputs is None else quantize_weight(jnp.asarray(x), per_tensor(inputs), (0, 1)).grid

        def read(x: jax.Array, inputs=inputs, grid=grid) -> Integers:
            return (
                Integers(x.astype(jnp.bfloat16))
                if inputs is None
                else activation_integers(x, inputs, PerTensor(), grid, (1,))
            )

        def kernel(x: jax.Array, leaf: jaxq.Packed, read=read, fmt=fmt) -> jax.Array:
            weights = weight_integers(leaf.unpack())
            return packed_product(read(x), leaf.planes[0], weights, fmt, None, "TPU v6 lite", interpret=True)

        specs = jax.tree.map(lambda s: s.spec, jaxq.shardings({"w": leaf}, P(None, "model"), mesh))["w"]
        parts = jax.shard_map(
            kernel, mesh=mesh, in_specs=(P("data"), specs), out_specs=P("data", "model"), check_vma=False
        )
        want = product(read(jnp.asarray(x)), weight_integers(leaf.unpack()), None, "int8")
        np.testing.assert_allclose(jax.jit(parts)(x, leaf), want, rtol=2e-6, atol=1e-5 * np.abs(want).max())


def check_no_checkpoint(mesh: Mesh) -> None:
    params = jax.device_put(MLP, NamedSharding(mesh, P("model")))
    try:
        jaxq.calibrate(mlp, params, [draw(2, 32, 256)], jaxq.quantize(), checkpoint="never made")
    except ValueError as error:
        assert "down is spread over several processes" in str(error), error
    else:
        raise AssertionError("one process does not have what the checkpoint would be of")


def grid_of_devices(data: int, model: int) -> Mesh:
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def products() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = grid_of_devices(4, 2)
    check_integers(mesh)
    check_explicit(mesh)
    check_shard_map(mesh)
    bands.SMALL, bands.BAND, bands.STEP = 1, 1, 8
    check_integers(mesh)
    check_shard_map(mesh)
    check_kernels(mesh)


def model() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    check_model(grid_of_devices(4, 2), list(RECIPES))


def process(port: str, index: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
    mesh = grid_of_devices(2, 2)
    check_no_checkpoint(mesh)
    check_model(mesh, ["e2m1", "w8a8"])


if __name__ == "__main__":
    {"products": products, "model": model, "process": process}[sys.argv[1]](*sys.argv[2:])
    print("the same")
