"""Batches of few widths, likelihoods of continuations and greedy continuations, against one row at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.evaluate.batches import by_width
from jaxq.evaluate.likelihood import likelihoods, next_tokens

VOCABULARY, CONTEXT = 7, 40
TABLE = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)


def forward(table, tokens):
    """What came before counts, too: the sum over all earlier tokens, halved at each step."""
    logits, now = [], jnp.zeros((len(tokens), VOCABULARY))
    for i in range(tokens.shape[1]):
        now = now / 2 + table[tokens[:, i]]
        logits.append(now)
    return jnp.stack(logits, 1)


def expected(context, continuation):
    tokens = [*context, *continuation][-(CONTEXT + 1) :]
    now, log = np.zeros(VOCABULARY), []
    for i, token in enumerate(tokens[:-1]):
        now = now / 2 + TABLE[token]
        p = np.exp(now) / np.exp(now).sum()
        log.append((np.log(p[tokens[i + 1]]), now.argmax() == tokens[i + 1]))
    return sum(v for v, _ in log[-len(continuation) :]), all(best for _, best in log[-len(continuation) :])


def pairs(count=23):
    rng = np.random.default_rng(1)
    return [
        tuple(rng.integers(0, VOCABULARY, n).tolist() for n in (rng.integers(1, 50), rng.integers(1, 5)))
        for _ in range(count)
    ]


def test_widths_hold_their_rows_and_every_row_is_there():
    sizes = np.array([3, 17, 16, 40, 1, 33, 2])
    batches = list(by_width(sizes, 2, 40))
    assert sorted({i for rows, _ in batches for i in rows.tolist()}) == list(range(7))
    assert all(len(rows) == 2 and sizes[rows].max() <= width for rows, width in batches)
    assert [width for _, width in batches] == [16, 16, 32, 40]
    assert list(by_width(np.array([], int), 2, 40)) == []


def test_likelihoods_are_those_of_each_row_alone():
    found, wanted = likelihoods(forward, TABLE, pairs(), CONTEXT, batch_size=4), [expected(*pair) for pair in pairs()]
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in wanted], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_greedy_tokens_are_found_greedy():
    tokens = next_tokens(forward, TABLE, [1, 2, 3], CONTEXT, 5)
    assert likelihoods(forward, TABLE, [([1, 2, 3], tokens)], CONTEXT)[0][1]
    assert len(tokens) == 5 and not likelihoods(forward, TABLE, [([1, 2, 3], [*tokens[:-1], 0, 1])], CONTEXT)[0][1]


def test_few_shapes_are_compiled():
    shapes = []

    def noted(table, tokens):
        shapes.append(tokens.shape)
        return forward(table, tokens)

    likelihoods(noted, TABLE, pairs(40), CONTEXT, batch_size=4)
    assert sorted(shapes) == [(4, 16), (4, 32), (4, 40)]


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * (CONTEXT + 1))])
def test_pairs_that_cannot_be_scored(pair):
    with pytest.raises(ValueError, match="context of"):
        likelihoods(forward, TABLE, [pair], CONTEXT)


def test_logits_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        likelihoods(forward, np.full_like(TABLE, np.nan), [([1], [2])], CONTEXT)
