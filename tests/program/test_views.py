"""Views: per-channel arrays travel both ways through transposes, reshapes and broadcasts."""

from __future__ import annotations

from itertools import permutations
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxq.program.views import Broadcast, Columns, Reshape, Transpose, ViewError, factor_groups, look, pull

AXES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@given(AXES, st.data())
def test_a_spread_array_follows_a_transpose(shape, data):
    """Looking at `w * spread` is looking at `w`, times the spread array carried along."""
    permutation = data.draw(st.sampled_from(list(permutations(range(len(shape))))))
    kept = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    w = np.arange(1.0, 1 + prod(shape)).reshape(shape)
    view = Transpose(permutation)
    seen_shape = tuple(shape[i] for i in permutation)
    spread = np.arange(1.0, 1 + prod(n for n, k in zip(seen_shape, kept) if k)).reshape(
        [n if k else 1 for n, k in zip(seen_shape, kept)]
    )
    np.testing.assert_array_equal(view.forward(w * view.backward(spread)), view.forward(w) * spread)


@pytest.mark.parametrize(
    ("before", "after", "spread"),
    [
        ((12, 5), (3, 4, 5), (3, 4, 1)), ((12, 5), (3, 4, 5), (1, 1, 5)), ((3, 4, 5), (12, 5), (12, 1)),
        ((5,), (1, 1, 5), (1, 1, 5)), ((1, 6), (6, 1), (6, 1)), ((2, 6, 1), (2, 2, 3), (1, 2, 3)),
        ((4, 1, 3), (4, 3), (4, 1)),
    ],
)  # fmt: skip
def test_a_spread_array_follows_a_reshape(before, after, spread):
    w, s = np.arange(1.0, 1 + prod(before)).reshape(before), np.arange(1.0, 1 + prod(spread)).reshape(spread)
    view = Reshape(before, after)
    np.testing.assert_array_equal(view.forward(w * view.backward(s)), view.forward(w) * s)


def test_a_split_channel_axis_is_refused():
    with pytest.raises(ViewError, match="cannot follow a reshape"):
        Reshape((12, 5), (3, 4, 5)).backward(np.ones((3, 1, 5)))


def test_a_broadcast_parameter_has_one_value_for_all_channels():
    view = Broadcast((1,), (8,), (2, 8))
    assert view.backward(np.ones((1, 8))).shape == (8,)
    with pytest.raises(ViewError, match="one value for several"):
        view.backward(np.ones((2, 1)))


def test_columns_of_a_contraction():
    """Weight [out_a, summed, out_b] of an output [..., out_a, out_b]."""
    view = Columns((1, None, 2))
    assert view.backward(np.ones((1, 3, 4))).shape == (3, 1, 4)
    with pytest.raises(ViewError, match="not output channels"):
        view.backward(np.ones((5, 1, 1)))


@given(AXES, AXES)
def test_factor_groups_cover_both_shapes(a, b):
    if prod(a) != prod(b):
        return
    groups = factor_groups(a, b)
    assert [i for ours, _ in groups for i in ours] == list(range(len(a)))
    assert [j for _, theirs in groups for j in theirs] == list(range(len(b)))
    assert all(prod(a[i] for i in x) == prod(b[j] for j in y) for x, y in groups)


def test_pull_is_the_views_in_turn():
    leaf = jnp.arange(24.0).reshape(4, 6)
    views = (Reshape((4, 6), (4, 2, 3)), Transpose((1, 2, 0)))
    spread = np.arange(1.0, 7).reshape(2, 3, 1)
    np.testing.assert_array_equal(look(views, leaf * pull(views[::-1], spread)), look(views, leaf) * spread)
