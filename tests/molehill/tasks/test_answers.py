"""How alike answers are, against figures computed by hand and by sacrebleu's own examples."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from molehill.plan import Answers
from molehill.tasks import answers


@pytest.mark.parametrize(
    ("written", "right", "same"),
    [
        ("The  Eiffel Tower.", "eiffel tower", True),
        ("an apple", "apple", True),
        ("theatre", "atre", False),  # an article is a word of its own
        ("«Où?»", "où", True),
        ("", "the", True),
        ("two", "three", False),
    ],
)
def test_normalised_answers_are_those_of_squad(written, right, same):
    assert answers.matched(written, right) is same


def test_exact_answers_differ_in_nothing_but_the_space_around_them():
    assert answers.exact(" Paris\n", "Paris")
    assert not answers.exact("paris", "Paris")


@pytest.mark.parametrize(
    ("written", "right", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, with F1 in place of his F
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("the cat", "the cat sat on the mat", 0.5),  # 2 of 2 and 2 of 6: 2 x 2 / 8
        ("Дом, стоит", "дом стоит", 1.0),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("...", "!", 1.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(written, right, score):
    assert answers.rouge_l(written, right) == pytest.approx(score)
    assert answers.rouge_l(right, written) == pytest.approx(score)


def test_chrf_is_sacrebleus():
    assert answers.chrf("the cat sat", "the cat sat") == 1.0
    assert answers.chrf("", "cat") == answers.chrf("cat", "") == 0.0
    # Of "ab" in "abc": 1-grams 2/2 and 2/3, 2-grams 1/1 and 1/2; F2 of their means, 1 and 7/12.
    assert answers.chrf("ab", "abc") == pytest.approx(5 * (7 / 12) / (4 + 7 / 12))


def test_sums_are_over_all_answers():
    found = answers.added_up([("Paris.", "Paris"), ("Rome", "Rome"), ("the cat", "the cat sat on the mat")])
    assert (found.n, found.exact_match, found.normalised_match) == (3, 1, 2)
    assert (found.rouge_l, found.rouge_l_squares) == pytest.approx((2.5, 2.25))
    values = [answers.chrf("Paris.", "Paris"), 1.0, answers.chrf("the cat", "the cat sat on the mat")]
    assert found.chrf == pytest.approx(sum(values))
    assert found.chrf_squares == pytest.approx(sum(value**2 for value in values))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"exact_match": 3},
        {"rouge_l": 2.1},
        {"chrf": float("nan")},
        {"rouge_l_squares": 1.5},  # more than the sum of numbers between 0 and 1
        {"rouge_l_squares": 0.4},  # less than any two numbers of this sum have
    ],
)
def test_sums_that_cannot_be_are_refused(wrong):
    good = {
        "n": 2, "exact_match": 1, "normalised_match": 1, "rouge_l": 1.0, "rouge_l_squares": 0.5, "chrf": 1.5,
        "chrf_squares": 1.25,
    }  # fmt: skip
    Answers.model_validate(good)
    with pytest.raises(ValidationError):
        Answers.model_validate(good | wrong)
