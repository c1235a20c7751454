"""Any number of labels of a text: rows are checked, figures are those of scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from molehill import config
from molehill.errors import DataError
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_class, of_flags
from molehill.tasks.kind import kind_of, make_task
from molehill.tasks.multi_label import FlagSum
from molehill.tasks.schema import class_counts, load_rows

TASK = config.Task(kind="multi-label", max_length=8)
SAID = [["sport"], ["sport", "money"], [], ["war", "money"]]


def load(write, rows, task=TASK, name="rows.jsonl"):
    return load_rows(config.Data(source=str(write(name, rows))), task)


def of(labels):
    return [{"text": f"one {i}", "labels": some} for i, some in enumerate(labels)]


def total(logits, labels, cuts=()):
    found = FlagSum(logits.shape[1])
    for part in np.split(np.arange(len(logits)), cuts):
        scores, truth = torch.tensor(logits[part]), torch.tensor(labels[part], dtype=torch.float32)
        found.add(Forward(scores, truth, torch.arange(len(part)), [], lambda: None, of_flags))
    return found


def test_a_row_has_any_number_of_labels(write, tokenizer):
    rows, task = load(write, of(SAID))
    assert task.labels == ("money", "sport", "war")
    assert rows["labels"] == (["sport"], ["money", "sport"], [], ["money", "war"])
    made = make_task(task, tokenizer)
    examples = made.encode(rows)
    assert [example.labels for example in examples] == [(0, 1, 0), (1, 1, 0), (0, 0, 0), (1, 0, 1)]
    batch = made.collate(examples)
    assert batch.labels.tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert batch.predictions == 4
    assert class_counts(rows, task) == {"money": 2, "sport": 2, "war": 1}


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "lists.csv"])
def test_tables_write_them_between_bars_or_as_a_list(tmp_path, name):
    cells = [
        f'"{json.dumps(some).replace(chr(34), chr(34) * 2)}"' if "lists" in name else "|".join(some) for some in SAID
    ]
    mark = "\t" if name.endswith("tsv") else ","
    lines = [f"text{mark}labels", *(f"one {i}{mark}{cell}" for i, cell in enumerate(cells))]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    rows, _ = load_rows(config.Data(source=str(tmp_path / name)), TASK)
    assert [set(some) for some in rows["labels"]] == [set(some) for some in SAID]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([["a"], ["b"], 3], r":3: 'labels' must be a list, but is int 3"),
        ([["a"], ["b"], None], r":3: the row has no 'labels'"),
        ([["a"], ["a", "a"]], r":2: the label 'a' is there twice"),
        ([["a"], ["b"], "a;b"], r":3: the label 'a;b' looks like several. Write a list, or \| between"),
        ([["a"], ["b"], "a, b"], r":3: the label 'a, b' looks like several"),
        ([["a"], []], "all labels are 'a'"),
        ([[], []], "no row has a label"),
        ([["a"], ["A"]], r"the labels 'A' .* and 'a' .* are nearly equal"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(write, labels, says):
    with pytest.raises(DataError, match=says):
        load(write, of(labels))


def test_a_label_that_is_none_of_the_run_is_refused(write):
    task = TASK.model_copy(update={"labels": ("a, b", "c")})
    assert load(write, of([["a, b", "c"]]), task)[0]["labels"] == (["a, b", "c"],)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: label 'd' is not in task\.labels"):
        load(write, of([["d"]]), task)


def test_rare_labels_are_held_out_as_well(write):
    rows, _ = load(write, of(SAID))
    assert rows["molehill.stratum"] == ("sport", "money", "", "war")


def test_figures_are_those_of_scikit_learn_however_the_rows_come():
    from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 2, (50, 4))
    one, other = total(logits, labels, [1]), total(logits, labels, [17, 30])
    scores, said = one.scores(), logits >= 0
    assert scores == other.scores()
    assert scores.figures["micro_f1"].value == pytest.approx(f1_score(labels, said, average="micro"))
    assert scores.macro_f1 == pytest.approx(f1_score(labels, said, average="macro"))
    assert scores.figures["subset_accuracy"].value == pytest.approx(accuracy_score(labels, said))
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert scores.loss == pytest.approx(log_loss(labels.ravel(), p.ravel()))
    recall = [found / (found + missed) for found, missed in one.confusion]
    assert recall == pytest.approx(recall_score(labels, said, average=None))
    for value, (low, high) in (
        (scores.macro_f1, scores.macro_f1_interval), (scores.loss, scores.loss_interval),
        *((each.value, each.interval) for each in scores.figures.values()),
    ):  # fmt: skip
        assert low < value < high


def test_intervals_are_as_wide_as_figures_vary():
    rng, found = np.random.default_rng(1), []
    for _ in range(200):
        logits, labels = rng.normal(size=(80, 3)), rng.random((80, 3)) < (0.5, 0.3, 0.2)
        found.append(total(np.where(rng.random((80, 3)) < 0.8, 2 * labels - 1.0, logits), labels).scores())
    for values, ends in (
        ([each.figures["micro_f1"].value for each in found], [each.figures["micro_f1"].interval for each in found]),
        ([each.macro_f1 for each in found], [each.macro_f1_interval for each in found]),
    ):
        held = np.mean([low <= np.mean(values) <= high for low, high in ends])
        assert 0.9 <= held <= 0.995


def test_nothing_there_and_nothing_said_has_no_f1():
    scores = total(np.full((3, 2), -1.0, np.float32), np.zeros((3, 2))).scores()
    assert set(scores.figures) == {"subset_accuracy"}
    assert scores.macro_f1 is None
    assert scores.figures["subset_accuracy"].value == 1


def test_labels_do_not_compete_as_classes_do():
    """Its nearest neighbour is the classification: there what one class wins the others lose."""
    logits = torch.tensor([[1.0, 0.0]], requires_grad=True)
    of_flags(logits, torch.tensor([[1.0, 0.0]])).sum().backward()
    (flags,) = logits.grad
    logits.grad = None
    of_class(logits, torch.tensor([0])).sum().backward()
    (classes,) = logits.grad
    assert classes.sum().abs() < 1e-6
    torch.testing.assert_close(flags, (torch.sigmoid(torch.tensor([1.0, 0.0])) - torch.tensor([1.0, 0.0])) / 2)


def test_what_it_is():
    kind = kind_of("multi-label")
    assert (kind.predicts, kind.measures[0].name, kind.missing(TASK)) == ("flags", "micro_f1", "labels")
