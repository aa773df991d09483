"""Checkpoints in and out: laziness, round trips, and an error that says what is wrong for each bad input."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxq.models import init, load, model_of, save_hf
from jaxq.models.build import flat
from jaxq.models.checkpoint import read_file, read_tensors, release, write_tensors

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = ("opt", "opt-post-norm", "llama", "llama-sharded", "mistral", "qwen2", "qwen3", "bloom")
# Of each: a tensor of the second layer, and how a configuration makes its shape another.
A_TENSOR = {
    "opt": ("model.decoder.layers.1.fc1.weight", {"ffn_dim": 48}),
    "llama": ("model.layers.1.mlp.up_proj.weight", {"intermediate_size": 48}),
    "llama-sharded": ("model.layers.1.mlp.up_proj.bias", {"intermediate_size": 48}),
    "mistral": ("model.layers.1.self_attn.v_proj.weight", {"num_key_value_heads": 1}),
    "qwen2": ("model.layers.1.self_attn.v_proj.bias", {"num_key_value_heads": 1}),
    "qwen3": ("model.layers.1.self_attn.q_norm.weight", {"head_dim": 8}),
    "bloom": ("transformer.h.1.self_attention.query_key_value.bias", {"hidden_size": 48}),
    "bert": ("encoder.layer.1.output.dense.weight", {"intermediate_size": 48}),
}


@pytest.fixture
def opt(tmp_path):
    return Path(shutil.copytree(GOLDEN / "opt", tmp_path / "opt"))


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(GOLDEN / "llama-sharded", tmp_path / "llama"))


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    tensors = {name: tensor.copy() for name, tensor in read_tensors(directory).items()}
    edit(tensors)
    write_tensors(directory, tensors, 10**9)


def bits(params):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flat(params).items()}


def is_mapped(leaf):
    base = leaf
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap) and not leaf.flags.owndata


class TestLoad:
    def test_paths_and_layout(self):
        model = load(GOLDEN / "opt")
        shapes = {path: leaf.shape for path, leaf in flat(model.params).items()}
        assert shapes["embed/embedding"] == (40, 24)
        assert shapes["positions/embedding"] == (18, 24)
        assert shapes["layers/0/attn/q/kernel"] == (24, 24)
        assert shapes["layers/1/mlp/up/kernel"] == (24, 40)
        assert shapes["layers/1/attn_norm/scale"] == (24,)
        assert (model.family, model.tokenizer) == ("opt", None)
        assert "lm_head/kernel" in flat(load(GOLDEN / "llama").params)

    def test_leaves_are_views_of_the_mapped_file(self):
        for leaf in jax.tree.leaves(load(GOLDEN / "llama-sharded").params):
            assert is_mapped(leaf) and not leaf.flags.writeable

    @pytest.mark.parametrize("name", ("opt", "mistral", "bloom"))
    @pytest.mark.parametrize("stored", (np.float16, ml_dtypes.bfloat16))
    @pytest.mark.slow
    def test_half_precision_stays_mapped(self, stored, name, tmp_path):
        model = load(GOLDEN / name)
        save_hf(model, jax.tree.map(lambda leaf: leaf.astype(stored), model.params), tmp_path / "half")
        assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == np.dtype(stored).name
        tokens = np.load(GOLDEN / name / "expected.npz")["tokens"]
        found = {}
        for asked, kept in ((None, stored), (stored, stored), (np.float32, np.float32)):
            half = load(tmp_path / "half", dtype=asked)
            assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype(kept)}
            assert asked is np.float32 or all(map(is_mapped, jax.tree.leaves(half.params)))
            with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix float32 statistics into half precision
                found[asked] = half.forward(half.params, tokens)
        assert found[stored].dtype == stored
        assert np.asarray(found[None]).tobytes() == np.asarray(found[np.float32]).tobytes()

    @pytest.mark.parametrize("prefix", ("", "decoder."))
    def test_names_without_their_prefix(self, opt, prefix):
        def rename(tensors):
            for name in list(tensors):
                tensors[prefix + name.removeprefix("model.decoder.")] = tensors.pop(name)

        edit_tensors(opt, rename)
        assert bits(load(opt).params) == bits(load(GOLDEN / "opt").params)

    @pytest.mark.parametrize("name, prefix", [("bloom", "transformer."), ("mistral", "model.")])
    def test_names_of_a_bare_decoder(self, name, prefix, tmp_path):
        def rename(tensors):
            for name in list(tensors):
                tensors[name.removeprefix(prefix)] = tensors.pop(name)

        copy = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
        edit_tensors(copy, rename)
        assert not any(name.startswith(prefix) for name in read_tensors(copy))
        assert bits(load(copy).params) == bits(load(GOLDEN / name).params)

    @pytest.mark.parametrize(
        "name, table", [("opt", "model.decoder.embed_tokens"), ("bloom", "transformer.word_embeddings")]
    )
    def test_the_redundant_head_of_a_tied_model_is_ignored(self, name, table, tmp_path):
        copy = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
        edit_tensors(copy, lambda t: t.update({"lm_head.weight": t[f"{table}.weight"]}))
        assert bits(load(copy).params) == bits(load(GOLDEN / name).params)

    def test_tables_of_rotary_positions_are_computed_anew(self, sharded):
        edit = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
        for file in sharded.glob("*.safetensors*"):
            if file.name != "model.safetensors":
                file.unlink()
        write_tensors(sharded, dict(read_tensors(GOLDEN / "llama-sharded")) | edit, 10**9)
        assert bits(load(sharded).params) == bits(load(GOLDEN / "llama-sharded").params)


class TestBadInput:
    def check(self, directory, error, *words):
        with pytest.raises(error) as caught:
            load(directory)
        for word in words:
            assert word in str(caught.value)

    def test_no_such_model(self):
        self.check("no-such-model", FileNotFoundError, "no-such-model", "stdlib-opt")

    def test_hub_out_of_reach(self, monkeypatch):
        import huggingface_hub

        def fail(*_, **__):
            raise OSError("no network")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        self.check("owner/model", FileNotFoundError, "owner/model", "hub", "OSError", "directory")

    def test_no_config(self, opt):
        (opt / "config.json").unlink()
        self.check(opt, FileNotFoundError, "config.json")

    def test_config_is_not_json(self, opt):
        (opt / "config.json").write_text("{")
        self.check(opt, ValueError, "config.json", "JSON")

    def test_unsupported_architecture(self, opt):
        edit_config(opt, model_type="mamba")
        self.check(opt, ValueError, "mamba", "opt, llama, mistral, qwen2, qwen3, bloom, bert", "docs/own_model.md")

    def test_config_is_a_list(self, opt):
        (opt / "config.json").write_text("[]")
        self.check(opt, ValueError, "config.json", "list")

    @pytest.mark.parametrize(
        ("key", "value"), [("num_hidden_layers", "4"), ("num_attention_heads", 0), ("hidden_size", -8)]
    )
    def test_sizes_that_are_none(self, opt, key, value):
        edit_config(opt, **{key: value})
        self.check(opt, ValueError, "config.json", key, repr(value), "positive integer")

    def test_heads_that_do_not_divide_the_width(self, opt):
        edit_config(opt, num_attention_heads=7)
        self.check(opt, ValueError, "config.json", "hidden_size", "7 attention heads")

    @pytest.mark.parametrize("content", ["{", "{}"])
    def test_damaged_tokenizer(self, opt, content):
        (opt / "tokenizer.json").write_text(content)
        (opt / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        self.check(opt, ValueError, str(opt), "tokenizer cannot be read")

    def test_incomplete_config(self, opt):
        config = json.loads((opt / "config.json").read_text())
        del config["ffn_dim"]
        (opt / "config.json").write_text(json.dumps(config))
        self.check(opt, ValueError, "config.json", "ffn_dim")

    def test_unknown_activation_function(self, opt):
        edit_config(opt, activation_function="swish9")
        self.check(opt, ValueError, "swish9", "relu")

    def test_unknown_rope_type(self, sharded):
        edit_config(sharded, rope_parameters={"rope_type": "longrope", "factor": 2.0})
        self.check(sharded, ValueError, "longrope", "llama3, yarn")

    def test_rope_without_its_settings(self, sharded):
        edit_config(sharded, rope_scaling={"type": "llama3", "factor": 2.0})
        self.check(sharded, ValueError, "llama3", "low_freq_factor")

    def test_rope_of_each_type_of_layer(self, sharded):
        edit_config(sharded, rope_parameters={"full_attention": {"rope_type": "default"}})
        self.check(sharded, ValueError, "each type of layer")

    @pytest.mark.parametrize(
        "types, words",
        [
            (["linear_attention"] * 2, ("linear_attention", "full_attention, sliding_attention")),
            (["full_attention"], ("1 entries for 2 layers",)),
            (["full_attention", "sliding_attention"], ("use_sliding_window",)),
        ],
    )
    def test_types_of_layers(self, types, words, tmp_path):
        copy = Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3"))
        edit_config(copy, layer_types=types)
        self.check(copy, ValueError, *words)

    def test_partial_rotation(self, sharded):
        edit_config(sharded, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5})
        self.check(sharded, ValueError, "partial_rotary_factor")

    @pytest.mark.parametrize("keep", (0, 5, 100, 30_000))
    def test_truncated_file(self, opt, keep):
        weights = opt / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:keep])
        self.check(opt, ValueError, str(weights))

    def test_garbage_file(self, opt):
        (opt / "model.safetensors").write_bytes(bytes(range(256)) * 8)
        self.check(opt, ValueError, "model.safetensors")

    def test_tensor_of_unusable_type(self, opt):
        weights = opt / "model.safetensors"
        weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"I32"', 1))
        self.check(opt, ValueError, "model.safetensors", "I32", "BF16")

    def test_missing_shard(self, sharded):
        (sharded / "model-00002-of-00005.safetensors").unlink()
        self.check(sharded, FileNotFoundError, "model-00002-of-00005.safetensors", "missing")

    def test_broken_index(self, sharded):
        (sharded / "model.safetensors.index.json").write_text("{}")
        self.check(sharded, ValueError, "index.json")

    def test_index_names_an_absent_tensor(self, sharded):
        index = sharded / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.extra.weight"] = "model-00001-of-00005.safetensors"
        index.write_text(json.dumps(content))
        self.check(sharded, ValueError, "model.extra.weight", "model-00001-of-00005.safetensors")

    @pytest.mark.parametrize("name", A_TENSOR)
    def test_config_and_weights_contradict_each_other(self, name, tmp_path):
        tensor, changes = A_TENSOR[name]
        shape = read_tensors(GOLDEN / name)[tensor].shape
        for i, (words, edit) in enumerate(
            (
                ((tensor, "missing", str(shape)), lambda t: t.pop(tensor)),
                (("extra.weight", "(40,)", "no place"), lambda t: t.update({"extra.weight": np.zeros(40, np.float32)})),
                ((tensor, str(shape), "(7,)"), lambda t: t.update({tensor: np.zeros(7, np.float32)})),
            )
        ):
            copy = tmp_path / str(i)
            copy.mkdir()
            shutil.copy(GOLDEN / name / "config.json", copy)
            tensors = dict(read_tensors(GOLDEN / name))
            edit(tensors)
            write_tensors(copy, tensors, 9000)
            self.check(copy, ValueError, str(copy), *words, *(() if i == 0 else (".safetensors",)))
        copy = Path(shutil.copytree(GOLDEN / name, tmp_path / "config"))
        edit_config(copy, **changes)
        self.check(copy, ValueError, ".safetensors", "config.json asks for")

    def test_missing_tensor_names_the_parameter(self, opt):
        edit_tensors(opt, lambda t: t.pop("model.decoder.layers.1.fc1.bias"))
        self.check(opt, ValueError, "model.decoder.layers.1.fc1.bias", "layers/1/mlp/up/bias", "missing")

    def test_pickled_weights_are_never_read(self, opt):
        (opt / "model.safetensors").rename(opt / "pytorch_model.bin")
        self.check(opt, ValueError, "pytorch_model.bin", "save_pretrained")

    def test_no_weights(self, opt):
        (opt / "model.safetensors").unlink()
        self.check(opt, FileNotFoundError, "model.safetensors", "save_pretrained")


class TestForward:
    def test_too_long_for_the_position_table(self):
        model = load(GOLDEN / "opt")
        with pytest.raises(ValueError, match="17 tokens in a row, the position table has room for 16"):
            model.forward(model.params, np.zeros((1, 17), np.int32))

    def test_a_parameter_too_many_or_too_few(self):
        model = load(GOLDEN / "llama")
        params = jax.tree.map(jnp.asarray, model.params)
        params["layers"][0]["attn"]["q"]["bias"] = jnp.zeros(24)
        del params["final_norm"]
        with pytest.raises(ValueError, match=r"missing \['final_norm/scale'\], unexpected \['layers/0/attn/q/bias'\]"):
            model.forward(params, np.zeros((1, 4), np.int32))

    def test_jit_grad_and_vmap(self):
        model = load(GOLDEN / "llama")
        params, tokens = jax.tree.map(jnp.asarray, model.params), jnp.zeros((3, 2, 4), jnp.int32)
        grads = jax.jit(jax.grad(lambda p: model.forward(p, tokens[0]).sum()))(params)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert jax.jit(jax.vmap(model.forward, (None, 0)))(params, tokens).shape == (3, 2, 4, 40)


class TestSave:
    @pytest.mark.parametrize(
        ("name", "max_shard_bytes"),
        [
            *((name, 10_000) for name in NAMES),
            *(("opt", size) for size in (1, 10**9)),
            *(pytest.param(name, size, marks=pytest.mark.slow) for name in NAMES[1:] for size in (1, 10**9)),
        ],
    )
    def test_round_trip_is_exact(self, name, max_shard_bytes, tmp_path):
        model = load(GOLDEN / name)
        save_hf(model, model.params, tmp_path / "new" / "saved", max_shard_bytes)
        again = load(tmp_path / "new" / "saved")
        assert bits(again.params) == bits(model.params)
        assert again.config == model.config
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]

    def test_written_files_satisfy_the_safetensors_library(self, tmp_path):
        from safetensors.numpy import load_file

        model = load(GOLDEN / "opt")
        save_hf(model, model.params, tmp_path / "saved")
        expected = load_file(GOLDEN / "opt" / "model.safetensors")
        found = load_file(tmp_path / "saved" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)

    def test_the_tokenizer_goes_along(self, tmp_path):
        model = load("stdlib-opt")
        save_hf(model, model.params, tmp_path / "saved")
        text = "def f(x):\n    return x  # 1 µs\n"
        assert load(tmp_path / "saved").tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]

    def test_an_existing_target_is_left_alone(self, tmp_path):
        model = load(GOLDEN / "opt")
        with pytest.raises(FileExistsError, match="exists already"):
            save_hf(model, model.params, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_left_of_a_failed_save(self, tmp_path, monkeypatch):
        model = load(GOLDEN / "opt")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("jaxq.models.hf.write_tensors", fail)
        with pytest.raises(OSError, match="disk full"):
            save_hf(model, model.params, tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []

    def refuse(self, tmp_path, edit, *words):
        model = load(GOLDEN / "llama")
        params = jax.tree.map(np.asarray, model.params)
        edit(params)
        with pytest.raises(ValueError) as caught:
            save_hf(model, params, tmp_path / "saved")
        for word in words:
            assert word in str(caught.value)
        assert not (tmp_path / "saved").exists()

    def test_a_bias_without_a_place(self, tmp_path):
        def edit(params):
            params["layers"][1]["attn"]["q"]["bias"] = np.zeros(24, np.float32)

        self.refuse(tmp_path, edit, "layers/1/attn/q/bias", "no place", "llama")

    def test_a_missing_parameter(self, tmp_path):
        self.refuse(tmp_path, lambda params: params.pop("final_norm"), "final_norm/scale", "missing")

    def test_a_wrong_shape(self, tmp_path):
        def edit(params):
            params["final_norm"]["scale"] = np.zeros(23, np.float32)

        self.refuse(tmp_path, edit, "final_norm/scale", "(23,)", "(24,)")

    @pytest.mark.parametrize("leaf", (object(), np.zeros(24, np.int8)))
    def test_a_leaf_that_is_no_float_array(self, tmp_path, leaf):
        def edit(params):
            params["final_norm"]["scale"] = leaf

        self.refuse(tmp_path, edit, "final_norm/scale", "decode")


@pytest.mark.slow
def test_model_of_and_init():
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    model = model_of(config, init(config, seed=1), name="fresh")
    assert model.forward(model.params, np.zeros((1, 4), np.int32)).shape == (1, 4, 40)
    assert flat(model.params).keys() == flat(load(GOLDEN / "llama").params).keys()
    with pytest.raises(ValueError, match="None is not supported"):
        model_of({}, {})


def test_read_file_knows_every_float_type(tmp_path):
    arrays = {
        str(i): np.arange(6).reshape(2, 3).astype(dtype)
        for i, dtype in enumerate((np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
    }
    write_tensors(tmp_path, arrays, 10**9)
    found = read_file(tmp_path / "model.safetensors")
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_released_file_is_out_of_memory_and_can_be_read_again(tmp_path):
    if not Path("/proc/self/smaps").exists():
        pytest.skip("what is in memory is read from Linux's /proc")
    values = np.arange(2**20, dtype=np.float32)
    write_tensors(tmp_path, {"values": values}, 10**9)
    view = read_tensors(tmp_path)["values"]

    def resident() -> int:
        (entry,) = re.findall(rf"{tmp_path}.*\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
        return int(entry)

    np.testing.assert_array_equal(view, values)
    assert resident() > 4000
    release(view[:5].T)
    assert resident() == 0
    np.testing.assert_array_equal(view, values)
    release(values)  # nothing to release
