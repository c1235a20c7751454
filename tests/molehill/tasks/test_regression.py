"""Numbers of texts: rows are checked, errors and correlations are those of scipy, in the unit of the labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from molehill import config
from molehill.errors import DataError
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_number
from molehill.tasks.kind import make_task
from molehill.tasks.regression import NumberSum
from molehill.tasks.schema import load_rows

TASK = config.Task(kind="regression", max_length=8)


def load(write, rows, task=TASK):
    return load_rows(config.Data(source=str(write("rows.jsonl", rows))), task)


def passed(scores, labels):
    return Forward(scores, labels, torch.arange(len(labels)), [], lambda: scores, of_number)


def test_the_range_is_that_of_the_rows_and_labels_are_parts_of_it(write, tokenizer):
    labels = {"one": 1, "two": "2.5", "three": 5}
    rows, task = load(write, [{"text": text, "label": label} for text, label in labels.items()])
    assert task.range == (1.0, 5.0)
    assert rows["label"] == (1.0, 2.5, 5.0)
    examples = make_task(task, tokenizer).encode(rows)
    assert [example.labels for example in examples] == [-1.0, -0.25, 1.0]
    batch = make_task(task, tokenizer).collate(examples)
    assert batch.labels.tolist() == [-1.0, -0.25, 1.0]
    assert batch.predictions == 3


def test_pairs_of_texts_are_read_together_and_cut_at_the_longer_one(write, tokenizer):
    rows, task = load(
        write,
        [
            {"text": "one two one two one two one", "text_pair": "a b", "label": 0},
            {"text": "a", "text_pair": "b", "label": 1},
        ],
    )  # fmt: skip
    made = make_task(task, tokenizer)
    long, short = made.encode(rows)
    assert len(long.input_ids) == 8
    assert made.encode(rows).lengths.cut == 1
    assert tokenizer.convert_ids_to_tokens(long.input_ids)[-2:] == ["a", "b"]
    assert tokenizer.convert_ids_to_tokens(short.input_ids)[-1] == "b"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "one", "label": 1}, {"text": "two", "label": "many"}], r":2: the label 'many' is no number"),
        ([{"text": "one", "label": 1}, {"text": "two", "label": True}], "the label True is no number"),
        ([{"text": "one", "label": 1}, {"text": "two", "label": None}], "the row has no 'label'"),
        ([{"text": "one", "label": 1}, {"text": "two", "label": 1.0}], "every row has the number 1"),
        ([{"text": "one", "text_pair": "a", "label": 1}, {"text": "two", "label": 2}], "the row has no 'text_pair'"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused(write, rows, says):
    with pytest.raises(DataError, match=says):
        load(write, rows)


def test_a_number_out_of_the_range_is_refused(write):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the label 7 is not within task\.range, 0 to 5"):
        load(write, [{"text": "one", "label": 7}], TASK.model_copy(update={"range": (0.0, 5.0)}))


def test_a_range_has_two_ends():
    with pytest.raises(ValueError, match="the first number must be less than the second"):
        config.Task(kind="regression", range=(1, 1))


def test_rows_held_out_are_spread_over_the_range(write):
    rows, _ = load(write, [{"text": f"one {i}", "label": i} for i in range(10)])
    assert rows["molehill.stratum"] == tuple("0011223344")


def test_figures_are_those_of_scipy_however_the_rows_come():
    from scipy import stats

    rng = np.random.default_rng(0)
    said, right = rng.normal(size=40).astype(np.float32), rng.integers(-2, 3, 40) / 2
    found = []
    for cut in (1, 17):
        total = NumberSum(unit=3.0)
        for part in (slice(0, cut), slice(cut, None)):
            scores, labels = torch.tensor(said[part]).unsqueeze(1), torch.tensor(right[part], dtype=torch.float32)
            total.add(passed(scores, labels))
        found.append(total.scores())
    assert found[0].figures == found[1].figures
    scores, errors = found[0], 3 * (said - right)
    assert scores.figures["rmse"].value == pytest.approx(math.sqrt(np.mean(errors**2)))
    assert scores.figures["mae"].value == pytest.approx(np.mean(abs(errors)))
    assert scores.figures["pearson"].value == pytest.approx(stats.pearsonr(said, right).statistic)
    assert scores.figures["spearman"].value == pytest.approx(stats.spearmanr(said, right).statistic)
    interval = stats.pearsonr(said, right).confidence_interval()
    assert scores.figures["pearson"].interval == pytest.approx((interval.low, interval.high))
    assert scores.loss == pytest.approx(np.mean((said - right) ** 2) / 2)
    for figure in scores.figures.values():
        assert figure.interval[0] < figure.value < figure.interval[1]


def test_numbers_that_are_all_the_same_correlate_with_nothing():
    total = NumberSum(unit=1.0)
    scores = torch.zeros(3, 1)
    total.add(passed(scores, torch.tensor([0.0, 0.5, 1.0])))
    assert set(total.scores().figures) == {"rmse", "mae"}
