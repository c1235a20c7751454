"""What was scored row by row: it comes to what the tally says, and two of it to a difference of pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from molehill import registry
from molehill.config import Task
from molehill.entities import Tagging
from molehill.intervals import of_mean, of_paired, student
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_class, of_flags, of_number
from molehill.tasks.kind import kind_of
from molehill.tasks.measures import ACCURACY, LOSS, MACRO_F1
from molehill.tasks.metrics import ScoreSum
from molehill.tasks.multi_label import FlagSum
from molehill.tasks.outcomes import Outcomes, Parts, gains
from molehill.tasks.preference import PairSum
from molehill.tasks.regression import NumberSum
from molehill.tasks.token_classification import EntitySum

Z = 1.959963984540054


def classified(right: np.ndarray, there: np.ndarray, classes: int = 3) -> Outcomes:
    """Of a tally that is right where it should be, and else says the class after the one that is there."""
    said = torch.tensor(np.where(right, there, (there + 1) % classes))
    total = ScoreSum(classes)
    total.count(10.0 * torch.nn.functional.one_hot(said, classes).float(), torch.tensor(there))
    return total.outcomes()


def test_the_gain_in_accuracy_is_that_of_the_pairs_and_its_interval_as_by_hand():
    """Both are right of 50 rows, the first alone of 4, the second alone of 16, none of 30."""
    alone, ours = np.zeros(100, bool), np.zeros(100, bool)
    alone[:54] = True
    ours[:50] = ours[54:70] = True
    there = np.arange(100) % 3
    found = gains(classified(alone, there), classified(ours, there), (ACCURACY,))["accuracy"]
    assert found.value == pytest.approx(0.12)
    more, less = 17 / 102, 5 / 102
    error = math.sqrt((more + less - (more - less) ** 2) / 102)
    assert found.interval == pytest.approx((more - less - Z * error, more - less + Z * error))
    # That of two shares of rows of their own would be half as long again.
    assert found.interval[1] - found.interval[0] < 2 * Z * math.sqrt(0.54 * 0.46 / 100 + 0.66 * 0.34 / 100)


def test_rows_of_one_unit_say_no_more_than_one():
    rng = np.random.default_rng(1)
    there, alone, ours = rng.integers(0, 3, 40), rng.random(40) < 0.5, rng.random(40) < 0.7
    once = gains(classified(alone, there), classified(ours, there), (ACCURACY, MACRO_F1, LOSS))
    three = [np.repeat(each, 3) for each in (alone, ours, there)]
    rows = classified(three[0], three[2]), classified(three[1], three[2])
    told = gains(*rows, (ACCURACY, MACRO_F1, LOSS), np.repeat(np.arange(40), 3))
    free = gains(*rows, (ACCURACY, MACRO_F1, LOSS))
    for name in ("accuracy", "macro_f1", "loss"):
        assert told[name].value == pytest.approx(once[name].value)
        width, one, apart = (each[name].interval[1] - each[name].interval[0] for each in (told, once, free))
        assert width == pytest.approx(one, rel=0.1)
        assert apart < 0.65 * one


def test_few_units_say_little_and_one_nothing():
    assert [student(n) for n in (5, 10, 30, 1000)] == pytest.approx([2.776 / Z, 2.262 / Z, 2.045 / Z, 1.001], rel=0.004)
    rng = np.random.default_rng(7)
    there, units, held = np.zeros(60, int), np.repeat(np.arange(6), 10), []
    for _ in range(300):  # a model is right in all of a unit or in none, the other everywhere at random
        alone, ours = rng.random(60) < 0.5, np.repeat(rng.random(6) < 0.5, 10)
        low, high = gains(classified(alone, there), classified(ours, there), (ACCURACY,), units)["accuracy"].interval
        held.append(low <= 0 <= high)
    assert np.mean(held) > 0.91
    alone = classified(rng.random(60) < 0.5, there)
    one = gains(alone, classified(rng.random(60) < 0.7, there), (ACCURACY, LOSS), np.zeros(60, int))
    assert one["accuracy"].value != 0
    assert (one["accuracy"].interval, one["loss"].interval) == (None, None)
    assert gains(alone, alone, (ACCURACY,), np.zeros(60, int))["accuracy"].interval == (0.0, 0.0)


def test_a_model_gains_nothing_over_itself_for_certain_and_over_one_that_errs_alike_almost():
    there = np.arange(60) % 3
    right = there != 1
    same = gains(classified(right, there), classified(right, there), (ACCURACY, MACRO_F1, LOSS))
    for figure in same.values():
        assert (figure.value, figure.interval) == (0.0, (0.0, 0.0))
        assert math.copysign(1, figure.value) == 1
    total = ScoreSum(3)
    said = torch.tensor(np.where(right, there, (there + 1) % 3))
    total.count(3.0 * torch.nn.functional.one_hot(said, 3).float(), torch.tensor(there))
    alike = gains(classified(right, there), total.outcomes(), (ACCURACY, LOSS))
    low, high = alike["accuracy"].interval
    assert (alike["accuracy"].value, low) == (0.0, -high)
    assert high == pytest.approx(Z * math.sqrt(2) / 62)
    assert alike["loss"].value != 0


def test_less_is_better_where_a_measure_says_so():
    alone, ours = (Outcomes(4, {"loss": Parts.of_rows(np.array(each))}) for each in ([2, 2, 2, 2.0], [1, 2, 1, 3.0]))
    found = gains(alone, ours, (ACCURACY, LOSS))
    assert found.keys() == {"loss"}
    assert found["loss"].value == pytest.approx(0.25)
    assert found["loss"].interval == pytest.approx(
        of_mean(0.25, student(4) * np.std([1, 0, 1, -1], ddof=1) / 2, low=-math.inf)
    )
    huge = Outcomes(4, {"loss": Parts.of_rows(np.full(4, 1e35))})
    assert gains(huge, ours, (LOSS,)) == {}  # no figure holds it


def test_the_interval_of_macro_f1_is_as_long_as_that_of_a_bootstrap_of_the_rows():
    rng = np.random.default_rng(3)
    there = rng.choice(3, 300, p=[0.6, 0.3, 0.1])
    alone = rng.random(300) < 0.6
    ours = np.where(rng.random(300) < 0.7, alone, rng.random(300) < 0.8)
    one, other = classified(alone, there), classified(ours, there)
    found = gains(one, other, (MACRO_F1,))["macro_f1"]
    drawn = []
    for _ in range(400):
        weights = np.bincount(rng.integers(0, 300, 300), minlength=300).astype(float)
        drawn.append(other.parts["macro_f1"].value(weights) - one.parts["macro_f1"].value(weights))
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * Z * np.std(drawn), rel=0.12)
    assert found.interval[0] < found.value < found.interval[1]


def test_an_interval_of_pairs_holds_what_it_should_as_often_as_it_says():
    rng = np.random.default_rng(5)
    for n, more, less in ((30, 0.1, 0.02), (100, 0.05, 0.05), (300, 0.2, 0.1)):
        gained = rng.multinomial(n, [more, less, 1 - more - less], 2000)
        ends = [of_paired(a - b, a + b, n) for a, b, _ in gained.tolist()]
        assert np.mean([low <= more - less <= high for low, high in ends]) >= 0.94
        assert all(-1 <= low <= (a - b) / n <= high <= 1 for (low, high), (a, b, _) in zip(ends, gained, strict=True))
    assert of_paired(20, 20, 20)[1] == 1.0


def forward(logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, likelihood) -> Forward:
    return Forward(logits, labels, rows, [], lambda: logits / 2, likelihood)


def tallies(kind: str, seed: int):
    """A tally of a kind of task, and two batches of 6 rows for it."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.arange(6)
    words = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])

    def logits(n, c):
        return torch.randn(n, c, generator=draw)

    def classes(n, c):
        return torch.randint(c, (n,), generator=draw)

    match kind:
        case "classification":
            return ScoreSum(4), [forward(logits(6, 4), classes(6, 4), rows, of_class) for _ in range(2)]
        case "causal-lm":
            total = kind_of(Task(kind=kind)).measures[0]
            return ScoreSum(accuracy=total), [forward(logits(10, 9), classes(10, 9), words, of_class) for _ in range(2)]
        case "multi-label":
            flags = [torch.rand(6, 3, generator=draw).round() for _ in range(2)]
            return FlagSum(3), [forward(logits(6, 3), each, rows, of_flags) for each in flags]
        case "regression":
            return NumberSum(5.0), [forward(logits(6, 1), logits(6, 1)[:, 0], rows, of_number) for _ in range(2)]
        case "token-classification":
            total = EntitySum(Tagging.of(("O", "B-x", "I-x")), 3)
            return total, [forward(logits(10, 3), classes(10, 3), words, of_class) for _ in range(2)]
        case "preference":
            pairs = torch.arange(12)
            total = PairSum()
            total.by(lambda one: one.nll().mean())
            return total, [forward(logits(12, 9), classes(12, 9), pairs, of_class) for _ in range(2)]


@pytest.mark.parametrize("kind", [method.name for method in registry.methods("task")])
def test_what_rows_were_scored_comes_to_the_scores_of_every_kind_of_task(kind):
    total, batches = tallies(kind, 1)
    for batch in batches:
        total.add(batch)
    scores, found = total.scores().model_dump(), total.outcomes()
    measures = {measure.name: measure for measure in kind_of(Task(kind=kind)).measures}
    assert found.n == 12
    assert next(iter(measures)) in found.parts
    assert "loss" in found.parts
    for name, part in found.parts.items():
        assert part.value() == pytest.approx(measures[name].of(scores)), name
        assert abs(part.changes(12).sum()) < 1e-9
    again = Outcomes.of_json(found.as_json())
    assert again.as_json() == found.as_json()
    # In another order of the rows the same rows have the same.
    order = [7, 2, 11, 0, 5, 9, 1, 3, 4, 6, 8, 10]
    placed = found.placed(order)
    for name, part in placed.parts.items():
        assert part.value() == pytest.approx(found.parts[name].value())
        assert part.changes(12)[order] == pytest.approx(found.parts[name].changes(12))
    with pytest.raises(ValueError, match="12 of 3 rows"):
        found.placed([0, 1, 2])
    ours, batches = tallies(kind, 2)
    for batch in batches:
        ours.add(batch)
    gained = gains(found, ours.outcomes(), list(measures.values()))
    after = ours.scores().model_dump()
    for name, figure in gained.items():
        sign = -1 if measures[name].lower else 1
        difference = measures[name].of(after) - measures[name].of(scores)
        assert figure.value == pytest.approx(sign * difference), name
        assert figure.interval[0] < figure.value < figure.interval[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.update(above=[1.0]),
        lambda part: part.update(rows=[9, 9]),
        lambda part: part.update(columns=[-1, 0]),
        lambda part: part.pop("below"),
        lambda part: part.update(above="ab"),
    ],
)
def test_outcomes_of_another_form_are_no_outcomes(change):
    found = Outcomes(2, {"loss": Parts.of_rows(np.array([1.0, 2.0]))}).as_json()
    change(found["parts"]["loss"])
    with pytest.raises((ValueError, LookupError, TypeError)):
        Outcomes.of_json(found)
