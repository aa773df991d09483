"""Clip values, the search of formats and scales on one problem, and each channel's exponent."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.formats import AnyFloat, Float, fake_quant
from jaxq.search import Search, coarse_to_fine, exhaustive
from jaxq.steps import Clips, linear_clips, log_clips
from jaxq.steps.float_search import DECIDING, channel_exponents, magnified, search_grids
from jaxq.steps.output_error import (
    Problem,
    activation_problem,
    cosine,
    diagonal_hessian,
    output_error,
    weight_problem,
)
from jaxq.steps.parts import Reader

ROWS, IN = 6, 16
CLIPS = log_clips(0.5, 2.0, 60)
NO_LIMIT = 2**30


def problem_of(seed: int, tokens: int = 24, blocks: int = 1, rows: int = ROWS) -> Problem:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(1, tokens, IN)) * np.exp(rng.normal(size=IN)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(rows, IN)) * np.exp(rng.normal(size=(rows, 1))), jnp.float32)
    return weight_problem(w, x, jnp.ones((1, tokens), jnp.float32), lambda a: jnp.rint(2 * a) / 2, blocks)


# Where rows are searched for themselves, the sum over them in one shared search has a test of its own below.
BY_ROW_FIRST = [pytest.param(False, id="by_row"), pytest.param(True, id="shared", marks=pytest.mark.slow)]
found_by = jax.jit(search_grids, static_argnums=(1, 2, 3, 4, 5, 6))


@partial(jax.jit, static_argnums=(1, 3))
def loss_at(problem: Problem, fmt, found, metric=output_error) -> jax.Array:
    return metric(problem, fake_quant(fmt, problem.v, found.scale[:, 0], None, found.mantissa[:, 0])).sum()


@pytest.mark.parametrize("shared", [False, True], ids=["by_row", "shared"])
def test_the_best_of_all_formats_and_clip_values(shared: bool) -> None:
    """Against every candidate of every format, one by one."""
    problem, fmt = problem_of(0), AnyFloat(4)
    found = found_by(problem, fmt, CLIPS, exhaustive(), output_error, shared, NO_LIMIT)
    width = np.abs(problem.v).max(None if shared else 1, keepdims=True)
    best = []
    for split in fmt.splits:
        error = jax.jit(lambda scale, split=split: output_error(problem, fake_quant(split, problem.v, scale)))
        table = np.asarray([error(width / np.float32(split.largest) * r) for r in np.float32(CLIPS.ratios)])
        best.append(table.sum((1, 2)).min() if shared else table.min(0).sum())
    np.testing.assert_allclose(found.loss, min(best), rtol=1e-3)
    assert found.mantissa.item() == fmt.splits[int(np.argmin(best))].mantissa_bits
    assert found.scale.shape == ((1, 1, 1) if shared else (ROWS, 1, 1))
    np.testing.assert_allclose(loss_at(problem, fmt, found), min(best), rtol=1e-3)


@pytest.mark.parametrize("shared", BY_ROW_FIRST)
def test_the_fast_search_is_near_the_exhaustive_one_and_no_worse_than_no_clipping(shared: bool) -> None:
    """The three at once on many problems; not clipping is a search with nothing to choose from."""
    problems, fmt = jax.tree.map(lambda *a: jnp.stack(a), *map(problem_of, range(8))), Float(2, 1)

    def losses(clips: Clips, how: Search) -> jax.Array:
        search = lambda p: search_grids(p, fmt, clips, how, output_error, shared, NO_LIMIT).loss  # noqa: E731
        return jax.jit(jax.vmap(search))(problems)

    full, fast = losses(CLIPS, exhaustive()), losses(CLIPS, coarse_to_fine(stride=4, keep=4))
    whole = losses(Clips((1.0,)), exhaustive())
    assert (full <= fast).all() and (fast <= whole).all()
    constant = problems.energy.sum((1, 2)) * np.float32(0.005)  # the part of the error that is the input's
    ratios = (fast + constant) / (full + constant)
    assert ratios.max() < 1.15 and ratios.mean() < 1.03


@pytest.mark.parametrize("shared", BY_ROW_FIRST)
def test_some_of_many_rows_choose_the_format(shared: bool) -> None:
    problem, fmt = problem_of(5, rows=2 * DECIDING), AnyFloat(4)
    full, fast = (
        found_by(problem, fmt, CLIPS, how, output_error, shared, NO_LIMIT)
        for how in (exhaustive(), coarse_to_fine(4, 4))
    )
    assert full.mantissa == fast.mantissa
    np.testing.assert_allclose(fast.loss, loss_at(problem, fmt, fast), rtol=1e-3)
    assert full.loss <= fast.loss < 1.05 * full.loss


@pytest.mark.parametrize("metric", [output_error, cosine, diagonal_hessian])
def test_each_metric_is_what_is_minimized(metric) -> None:
    problem, fmt = problem_of(3), Float(2, 1)
    search = partial(found_by, problem, fmt, CLIPS, exhaustive())
    losses = {m: float(loss_at(problem, fmt, search(m, False, NO_LIMIT), metric)) for m in METRICS}
    assert losses[metric] == min(losses.values())


METRICS = (output_error, cosine, diagonal_hessian)


@pytest.mark.parametrize("shared", [False, True], ids=["by_row", "shared"])
@pytest.mark.parametrize("blocks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_small_budget_changes_nothing(shared: bool, blocks: int) -> None:
    problem, fmt = problem_of(1, blocks=blocks), AnyFloat(4)
    whole, parts = (
        found_by(problem, fmt, CLIPS, coarse_to_fine(stride=8), output_error, shared, budget)
        for budget in (NO_LIMIT, ROWS * IN * 8)
    )
    np.testing.assert_array_equal(whole.scale, parts.scale)
    np.testing.assert_array_equal(whole.mantissa, parts.mantissa)
    np.testing.assert_allclose(whole.loss, parts.loss, rtol=1e-4)


def test_a_small_budget_with_padding() -> None:
    """Tokens that a part is filled up with, or that are padding, do not count."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(n, IN)), jnp.float32) for n in (7, ROWS))
    real = jnp.asarray([1, 1, 0, 1, 1, 0, 1], jnp.float32)
    wild = x + 100 * (1 - real)[:, None]
    few, all_parts = (
        found_by(
            activation_problem(a, r, [Reader(ROWS, lambda part: (part.of(w),) * 2)]),
            Float(2, 1),
            CLIPS,
            exhaustive(),
            output_error,
            True,
            budget,
        )
        for a, r, budget in ((x[real > 0], jnp.ones(5, jnp.float32), NO_LIMIT), (wild, real, 3 * IN * 24))
    )
    np.testing.assert_array_equal(few.scale, all_parts.scale)
    np.testing.assert_allclose(few.loss, all_parts.loss, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "power"), [(1, 0), (24, 11), (24, -13)])
def test_scaling_weights_by_a_power_of_two_scales_the_result(tokens: int, power: int) -> None:
    """Multiples of the bias, as published, would find something else (B13)."""
    problem, fmt, factor = problem_of(2, tokens), AnyFloat(4), np.float32(2.0**power)
    gradient = None if problem.gradient is None else problem.gradient * factor
    scaled = replace(problem, v=problem.v * factor, gradient=gradient, energy=problem.energy * factor**2)
    one, other = (
        found_by(p, fmt, CLIPS, coarse_to_fine(stride=8), output_error, False, NO_LIMIT) for p in (problem, scaled)
    )
    np.testing.assert_array_equal(one.scale * factor, other.scale)
    np.testing.assert_array_equal(one.mantissa, other.mantissa)
    np.testing.assert_array_equal(one.loss * factor**2, other.loss)


@pytest.mark.parametrize("shared", [False, True], ids=["by_row", "shared"])
def test_units_are_those_of_weights_that_took_the_exponents(shared: bool) -> None:
    """To the bit: v / u priced with u H u is v priced with H on a grid of multiples of u."""
    problem, fmt = problem_of(6), AnyFloat(4)
    units = np.float32(2) ** np.random.default_rng(0).integers(0, 4, (1, 1, IN)).astype(np.float32)
    hessian = problem.hessian * units * units.transpose(0, 2, 1)
    taken = replace(problem, v=problem.v / units[0], hessian=hessian, gradient=problem.gradient * units[0])
    one = found_by(taken, fmt, CLIPS, coarse_to_fine(stride=8), output_error, shared, NO_LIMIT)
    other = found_by(
        problem, fmt, CLIPS, coarse_to_fine(stride=8), output_error, shared, NO_LIMIT, units=jnp.asarray(units)
    )
    np.testing.assert_array_equal(one.scale, other.scale)
    np.testing.assert_array_equal(one.mantissa, other.mantissa)
    np.testing.assert_array_equal(one.loss, other.loss)


def test_zeros_are_on_every_grid() -> None:
    """Zero rows, and nothing but zeros: finite scales, zeros again, and the other rows are chosen as without them."""
    problem, fmt = problem_of(4), AnyFloat(4)
    zero = replace(problem, v=problem.v.at[2].set(0))
    rest = np.arange(ROWS) != 2
    v, gradient, energy = (a[rest] for a in (problem.v, problem.gradient, problem.energy))
    less = replace(problem, v=v, gradient=gradient, energy=energy, real=problem.real[rest])
    some, others, none = (
        found_by(p, fmt, CLIPS, exhaustive(), output_error, False, NO_LIMIT)
        for p in (zero, less, replace(problem, v=jnp.zeros_like(problem.v)))
    )
    for found in (some, none):
        assert np.isfinite(found.scale).all() and (np.asarray(found.scale) > 0).all()
        assert np.isfinite(found.loss).all()
    assert some.mantissa == others.mantissa
    np.testing.assert_array_equal(np.asarray(some.scale)[rest], others.scale)
    assert not fake_quant(fmt, zero.v, some.scale[:, 0], None, some.mantissa[:, 0])[2].any()


def test_clip_values() -> None:
    for clips in (linear_clips(), log_clips(), log_clips(0.9, 1.0, 3), CLIPS):
        assert clips.ratios[clips.whole] == 1.0 and clips.count == len(clips.ratios)
    steps = np.diff(np.log(log_clips(0.25, 4.0, 101).ratios))
    np.testing.assert_allclose(steps, np.log(16) / 100, rtol=1e-6)
    np.testing.assert_allclose(np.diff(linear_clips(0.2, 1.2, 101).ratios), 0.01, rtol=1e-6)
    for bad in ((0.5, 0.9), (1.0, 0.5), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, float("inf")), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="contain 1"):
            Clips(bad)
    for make in (linear_clips, log_clips):
        with pytest.raises(ValueError, match="do not contain 1"):
            make(0.2, 0.8)


@pytest.mark.parametrize("fmt", [Float(1, 2), Float(2, 1), Float(3, 0), Float(4, 3), AnyFloat(4)])
def test_channel_exponents(fmt: Float | AnyFloat) -> None:
    """k_c = clip(floor(b_c - r + d), 0, 2**E - 1), b_c the bias that clips nothing of the channel and r the tensor's;
    d = 1/2, of 3 mantissa bits or more what clips the largest element to the next one."""
    split = fmt.usual if isinstance(fmt, AnyFloat) else fmt
    widest = np.float32(np.exp(np.random.default_rng(0).normal(size=64) * 4))
    widest[:2] = 0, 2e-38
    mantissa = jnp.full((1, 1, 1), split.mantissa_bits, jnp.int32)
    for r in (0.3, -2.6, 5.0, -120.0):
        scale = jnp.full((1, 1, 1), 2.0 ** (split.bias - r), jnp.float32)
        k = channel_exponents(fmt, scale, jnp.asarray(widest), mantissa)
        b = split.bias + np.log2(split.largest / np.maximum(widest, np.float64(1e-38)))
        d = np.log2(1 + 1 / (2 ** (split.mantissa_bits + 1) - 1)) if split.mantissa_bits > 2 else 0.5
        want = np.clip(np.floor(b - r + d), 0, 2**split.exponent_bits - 1)
        np.testing.assert_array_equal(k[1:], want[1:])
        assert k[0] == 0 and k.dtype == jnp.int32


def test_magnified_is_quantization_between_two_shifts() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(9, IN)), jnp.float32)
    k = jnp.asarray(rng.integers(0, 4, IN), jnp.int32)
    scale, mantissa = jnp.full((1, 1, 1), 0.37, jnp.float32), jnp.ones((1, 1, 1), jnp.int32)
    powers = np.exp2(np.asarray(k, np.float32))[None]
    want = fake_quant(Float(2, 1), x * powers, scale[0]) / powers
    for fmt in (Float(2, 1), AnyFloat(4)):
        np.testing.assert_array_equal(magnified(x, fmt, scale, k, mantissa), want)
