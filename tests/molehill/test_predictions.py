"""What the numbers of a model say: the same on hosts and devices, and of each kind what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molehill.errors import DataError
from molehill.molora import likelihoods
from molehill.outputs import READINGS, About
from molehill.predictions import Class, Flags, Number, lines
from molehill.rowfiles import pairs
from molehill.rowfiles.values import names_of
from molehill.tasks.kind import kind_of

THREE = About(labels=("a", "b", "c"))
STARS = About(range=(1.0, 5.0))


def test_one_of_several_classes_is_not_any_number_of_them():
    logits = np.array([2.0, 1.0, -1.0], np.float32)
    one, several = (READINGS[kind].read(logits, THREE) for kind in ("classification", "multi-label"))
    assert (one.label, several.labels) == ("a", ("a", "b"))
    assert sum(one.probabilities.values()) == pytest.approx(1)
    assert one.probabilities == pytest.approx(dict(zip("abc", np.exp(logits) / np.exp(logits).sum(), strict=True)))
    assert several.probabilities == pytest.approx(dict(zip("abc", 1 / (1 + np.exp(-logits)), strict=True)))
    assert READINGS["multi-label"].read(-logits - 3, THREE).labels == ()


def test_a_number_is_in_the_unit_of_its_labels():
    reading = READINGS["regression"]
    assert [reading.read(np.array([z], np.float32), STARS).value for z in (-1, 0, 0.5, 1)] == [1, 3, 4, 5]
    assert reading.target(4, STARS, "") == 0.5
    counts = reading.counts(np.array([[0.5], [0.0]], np.float32), np.array([1.0, 0.0]))
    assert reading.figure_of(counts, STARS) == pytest.approx(np.sqrt((1 + 0) / 2))


def test_numbers_are_alike_to_a_tenth_of_the_range():
    one = np.zeros((3, 1), np.float32)
    other = np.array([[0.0], [-0.19], [0.21]], np.float32)
    assert READINGS["regression"].alike(one, other).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("kind", "likelihood", "labels"),
    [
        ("classification", "of_class", [2, 0]),
        ("multi-label", "of_flags", [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        ("regression", "of_number", [0.5, -1.0]),
    ],
)
def test_losses_are_those_of_training(kind, likelihood, labels):
    logits = np.random.default_rng(0).normal(size=(2, 1 if kind == "regression" else 3)).astype(np.float32)
    wanted = getattr(likelihoods, likelihood)(torch.tensor(logits), torch.tensor(labels))
    np.testing.assert_allclose(READINGS[kind].losses(logits, np.array(labels)), wanted.numpy(), rtol=1e-5)


def test_micro_f1_is_that_of_all_flags_together():
    from sklearn.metrics import f1_score

    rng, reading = np.random.default_rng(0), READINGS["multi-label"]
    logits, there = rng.normal(size=(20, 3)), rng.integers(0, 2, (20, 3)).astype(float)
    counts = sum(reading.counts(logits[part], there[part]) for part in (slice(0, 7), slice(7, None)))
    assert reading.figure_of(counts, THREE) == pytest.approx(f1_score(there, logits >= 0, average="micro"))


def test_lines_for_people_stand_below_each_other():
    assert lines([Class("good", 0.925, {}), Class("so-so", 1.0, {})]) == ["good    92.5%", "so-so  100.0%"]
    assert lines([Number(3.5), Number(12.25)]) == ["3.5  ", "12.25"]
    assert [line.rstrip() for line in lines([Flags(("a", "b"), {"a": 0.5, "b": 0.75, "c": 0}), Flags((), {})])] == [
        "a 50.0%, b 75.0%", "(none)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["a", "b"], ("a", "b")), ([], ()), ("", ()), ("a|b", ("a", "b")), ("a | b", ("a", "b")),
        ('["a", "b|c"]', ("a", "b|c")), ("a;b", ("a;b",)), ([1, True], ("1", "true")),
    ],
)  # fmt: skip
def test_names_of_a_row(given, found):
    assert names_of(given, "") == found


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "the row has no 'labels'"), (3, "'labels' must be a list, but is int 3"), ('["a"', "are no JSON list"),
        (["a", "a"], "the label 'a' is there twice"), ("a||b", "'label' is empty"), ([["a"]], "must be text"),
    ],
)  # fmt: skip
def test_what_names_no_labels(given, says):
    with pytest.raises(DataError, match=says):
        names_of(given, "rows:1")


def test_pairs_of_a_command_line_and_of_rows():
    assert pairs.given(["a", "b"], ["c", "d"], "--text") == [("a", "c"), ("b", "d")]
    assert pairs.given(["a"], None, "--text") == ["a"]
    with pytest.raises(DataError, match="2 times --text, and 1 times --pair"):
        pairs.given(["a", "b"], ["c"], "--text")
    assert pairs.of_row({"text": "a", "text_pair": "b"}, "") == ("a", "b")
    assert pairs.of_row({"text": "a", "text_pair": ""}, "") == "a"


def test_every_kind_that_devices_run_can_be_read():
    names = ("classification", "regression", "multi-label", "causal-lm")
    assert {kind_of(name).bundle for name in names} <= set(READINGS)
