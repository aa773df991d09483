"""Grid searches: the fast one against the exhaustive one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.search import coarse_to_fine, exhaustive, padded, search


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


def test_the_fast_search_tries_a_sixth_and_none_twice() -> None:
    losses, asked = counted(lambda c: (c - 71.0) ** 2)
    best, tried = search(coarse_to_fine(), np.arange(100.0), losses)
    assert best == 71 and np.isfinite(tried[0])
    assert len(asked) == len(set(asked)) == np.isfinite(tried).sum() <= 18


def test_the_first_of_equals_wins() -> None:
    assert search(exhaustive(), np.arange(9.0), lambda c: np.ones(len(c), np.float32))[0] == 0


def test_non_finite_losses_lose_and_all_of_them_are_an_error() -> None:
    losses = lambda c: np.where(c == 3, 1.0, np.inf).astype(np.float32)  # noqa: E731
    assert search(exhaustive(), np.arange(9.0), losses)[0] == 3
    with pytest.raises(ValueError, match="finite"):
        search(exhaustive(), np.arange(9.0), lambda c: np.full(len(c), np.nan, np.float32))


@given(st.integers(1, 40), st.integers(1, 64))
def test_padding_repeats_the_last(count: int, multiple: int) -> None:
    out = padded(np.arange(float(count)), multiple)
    assert len(out) % multiple == 0 and len(out) - count < multiple
    np.testing.assert_array_equal(out[:count], np.arange(float(count)))
    assert (out[count:] == count - 1).all()
