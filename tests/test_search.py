"""Grid searches: the fast one against the exhaustive one."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.search import Search, coarse_to_fine, exhaustive, padded, search, search_each

CURVES = json.loads((Path(__file__).parent / "golden/os_plus_curves.json").read_text("utf-8"))["curves"]


def counted(curve):
    asked = []

    def losses(candidates):
        asked.extend(candidates)
        return curve(np.asarray(candidates)).astype(np.float32)

    return losses, asked


@given(st.integers(1, 150), st.floats(0, 150), st.integers(0, 3))
def test_on_a_curve_with_one_valley_both_agree(count: int, valley: float, power: int) -> None:
    losses, _ = counted(lambda c: np.abs(c - valley) ** (1 + power / 2) + 1)
    grid = np.arange(count, dtype=float)
    best, tried = search(coarse_to_fine(), grid, losses)
    slow, all_tried = search(exhaustive(), grid, losses)
    assert tried[best] == all_tried[slow]
    assert not np.isnan(all_tried).any()
    np.testing.assert_array_equal(tried[~np.isnan(tried)], all_tried[~np.isnan(tried)])


def test_the_fast_search_tries_a_quarter_and_none_twice() -> None:
    losses, asked = counted(lambda c: (c - 71.0) ** 2)
    best, tried = search(coarse_to_fine(), np.arange(100.0), losses)
    assert best == 71 and np.isfinite(tried[0])
    assert len(asked) == len(set(asked)) == np.isfinite(tried).sum() <= 25


@pytest.mark.parametrize("name", CURVES)
def test_both_agree_on_rough_curves_of_real_models(name: str) -> None:
    """A fixed number of candidates ends 2 to 11 % above the best of these."""
    curve = np.asarray(CURVES[name], np.float32)
    losses = lambda c: curve[c]  # noqa: E731
    best, tried = search(coarse_to_fine(), np.arange(len(curve)), losses)
    assert best == curve.argmin() and np.isfinite(tried).sum() < 0.9 * len(curve)
    fixed, _ = search(coarse_to_fine(8, 3, within=0), np.arange(len(curve)), losses)
    assert curve[fixed] > 1.01 * curve[best]


def test_candidates_about_as_good_as_the_best_are_followed_on_flat_curves_all() -> None:
    flat = 1 + 0.02 * np.random.default_rng(0).random(101).astype(np.float32)
    best, tried = search(coarse_to_fine(), np.arange(101), lambda c: flat[c])
    assert best == flat.argmin() and np.isfinite(tried).all()


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"keep": 0}, {"within": -0.1}, {"within": np.nan}])
def test_a_search_that_makes_no_sense_is_an_error(wrong: dict) -> None:
    with pytest.raises(ValueError, match="a search"):
        coarse_to_fine(**wrong)


def test_the_first_of_equals_wins() -> None:
    assert search(exhaustive(), np.arange(9.0), lambda c: np.ones(len(c), np.float32))[0] == 0


@pytest.mark.parametrize("method", [exhaustive(), coarse_to_fine()])
def test_non_finite_losses_lose_and_all_of_them_are_an_error(method: Search) -> None:
    losses = lambda c: np.where(c == 3, 1.0, np.inf).astype(np.float32)  # noqa: E731
    assert search(method, np.arange(9.0), losses)[0] == 3
    with pytest.raises(ValueError, match="finite"):
        search(method, np.arange(9.0), lambda c: np.full(len(c), np.nan, np.float32))


@given(st.integers(1, 40), st.integers(1, 64))
def test_padding_repeats_the_last(count: int, multiple: int) -> None:
    out = padded(np.arange(float(count)), multiple)
    assert len(out) % multiple == 0 and len(out) - count < multiple
    np.testing.assert_array_equal(out[:count], np.arange(float(count)))
    assert (out[count:] == count - 1).all()


COUNT = 100
# Few shapes, and one candidate that is sure: each is a compilation.
STRIDED = {s: coarse_to_fine(stride=s, within=0) for s in (4, 8, 32)}


@partial(jax.jit, static_argnums=(0, 2))
def each_of(method: Search, losses: jax.Array, sure: int = 50) -> tuple[jax.Array, jax.Array]:
    """`search_each` on a table of losses [candidates, *shape]."""

    def loss(i: jax.Array) -> jax.Array:
        return jnp.take_along_axis(losses, i[None], 0)[0]

    return search_each(method, len(losses), sure, losses.shape[1:], loss)


def table_of(losses: np.ndarray) -> jax.Array:
    return jnp.asarray(losses, jnp.float32)


@pytest.mark.parametrize("shape", [(), pytest.param((7,), marks=pytest.mark.slow), (2, 3)])
def test_each_row_finds_its_own_valley(shape: tuple[int, ...]) -> None:
    valleys = np.random.default_rng(0).uniform(0, COUNT, shape)
    table = np.abs(np.arange(COUNT).reshape(-1, *[1] * len(shape)) - valleys)
    for method in (exhaustive(), *STRIDED.values()):
        found, loss = each_of(method, table_of(table))
        np.testing.assert_array_equal(found, table.argmin(0))
        np.testing.assert_allclose(loss, table.min(0), rtol=1e-6)


@given(st.integers(0, 10**6))
def test_each_is_never_worse_than_the_sure_one_nor_better_than_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.random((COUNT, 5))
    for method in STRIDED.values():
        found, loss = each_of(method, table_of(table), 50)
        np.testing.assert_allclose(loss, table[found, np.arange(5)], rtol=1e-6)
        assert (loss <= table[50] + 1e-6).all() and (loss >= table.min(0) - 1e-6).all()


def test_each_takes_the_first_of_equals_and_any_stride_tries_the_ends() -> None:
    assert (each_of(exhaustive(), jnp.ones((9, 2)), 4)[0] == 0).all()
    table = np.where(np.arange(COUNT) == COUNT - 1, 0.0, np.arange(COUNT, 0, -1.0))[:, None].repeat(5, 1)
    for method in (exhaustive(), *STRIDED.values()):
        assert (each_of(method, table_of(table), 50)[0] == COUNT - 1).all()


def test_each_agrees_with_the_search_on_the_host() -> None:
    table = np.random.default_rng(1).random((COUNT, 4)).astype(np.float32)
    table += np.abs(np.arange(COUNT)[:, None] / 30 - 1.5).astype(np.float32)
    for method in STRIDED.values():
        found, loss = each_of(method, table_of(table), 0)
        for row in range(4):
            best, _ = search(method, np.arange(COUNT), lambda c, row=row: table[c, row])
            assert found[row] == best and loss[row] == table[best, row]


def test_each_never_takes_a_loss_that_is_not_a_number() -> None:
    table = np.random.default_rng(2).random((COUNT, 5))
    table[::2] = np.nan
    table[50] = 2.0
    for method in (exhaustive(), *STRIDED.values()):
        found, loss = each_of(method, table_of(table), 50)
        assert np.isfinite(loss).all() and np.isfinite(table[found, np.arange(5)]).all()
