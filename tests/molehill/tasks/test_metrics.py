"""Scores equal scikit-learn's, however the rows are batched."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.errors import DataError, TrainingError
from molehill.tasks.metrics import ScoreSum


@settings(deadline=None)  # the first example imports
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 2**31), st.integers(1, 60))
def test_equal_to_scikit_learn(n, classes, seed, cut):
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(n, classes)), dtype=torch.float32)
    labels = torch.tensor(rng.integers(0, classes, n))
    total = ScoreSum(classes)
    for part in (slice(0, cut), slice(cut, None)):
        total.count(logits[part], labels[part])
    scores = total.scores()
    predicted = logits.argmax(1)
    assert scores.n == n
    assert scores.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert scores.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "y_pred values do not sum to one": float32 rounding
        expected = log_loss(labels, logits.softmax(1).numpy(), labels=range(classes))
    assert scores.loss == pytest.approx(expected, rel=1e-5)


def test_answer_tokens_have_no_f1():
    total = ScoreSum()
    total.count(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.bfloat16), torch.tensor([1, 2]))
    scores = total.scores()
    assert (scores.n, scores.accuracy, scores.macro_f1) == (2, 0.5, None)


def test_intervals_of_rows_are_wilsons_and_those_of_a_mean():
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    logits, labels = torch.tensor(rng.normal(size=(40, 3)), dtype=torch.float32), torch.tensor(rng.integers(0, 3, 40))
    total = ScoreSum(3)
    for part in (slice(0, 7), slice(7, None)):
        total.count(logits[part], labels[part], torch.arange(len(labels[part])))
    scores = total.scores()
    right = int((logits.argmax(1) == labels).sum())
    low, high = binomtest(right, 40).proportion_ci(method="wilson")
    assert scores.accuracy_interval == pytest.approx((low, high))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
    error = losses.std(ddof=1) / np.sqrt(40)
    assert scores.loss_interval == pytest.approx((scores.loss - 1.96 * error, scores.loss + 1.96 * error), rel=1e-4)
    assert total.confusion == [
        [int(((labels == i) & (logits.argmax(1) == j)).sum()) for j in range(3)] for i in range(3)
    ]


def test_the_interval_of_macro_f1_is_as_wide_as_drawing_rows_anew_says():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(1)
    labels = rng.choice(4, 300, p=[0.5, 0.3, 0.15, 0.05])
    predicted = np.where(rng.random(300) < 0.7, labels, rng.integers(0, 4, 300))
    total = ScoreSum(4)
    total.count(torch.nn.functional.one_hot(torch.tensor(predicted), 4).float(), torch.tensor(labels))
    drawn = [rng.integers(0, 300, 300) for _ in range(300)]
    spread = np.std([f1_score(labels[d], predicted[d], average="macro", zero_division=0) for d in drawn])
    low, high = total.scores().macro_f1_interval
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.15)


def test_tokens_of_one_row_go_together():
    """Twice the tokens of as many rows are no better known, and where rows differ most they are known least."""
    logits, labels = torch.eye(2)[torch.tensor([0, 0, 1, 0, 1, 1])], torch.tensor([0, 1, 1, 1, 1, 0])
    found = []
    for times in (1, 2):
        total = ScoreSum()
        for part in (slice(0, 2), slice(2, None)):  # batches count rows from 0
            rows = torch.arange(len(labels[part])).repeat_interleave(times)
            total.count(logits[part].repeat_interleave(times, 0), labels[part].repeat_interleave(times), rows)
        found.append(total.scores())
    assert found[1].n == 2 * found[0].n
    assert found[1].loss_interval == pytest.approx(found[0].loss_interval)
    apart = ScoreSum()
    apart.count(logits.repeat_interleave(2, 0), labels.repeat_interleave(2))
    wide, narrow = found[1].accuracy_interval, apart.scores().accuracy_interval
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    lone = ScoreSum()
    lone.count(logits, labels, torch.zeros(6, dtype=torch.int64))
    assert lone.scores().loss_interval is None
    assert lone.scores().accuracy_interval == pytest.approx((0.0546, 0.9454), abs=1e-4)  # of one trial, half right


def test_nothing_counted():
    with pytest.raises(DataError, match="nothing to score"):
        ScoreSum(2).scores()


def test_not_finite():
    total = ScoreSum(2)
    total.count(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
    with pytest.raises(TrainingError, match="loss on held-out rows is nan"):
        total.scores()
