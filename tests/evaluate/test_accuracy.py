"""Accuracy and Matthews' correlation, and what is refused."""

import numpy as np
import pytest

from jaxq.evaluate import accuracy
from jaxq.evaluate.accuracy import matthews
from jaxq.evaluate.batches import in_order


def logits(params, x):
    return x @ params


def measured(x, labels, batch_size=4, params=None):
    params = np.eye(x.shape[1], dtype=np.float32) if params is None else params
    return accuracy(logits, params, ((rows, (x[rows],)) for rows in in_order(len(x), batch_size)), labels)


@pytest.mark.parametrize("batch_size", (1, 4, 7, 50))
def test_the_largest_logit_counts(batch_size):
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((23, 3)).astype(np.float32), random.integers(0, 3, 23)
    found = measured(x, labels, batch_size)
    assert found.accuracy == pytest.approx(np.mean(x.argmax(1) == labels))
    assert found.examples == 23 and found.seconds > 0
    assert found.matthews == pytest.approx(matthews(x.argmax(1), labels))


def test_one_shape_is_compiled():
    shapes = []

    def noting(params, x):
        shapes.append(x.shape)
        return x

    x = np.eye(10, dtype=np.float32)
    found = accuracy(noting, (), ((rows, (x[rows],)) for rows in in_order(10, 4)), np.arange(10))
    assert shapes == [(4, 10)] and found.accuracy == found.matthews == 1.0


def test_matthews():
    """Two labels: (TP TN - FP FN) / sqrt of the product of the margins; any number: as scikit-learn has it."""
    found, labels = np.repeat([1, 1, 0, 0], [5, 2, 3, 7]), np.repeat([1, 0, 1, 0], [5, 2, 3, 7])
    assert matthews(found, labels) == pytest.approx((5 * 7 - 2 * 3) / np.sqrt(7 * 8 * 9 * 10))
    assert matthews(np.zeros(4, int), np.array([0, 1, 0, 1])) == 0.0
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    found, labels = random.integers(0, 5, (2, 60))
    found[:30] = labels[:30]
    assert matthews(found, labels) == pytest.approx(metrics.matthews_corrcoef(labels, found))


@pytest.mark.parametrize(
    "x, labels, words",
    [
        (np.ones((0, 3)), [], "no examples"),
        (np.ones((2, 3)), [0, 3], "from 0 to 3, but the model tells 3 apart: 0 to 2"),
        (np.ones((2, 3)), [-1, 0], "from -1 to 0"),
        (np.ones((2, 1)), [0, 0], r"\[2, 1\].*no classifier"),
        (np.full((2, 3), np.nan), [0, 0], "not finite"),
    ],
)
def test_refused(x, labels, words):
    with pytest.raises(ValueError, match=words):
        measured(x.astype(np.float32), np.array(labels, int), 2)


def test_hidden_states_are_no_logits():
    x = np.ones((2, 4, 3), np.float32)
    with pytest.raises(ValueError, match=r"\[2, 4, 3\].*no classifier"):
        accuracy(lambda params, x: x, (), [(np.arange(2), (x,))], np.zeros(2, int))
