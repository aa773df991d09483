from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq import (
    AnyFloat,
    Float,
    FloatSearch,
    Int,
    calibrate,
    coarse_to_fine,
    execute,
    exhaustive,
    fpq_baseline,
    llm_fp4,
    per_channel,
    per_group,
    per_tensor,
    per_token,
    post_shifted_fp4,
    quantize,
    skip,
    smooth_quant,
)
from jaxq import observers as obs
from jaxq.clipping import search_percentile
from jaxq.program.trace import trace
from jaxq.qtensor import PerGroup, PerTensor, PerToken, is_qtensor
from jaxq.recipes import RecipeFile, read_recipe, recipe_files
from jaxq.recipes import steps as recipe_steps
from jaxq.recipes.steps import calibrate_recipe, to_step
from jaxq.steps import (
    chain,
    channel_scale,
    channel_shift,
    cosine,
    diagonal_hessian,
    fed_by_norm,
    linear_clips,
    log_clips,
    os_plus,
    output_error,
)
from jaxq.steps.group import Spec
from tests.tiny import OPT, tiny_model

TOKENS = [np.array(jax.random.randint(jax.random.key(i), (2, 16), 0, 1024), np.int32) for i in range(2)]
BASE = {"name": "t", "method": {"name": "none"}, "weights": {"bits": 8}, "activations": {"bits": 8}}


def made(**changes: object) -> RecipeFile:
    return RecipeFile.model_validate(BASE | changes)


@cache
def layout():
    model = tiny_model(OPT)
    return trace(model.forward, model.params, TOKENS[0]).layout


def spec_of(recipe: RecipeFile, kind: str = "linear", **given: float) -> Spec:
    return to_step(recipe, **given).plan(next(g for g in layout().groups if g.kind == kind), Spec())


def same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y)


def test_numbers():
    recipe = made(weights={"bits": 6, "symmetric": False}, activations={"bits": 5, "granularity": "token"})
    found = spec_of(recipe)
    assert found.weights == per_channel(Int(6, symmetric=False)) and found.activations == per_token(Int(5))
    group = {"bits": 4, "granularity": "group", "group_size": 8}
    found = spec_of(made(weights=group, activations=group))
    assert found.weights == per_group(Int(4), 8) and found.activations == per_group(Int(4), 8)
    found = spec_of(made(weights={"bits": 8, "granularity": "tensor"}, activations=None))
    assert found.weights == per_tensor(Int(8)) and found.activations is None
    attention = spec_of(made(attention={"bits": 7}), "attention").activations
    assert attention == per_tensor(Int(7), obs.average_min_max())


@pytest.mark.parametrize(
    "observer, want",
    [
        ({"name": "min_max"}, obs.min_max()),
        ({"name": "average_min_max"}, obs.average_min_max()),
        ({"name": "ema_min_max", "decay": 0.5}, obs.ema_min_max(0.5)),
        ({"name": "mse"}, obs.mse()),
        ({"name": "average_mse"}, obs.average_mse()),
        ({"name": "average_quantile", "fraction": 0.9}, obs.average_quantile(0.9)),
        ({"name": "ema_quantile", "fraction": 0.9, "decay": 0.5}, obs.ema_quantile(0.9, 0.5)),
        ({"name": "token_quantile", "percentile": 0.98}, obs.token_quantile(0.98)),
        ({"name": "token_quantile", "percentile": "search"}, obs.token_quantile(0.97)),
    ],
)
def test_observers(observer, want):
    recipe = made(activations={"bits": 8, "observer": observer})
    found = spec_of(recipe, percentile=0.97).activations
    assert found is not None and found.observer == want


def test_lsq_plus():
    weights = spec_of(made(weights={"bits": 8, "observer": {"name": "lsq_plus"}})).weights
    assert weights is not None and weights.observer == obs.lsq_plus()


@pytest.mark.parametrize("name", sorted(recipe_files()))
def test_every_recipe_is_a_step(name):
    recipe = read_recipe(name)
    step = to_step(recipe)
    assert set(step.patterns) == set(recipe.skip) - {"lm_head/*", "embed*"}


def test_a_recipe_is_what_its_steps_are():
    model = tiny_model(OPT)
    by_hand = chain(smooth_quant(0.6), quantize(per_channel(Int(8)), per_tensor(Int(8), obs.average_min_max())))
    recipe = made(method={"name": "smooth_quant", "alpha": 0.6, "groups": "foldable"})
    want = calibrate(model.forward, model.params, TOKENS, skip(["embed*"], by_hand))
    found, clipping = calibrate_recipe(model.forward, model.params, TOKENS, recipe)
    assert clipping is None
    same(found, want)
    norms, _ = calibrate_recipe(model.forward, model.params, TOKENS, made(method={"name": "smooth_quant"}))
    assert len(norms.transforms) == 4 and len(found.transforms) == 6, "down projections are not fed by a norm"


@pytest.mark.parametrize("keys, want", [({}, 4), ({"batches": 1}, 1), ({"batches": None}, None)])
def test_os_plus_searches_on_as_many_batches(keys, want, monkeypatch):
    asked = {}
    watched = lambda *args, **given: asked.update(given) or channel_scale(*args, **given)  # noqa: E731
    monkeypatch.setattr(recipe_steps, "channel_scale", watched)
    to_step(made(method={"name": "os_plus", **keys}))
    assert asked["batches"] == want


def test_granularities_reach_the_model():
    model = tiny_model(OPT)
    for granularity, kind in {"tensor": PerTensor(), "token": PerToken()}.items():
        recipe = made(activations={"bits": 8, "granularity": granularity})
        quantized, _ = calibrate_recipe(model.forward, model.params, TOKENS, recipe)
        assert {quant.granularity for quant in quantized.inputs.values()} == {kind}
    grouped = {"bits": 8, "granularity": "group", "group_size": 8}
    quantized, _ = calibrate_recipe(model.forward, model.params, TOKENS, made(weights=grouped, activations=grouped))
    assert {quant.granularity for quant in quantized.inputs.values()} == {PerGroup(8)}


# Floats ---------------------------------------------------------------------------------------------------------------

FLOAT = {"format": "float", "bits": 4}
FLOATS = {"weights": FLOAT, "activations": FLOAT}
# A search that takes seconds; by default it is the Python default's.
SHORT = {"rounds": 1, "candidates": 9, "search": "exhaustive"}
SHORTER = FloatSearch(rounds=1, clips=log_clips(count=9), method=exhaustive())


def test_float_numbers():
    found = spec_of(made(weights=FLOAT, activations=FLOAT | {"exponent_bits": 1, "granularity": "token"}))
    assert found.weights == per_channel(Float(2, 1)) and found.activations == per_token(Float(1, 2))
    found = spec_of(made(weights=FLOAT | {"bits": 8, "granularity": "group", "group_size": 8}, activations=FLOAT))
    assert found.weights == per_group(Float(4, 3), 8)
    assert found.activations == per_tensor(Float(2, 1), obs.average_min_max())
    table = made(embeddings={"bits": 4, "symmetric": False, "observer": {"name": "mse"}}, skip=["lm_head/*"])
    assert spec_of(table, "lookup").weights == per_channel(Int(4, symmetric=False), obs.mse())
    assert spec_of(table, "attention").activations is None


@pytest.mark.parametrize("name", ["llm_fp4", "pre_shifted_fp4", "post_shifted_fp4", "fpq_baseline"])
def test_searched_float_numbers(name):
    numbers = {"weights": FLOAT | {"exponent_bits": 3}, "activations": FLOAT, "attention": FLOAT | {"bits": 6}}
    recipe = made(method={"name": name}, embeddings=FLOAT | {"bits": 8}, skip=["lm_head/*"], **numbers)
    found = spec_of(recipe)
    assert found.weights == per_channel(Float(3, 0)) and found.activations == per_tensor(AnyFloat(4))
    assert spec_of(recipe, "attention").activations == per_tensor(AnyFloat(6))
    assert spec_of(recipe, "lookup").weights == per_channel(AnyFloat(8))
    tensor = made(method={"name": name}, weights=FLOAT | {"granularity": "tensor"}, activations=None)
    assert spec_of(tensor).weights == per_tensor(AnyFloat(4)) and spec_of(tensor).activations is None


@pytest.mark.parametrize(
    "keys, want",
    [
        ({}, FloatSearch()),
        ({"rounds": 1, "metric": "cosine"}, FloatSearch(rounds=1, metric=cosine)),
        (
            {"search": "exhaustive", "metric": "diagonal_hessian"},
            FloatSearch(method=exhaustive(), metric=diagonal_hessian),
        ),
        ({"candidates": 50, "highest": 1.5}, FloatSearch(clips=log_clips(0.5, 1.5, 50))),
        ({"clips": "linear", "tokens": None}, FloatSearch(clips=linear_clips(), tokens=None)),
        ({"clips": "linear", "lowest": 0.3}, FloatSearch(clips=linear_clips(0.3))),
        ({"search": "fast", "metric": "output_error"}, FloatSearch(method=coarse_to_fine(8, 4), metric=output_error)),
    ],
)
def test_float_search(keys, want, monkeypatch):
    asked = {}
    monkeypatch.setitem(recipe_steps.FLOAT_METHODS, "llm_fp4", lambda **given: asked.update(given) or llm_fp4(**given))
    to_step(made(method={"name": "llm_fp4", **keys}, **FLOATS))
    assert asked["search"] == want


@pytest.mark.parametrize(
    "method, by_hand",
    [
        pytest.param(
            [{"name": "post_shifted_fp4"}],
            lambda: post_shifted_fp4(4, 4, 4, search=SHORTER),
            marks=pytest.mark.slow,
        ),
        pytest.param([{"name": "fpq_baseline"}], lambda: fpq_baseline(4, 4, 4, search=SHORTER), marks=pytest.mark.slow),
        pytest.param(
            [{"name": "channel_shift"}, {"name": "llm_fp4"}],
            lambda: chain(channel_shift(), llm_fp4(4, 4, 4, search=SHORTER)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [{"name": "os_plus", "candidates": 5}, {"name": "llm_fp4"}],
            lambda: chain(
                os_plus(scale=channel_scale(1.0, 5, exhaustive(), where=fed_by_norm)), llm_fp4(4, 4, 4, search=SHORTER)
            ),
            marks=pytest.mark.slow,
        ),
        (
            [{"name": "smooth_quant"}, {"name": "none"}],
            lambda: chain(
                smooth_quant(where=fed_by_norm),
                quantize(Float(2, 1), per_tensor(Float(2, 1), obs.average_min_max()), None, Float(2, 1)),
            ),
        ),
    ],
    ids=["post_shifted", "baseline", "shift", "os_plus", "min_max"],
)
def test_float_recipes_are_what_their_steps_are(method, by_hand):
    model = tiny_model(OPT)
    method = [*method[:-1], method[-1] | (SHORT if method[-1]["name"] != "none" else {})]
    recipe = made(method=method, embeddings=FLOAT, skip=["lm_head/*"], **FLOATS)
    found, _ = calibrate_recipe(model.forward, model.params, TOKENS, recipe)
    same(found, calibrate(model.forward, model.params, TOKENS, by_hand()))
    assert is_qtensor(found.params["embed"]["embedding"]), "the table is quantized"


def test_the_table_waits_for_skip_and_embeddings():
    """A head that is tied to the table goes with it."""
    model = tiny_model(OPT)
    kept = made(**FLOATS), made(embeddings=FLOAT, skip=["lm_head/*", "embed/*"], **FLOATS)
    for recipe in kept:
        plain, _ = calibrate_recipe(model.forward, model.params, TOKENS, recipe)
        assert not is_qtensor(plain.params["embed"]["embedding"]) and "embed/embedding" not in plain.inputs
        assert is_qtensor(plain.params["positions"]["embedding"]) == (recipe.embeddings is not None)


# The percentile search ------------------------------------------------------------------------------------------------

SHAPES = {"embed": (1024, 8), "layers": (3, 8, 8), "head": (8, 1024)}
SEARCHED = {"bits": 4, "observer": {"name": "token_quantile", "percentile": "search"}}


def cross_entropy(forward, params, masks=None) -> float:
    total, count = 0.0, 0
    for i, tokens in enumerate(TOKENS):
        logits = np.asarray(execute(forward)(params, jnp.asarray(tokens)), np.float64)[:, :-1]
        nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        real = np.ones_like(nll, bool) if masks is None else masks[i][:, 1:] & masks[i][:, :-1]
        total, count = total + nll[real].sum(), count + real.sum()
    return total / count


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.slow
def test_search_is_the_best_of_the_calibrations_one_by_one(masked, tmp_path):
    model = tiny_model(OPT)
    masks = [np.arange(16)[None] < np.array([[16], [11]])] * 2 if masked else None
    recipe = made(method={"name": "smooth_quant"}, activations=SEARCHED, calibration={"propagate": "full_precision"})
    found, clipping = calibrate_recipe(model.forward, model.params, TOKENS, recipe, masks=masks)
    assert clipping is not None and len(clipping.losses) == 20 and clipping.percentiles[1] == 0.995
    one_by_one = []
    some = [0, 1, 10, 19]
    for percentile in (clipping.percentiles[i] for i in some):
        step = to_step(recipe, percentile)
        q = calibrate(model.forward, model.params, TOKENS, step, masks=masks, propagate="full_precision")
        one_by_one.append(cross_entropy(model.forward, q, masks))
    np.testing.assert_allclose([clipping.losses[i] for i in some], one_by_one, rtol=2e-5)
    best = calibrate(
        model.forward,
        model.params,
        TOKENS,
        to_step(recipe, clipping.percentile),
        masks=masks,
        propagate="full_precision",
    )
    for name, quant in best.inputs.items():
        np.testing.assert_allclose(found.inputs[name].grid.scale, quant.grid.scale, rtol=1e-5)
    for _ in range(2):  # the second time from the records
        kept, _ = calibrate_recipe(model.forward, model.params, TOKENS, recipe, masks=masks, checkpoint=tmp_path)
        same(kept, found)
    assert min(clipping.losses) == clipping.losses[clipping.percentiles.index(clipping.percentile)]
    assert len(set(clipping.losses)) > 2, "the percentiles make a difference"


def test_clipping_by_tokens_leaves_attention_probabilities_alone():
    model = tiny_model(OPT)
    observers = obs.token_quantile(0.5), obs.average_min_max()
    steps = [quantize(None, None, per_tensor(Int(8), observer)) for observer in observers]
    clipped, whole = (calibrate(model.forward, model.params, TOKENS, step).inputs for step in steps)
    operands = [name for name in clipped if "/dot" in name]
    same_grid = {name for name in operands if clipped[name].grid.scale == whole[name].grid.scale}
    assert same_grid == {name for name in operands if name.endswith("dot1:lhs")} != set()


def test_search_refuses_what_it_cannot_do():
    model = tiny_model(OPT)
    step = to_step(made())
    with pytest.raises(ValueError, match="no percentiles"):
        search_percentile(model.forward, model.params, TOKENS, lambda _: step, [])
    with pytest.raises(ValueError, match="ranges no activation"):
        search_percentile(model.forward, model.params, TOKENS, lambda _: step, [1.0])


@pytest.mark.parametrize("reverse", [False, True])
def test_search_in_stacked_layers_is_that_in_single_ones(reverse):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}

    def step(percentile):
        return chain(smooth_quant(where=lambda plan: True), to_step(made(activations=SEARCHED), percentile))

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def stacked(params, tokens):
        x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"], reverse=reverse)
        return x @ params["head"]

    def single(params, tokens):
        x = params["embed"][tokens]
        for w in params["layers"][:: -1 if reverse else 1]:
            x, _ = layer(x, w)
        return x @ params["head"]

    alone = params | {"layers": list(params["layers"])}
    both = [search_percentile(f, p, TOKENS, step, [1.0, 0.9, 0.8]) for f, p in ((stacked, params), (single, alone))]
    np.testing.assert_allclose(both[0].losses, both[1].losses, rtol=1e-5)
    assert both[0].percentile == both[1].percentile and len(set(both[0].losses)) == 3
    assert "layers" in both[0].quantized.transforms
    grids = [both[1].quantized.inputs[f"layers/{i}"].grid.scale for i in range(3)]
    np.testing.assert_allclose(both[0].quantized.inputs["layers"].grid.scale, jnp.stack(grids), rtol=1e-5)
