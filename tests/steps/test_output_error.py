"""The quadratic forms of the output's error against the error itself, computed in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxq.steps.output_error import (
    activation_problem,
    cosine,
    diagonal_hessian,
    output_error,
    plain_problem,
    total_error,
    weight_problem,
)
from jaxq.steps.parts import MOST, Reader

OUT, IN, BATCHES, TOKENS = 7, 12, 3, 5
SUMS_OR_TOKENS = pytest.mark.parametrize("tokens", [TOKENS, 1], ids=["sums", "tokens"])


def halves(x):
    return jnp.rint(2 * x) / 2


def thirds(x):
    return jnp.rint(3 * x) / 3


def make(seed: int = 0, tokens: int = TOKENS, channels: int = IN):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(BATCHES, tokens, channels)) * 3, rng.normal(size=(OUT, channels))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.ones((BATCHES, tokens), jnp.float32)


def readers(*pairs) -> list[Reader]:
    return [Reader(len(w), lambda part, w=w, hat=hat: (part.of(w), part.of(hat))) for w, hat in pairs]


def direct(x, x_hat, w, w_hat) -> np.ndarray:
    """The squared error of each token and output channel, [tokens, out]."""
    x, x_hat, w, w_hat = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, x_hat, w, w_hat))
    return (x @ w.T - x_hat @ w_hat.T) ** 2


@pytest.mark.parametrize(("tokens", "channels"), [(TOKENS, IN), (1, IN), (2, 40), (TOKENS, 1)])
def test_weights_cost_what_their_outputs_lose(tokens: int, channels: int) -> None:
    x, w, real = make(tokens=tokens, channels=channels)
    problem = weight_problem(w, x, real, halves, 1)
    w_hat = thirds(w)
    exact = (direct(x, halves(x), w, w_hat) - direct(x, halves(x), w, w)).sum(0)
    np.testing.assert_allclose(output_error(problem, w_hat)[:, 0], exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(output_error(problem, w), np.zeros((OUT, 1)))


def test_many_tokens_and_inputs_are_summed_in_parts() -> None:
    """One more than a part holds: no token or row of a sum is counted twice, and none is left out."""
    count = MOST + 1
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=(n, MOST + 1)), jnp.float32) for n in (count, 2))
    problem, w_hat = weight_problem(w, x[None], jnp.ones((1, count), jnp.float32), halves, 1), thirds(w)
    assert problem.hessian is not None and problem.hessian.shape == (1, MOST + 1, MOST + 1)
    exact = (direct(x, halves(x), w, w_hat) - direct(x, halves(x), w, w)).sum(0)
    np.testing.assert_allclose(output_error(problem, w_hat)[:, 0], exact, rtol=1e-4)
    np.testing.assert_allclose(problem.energy[:, 0], np.square(x @ w.T).sum(0), rtol=1e-5)


def test_a_small_budget_leaves_fewer_tokens() -> None:
    """Where it does not hold sums of [in, in]; evenly spaced, one at least, and those are priced as ever."""
    x, w, real = make()
    tokens = np.asarray(x).reshape(-1, IN)
    for budget, every in ((8 * (IN + OUT) * 5, 3), (1, len(tokens))):
        problem, w_hat = weight_problem(w, x, real, halves, 1, budget=budget), thirds(w)
        few = tokens[::every]
        assert problem.factor is not None and problem.factor.shape == (1, IN, len(few))
        exact = (direct(few, halves(few), w, w_hat) - direct(few, halves(few), w, w)).sum(0)
        np.testing.assert_allclose(output_error(problem, w_hat)[:, 0], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "more"), [(TOKENS, 4), (1, 4), (TOKENS, 6)])
def test_activations_cost_what_all_their_readers_lose(tokens: int, more: int) -> None:
    """With fewer outputs than inputs, and with more."""
    x, w, _ = make(tokens=tokens)
    others = make(1)[1][:more]
    x = x.reshape(-1, IN)
    pairs = (w, thirds(w)), (others, halves(others))
    problem = activation_problem(x, jnp.ones(len(x), jnp.float32), readers(*pairs))
    x_hat = halves(x)
    exact = sum((direct(x, x_hat, a, b) - direct(x, x, a, b)).sum(1) for a, b in pairs)
    np.testing.assert_allclose(output_error(problem, x_hat)[:, 0], exact, rtol=1e-4, atol=1e-3)


def test_padding_costs_nothing() -> None:
    x, w, _ = make()
    real = jnp.asarray(np.random.default_rng(2).random((BATCHES, TOKENS)) > 0.4, jnp.float32)
    wild = x + 1e3 * (1 - real)[:, :, None]
    few = np.asarray(x)[np.asarray(real) > 0]
    problem, w_hat = weight_problem(w, wild, real, halves, 1), thirds(w)
    exact = (direct(few, halves(few), w, w_hat) - direct(few, halves(few), w, w)).sum(0)
    np.testing.assert_allclose(output_error(problem, w_hat)[:, 0], exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(problem.energy[:, 0], np.square(few @ w.T).sum(0), rtol=1e-5)
    total = total_error(wild, real, halves, readers((w, w_hat)))
    np.testing.assert_allclose(total, direct(few, halves(few), w, w_hat).sum(), rtol=1e-5)


@SUMS_OR_TOKENS
def test_groups_are_priced_as_if_the_others_were_exact(tokens: int) -> None:
    x, w, real = make(tokens=tokens)
    problem, w_hat = weight_problem(w, x, real, halves, 3), thirds(w)
    summed = problem.hessian is not None
    assert problem.blocks == 3 and summed == (tokens == TOKENS)
    found = output_error(problem, w_hat)
    for b in range(3):
        here = slice(4 * b, 4 * b + 4)
        one = w.at[:, here].set(w_hat[:, here])
        exact = (direct(x, halves(x), w, one) - direct(x, halves(x), w, w)).sum(0)
        np.testing.assert_allclose(found[:, b], exact, rtol=1e-4, atol=1e-4)


@SUMS_OR_TOKENS
def test_cosine(tokens: int) -> None:
    x, w, real = make(tokens=tokens)
    w_hat = thirds(w)
    rows, x_rows = np.asarray(x, np.float64).reshape(-1, IN), np.asarray(halves(x), np.float64).reshape(-1, IN)
    y, y_hat = rows @ np.asarray(w).T, x_rows @ np.asarray(w_hat).T
    want = 1 - (y * y_hat).sum(0) / np.linalg.norm(y, axis=0) / np.linalg.norm(y_hat, axis=0)
    np.testing.assert_allclose(cosine(weight_problem(w, x, real, halves, 1), w_hat)[:, 0], want, atol=2e-6)
    problem = activation_problem(x.reshape(-1, IN), jnp.ones(BATCHES * tokens, jnp.float32), readers((w, w_hat)))
    want = 1 - (y * y_hat).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(y_hat, axis=1)
    np.testing.assert_allclose(cosine(problem, halves(problem.v))[:, 0], want, atol=2e-6)


def test_cosine_of_zeros() -> None:
    """A zero output is no good for anything but a zero target."""
    x, w, _ = make()
    x = x.reshape(-1, IN).at[3].set(0)
    found = cosine(activation_problem(x, jnp.ones(len(x), jnp.float32), readers((w, w))), jnp.zeros_like(x))
    np.testing.assert_array_equal(found[:, 0], np.arange(len(x)) != 3)


@SUMS_OR_TOKENS
def test_the_diagonal_weighs_each_error_alone(tokens: int) -> None:
    x, w, real = make(tokens=tokens)
    w_hat = thirds(w)
    error = np.square(np.asarray(w_hat - w))
    full = diagonal_hessian(weight_problem(w, x, real, halves, 1), w_hat)[:, 0]
    moment = np.square(np.asarray(halves(x))).sum((0, 1))
    np.testing.assert_allclose(full, (error * moment).sum(1), rtol=1e-5)
    plain = plain_problem(w, jnp.asarray(moment)[None], jnp.ones(OUT, jnp.float32))
    for metric in (diagonal_hessian, output_error):
        np.testing.assert_allclose(metric(plain, w_hat)[:, 0], full, rtol=1e-5)


def test_a_sum_of_all_is_the_total() -> None:
    x, w, real = make()
    w_hat = thirds(w)
    got = total_error(x, real, halves, readers((w, w_hat), (w[:2], w[:2])))
    want = direct(x, halves(x), w, w_hat).sum() + direct(x, halves(x), w[:2], w[:2]).sum()
    np.testing.assert_allclose(got, want, rtol=1e-5)
