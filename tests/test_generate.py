"""Generation with caches, against the whole function evaluated anew for each token."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.cache import CODES, new_cache
from jaxq.generate import generate
from jaxq.models import load
from tests.tiny import BERT, BLOOM, LLAMA, MISTRAL, OPT, QWEN2, QWEN3, TEXT, tiny_model

SHARED = (Path(__file__).resolve().parents[2] / "shared/models").resolve()
FAMILIES = {config["model_type"]: config for config in (OPT, BLOOM, LLAMA, MISTRAL, QWEN2, QWEN3)}
PROMPTS = np.random.default_rng(0).integers(0, 1024, (2, 9), np.int32)
FAMILIES["opt, norms after"] = OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 8}
SOME = [name if name in ("opt", "llama") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
COUNT = 10
KINDS = ("float32", "bf16", "int8", "fp8")
ALL = jaxq.quantize(weights=jaxq.Int(8), activations=jaxq.Int(8), attention=jaxq.Int(8))


def greedy(forward, params, prompts, count):
    """A whole evaluation for each token; what is to the right does not matter to a decoder."""
    run, length = jax.jit(forward), prompts.shape[1]
    tokens = np.pad(prompts, ((0, 0), (0, count)))
    for i in range(length, length + count):
        tokens[:, i] = np.asarray(run(params, tokens))[:, i - 1].argmax(-1)
    return tokens[:, length:]


def generated(model, step, params, prompts=PROMPTS, count=COUNT, kind="float32", **more):
    caches = new_cache(model.kept, len(prompts), prompts.shape[1] + count - 1, kind)
    return generate(step, params, prompts, caches, count, **more)


@cache
def tiny(family):
    return tiny_model(FAMILIES[family])


@cache
def quantized(family):
    model = tiny(family)
    return jaxq.calibrate(model.forward, model.params, [PROMPTS], ALL)


def one_by_one(model, step, params, tokens, kind):
    """The logits at each token of `tokens`, the first three read at once: `[B, T - 2, V]`."""
    caches, run = new_cache(model.kept, *tokens.shape, kind), jax.jit(step)
    logits, caches = run(params, tokens[:, :3], caches, jnp.int32(0))
    found = [logits]
    for i in range(3, tokens.shape[1]):
        logits, caches = run(params, tokens[:, i : i + 1], caches, jnp.int32(i))
        found.append(logits)
    return np.stack(found, 1)


def distance(found, wanted):
    return np.linalg.norm(np.float32(found) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in ("qwen2", "opt") else f for f in FAMILIES]
)
def test_as_the_whole_function(family):
    model = tiny(family)
    found = generated(model, model.step, model.params)
    np.testing.assert_array_equal(found.tokens, greedy(model.forward, model.params, PROMPTS, COUNT))
    assert found.tokens.dtype == np.int32 and min(found.prefill, found.decode, found.compilation) > 0


@pytest.mark.parametrize("family", SOME)
@pytest.mark.slow
def test_as_the_whole_quantized_function(family):
    """Weights, activations and attention's operands: what was calibrated on `forward` is found in `step`."""
    model, q = tiny(family), quantized(family)
    found = generated(model, jaxq.execute(model.step), q)
    np.testing.assert_array_equal(found.tokens, greedy(jaxq.execute(model.forward), q, PROMPTS, COUNT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_sites(family, kind):
    model = tiny(family)
    caches = jax.eval_shape(lambda: new_cache(model.kept, 1, 12, kind))
    whole = jaxq.sites(model.forward, model.params, jax.ShapeDtypeStruct((1, 12), jnp.int32))
    wanted = {(row.path, row.group, row.kind) for row in whole}
    assert sum(kind == "attention" for _, _, kind in wanted) == 8
    for length in (1, 5):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        found = jaxq.sites(model.step, model.params, tokens, caches, jax.ShapeDtypeStruct((), jnp.int32))
        assert {(row.path, row.group, row.kind) for row in found} == wanted


@pytest.mark.parametrize(
    "name, limit",
    [
        pytest.param("stdlib-opt", 0.05, marks=pytest.mark.slow),
        pytest.param("opt", 0.1, marks=pytest.mark.slow),
        pytest.param("mistral", 0.5, marks=pytest.mark.slow),
    ],
)
def test_caches_of_few_bits(name, limit):
    """The fewer bits, the farther from the whole function; but not far. Random weights amplify it, Mistral's most."""
    if name == "stdlib-opt":
        model = load(name)
        tokens = np.array(model.tokenizer(TEXT)["input_ids"][:24], np.int32)[None]
    else:
        model, tokens = tiny(name), np.concatenate([PROMPTS, PROMPTS[:, ::-1]], 1)
    wanted = np.asarray(jax.jit(model.forward)(model.params, tokens))[:, 2:]
    errors = {k: distance(one_by_one(model, model.step, model.params, tokens, k), wanted) for k in KINDS}
    assert errors["float32"] < 1e-5 < errors["bf16"] < errors["int8"] < errors["fp8"] < limit, errors


def test_the_window_is_kept_to():
    """A token beyond the reach of all layers, 2 x (6 - 1) before the last, changes nothing; a nearer one does."""
    model = tiny("mistral")
    tokens = np.concatenate([PROMPTS, PROMPTS], 1)[:1]
    last = one_by_one(model, model.step, model.params, tokens, "float32")[:, -1]
    for place, same in ((6, True), (8, False)):
        other = tokens.copy()
        other[0, place] += 1
        found = one_by_one(model, model.step, model.params, other, "float32")[:, -1]
        assert np.array_equal(found, last) == same


@pytest.mark.parametrize(
    "kind, dtype", [("int8", jnp.int8), pytest.param("fp8", jnp.float8_e4m3fn, marks=pytest.mark.slow)]
)
def test_codes_of_a_cache(kind, dtype):
    """A scale for each token and head, and the codes of the hardware's types."""
    x = (
        np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
        * np.array([1, 100], np.float32)[:, None, None, None]
    )
    x[0, 1, 2] = 0
    (layer,) = new_cache([(4, 8)], 2, 5, kind)
    k, v, layer = layer.extend(jnp.asarray(x), jnp.asarray(2 * x), jnp.int32(1))
    assert layer.length == 5 and layer.keys.data.dtype.itemsize == 1
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / float(jnp.iinfo(dtype).max if kind == "int8" else jnp.finfo(dtype).max))
    np.testing.assert_allclose(layer.keys.scale[:, 1:4], scale, rtol=1e-6)
    exact = x / np.asarray(layer.keys.scale[:, 1:4])
    codes = np.rint(exact).astype(np.float32) if kind == "int8" else exact.astype(dtype).astype(np.float32)
    np.testing.assert_allclose(k[:, 1:4], codes * layer.keys.scale[:, 1:4], rtol=1e-6)
    np.testing.assert_allclose(v, 2 * k, rtol=1e-6)
    assert not np.any(k[:, :1]) and not np.any(k[:, 4:])


def test_caches_hold_what_they_say():
    size = {k: sum(a.nbytes for a in jax.tree.leaves(new_cache([(2, 64)] * 3, 2, 10, k))) for k in KINDS}
    numbers = 2 * 3 * 2 * 10 * 2 * 64
    assert size == {"float32": 4 * numbers, "bf16": 2 * numbers} | dict.fromkeys(CODES, numbers + 4 * numbers // 64)


def test_drawn_tokens():
    model = tiny("opt")
    first, again, other = (
        generated(model, model.step, model.params, temperature=1.0, seed=seed).tokens for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    cold = generated(model, model.step, model.params, temperature=1e-4).tokens
    np.testing.assert_array_equal(cold, greedy(model.forward, model.params, PROMPTS, COUNT))


def test_draws_follow_the_logits():
    """Of many rows that see the same token, as many take each token as its probability says."""
    logits = np.array([0.0, 1.0, 2.0, 0.5], np.float32)

    def step(params, tokens, caches, position):
        return jnp.broadcast_to(params, (len(tokens), 4)), caches

    def run(rows, temperature):
        return generate(step, logits, np.zeros((rows, 1), np.int32), new_cache([(1, 1)], rows, 1), 1, temperature)

    found = run(20000, 0.5).tokens
    share = np.exp(2 * logits) / np.exp(2 * logits).sum()
    np.testing.assert_allclose(np.bincount(found[:, 0], minlength=4) / 20000, share, atol=0.015)
    one = run(1, 0.0)
    assert one.tokens == [[2]] and np.isnan(one.decode)


def test_errors():
    model = tiny("opt")
    with pytest.raises(ValueError, match="cache 'int4'.*float32, bf16, int8, fp8"):
        new_cache(model.kept, 1, 8, "int4")
    with pytest.raises(ValueError, match="33 tokens in a row, the position table has room for 32"):
        generated(model, model.step, model.params, count=25)
    caches = new_cache(model.kept, 2, 17)
    for tokens, count, temperature, why in (
        (PROMPTS, 10, 0.0, "9 tokens and 10 more take 18 places in the caches, which have 17"),
        (PROMPTS, 0, 0.0, "0 tokens were asked for"),
        (PROMPTS, 2, -1.0, "temperature is -1.0"),
        (PROMPTS[:, :0], 2, 0.0, "one token at least"),
    ):
        with pytest.raises(ValueError, match=why):
            generate(model.step, model.params, tokens, caches, count, temperature)


def test_an_encoder():
    model = tiny_model(BERT)
    with pytest.raises(ValueError, match="encoder"):
        new_cache(model.kept, 1, 8)
    with pytest.raises(ValueError, match="bert is an encoder"):
        model.step(model.params, PROMPTS, (), jnp.int32(0))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("stdlib-opt", marks=pytest.mark.slow),
        pytest.param("opt-tinystories-trained-here", marks=pytest.mark.slow),
        pytest.param("llama-stories260k", marks=pytest.mark.slow),
        pytest.param("bloom-tinystories-trained-here", marks=pytest.mark.slow),
    ],
)
def test_packed_as_simulated(name):
    directory = name if name == "stdlib-opt" else SHARED / name
    if name != "stdlib-opt" and not directory.is_dir():
        pytest.skip(f"{directory} is not there")
    model = load(directory)
    random = np.random.default_rng(0).integers(3, min(512, model.config["vocab_size"]), (4, 32), np.int32)
    head = ["lm_head/*"] if "lm_head" in model.params else []
    recipe = jaxq.skip(["embed*", *head], jaxq.quantize(weights=jaxq.Int(8), activations=jaxq.Int(8)))
    q = jaxq.calibrate(model.forward, model.params, [random], recipe)
    prompts, step = random[:2, :16], jaxq.execute(model.step)
    simulated = generated(model, step, q, prompts, 24).tokens
    np.testing.assert_array_equal(generated(model, step, jaxq.pack(q), prompts, 24).tokens, simulated)
    np.testing.assert_array_equal(simulated, greedy(jaxq.execute(model.forward), q, prompts, 24))
