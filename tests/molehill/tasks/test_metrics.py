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
        total.add(logits[part], labels[part])
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
    total.add(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.bfloat16), torch.tensor([1, 2]))
    scores = total.scores()
    assert (scores.n, scores.accuracy, scores.macro_f1) == (2, 0.5, None)


def test_nothing_counted():
    with pytest.raises(DataError, match="nothing to score"):
        ScoreSum(2).scores()


def test_not_finite():
    total = ScoreSum(2)
    total.add(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
    with pytest.raises(TrainingError, match="loss on held-out rows is nan"):
        total.scores()
