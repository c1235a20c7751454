"""Rows in folds: units whole, strata alike, nothing empty."""

from __future__ import annotations

import numpy as np
import pytest

from molehill_client.folds import folds, strata_of


def classes(labels):
    labels = np.array(labels)
    return strata_of(labels, np.arange(len(labels)), len(labels))


def test_rows_of_one_unit_are_in_one_fold_and_no_fold_is_empty():
    rng = np.random.default_rng(0)
    units = rng.integers(0, 30, 200)
    dealt = folds(units, classes(rng.integers(0, 3, 200)), 5, seed=1)
    assert sorted(set(dealt)) == [0, 1, 2, 3, 4]
    assert all(len(set(dealt[units == unit])) == 1 for unit in set(units))
    sizes = np.bincount(dealt)
    assert sizes.max() - sizes.min() <= 8  # a unit has 7 rows or so


def test_folds_have_each_class_alike():
    labels = np.array([0] * 70 + [1] * 25 + [2] * 5)
    dealt = folds(range(100), classes(labels), 5, seed=3)
    assert [np.bincount(labels[dealt == fold]).tolist() for fold in range(5)] == [[14, 5, 1]] * 5


def test_what_is_there_of_each_class_and_numbers_are_dealt_alike_too():
    flags = np.array([[1, 1], [1, 0], [0, 1], [0, 0]] * 10)
    dealt = folds(range(40), classes(flags), 5, seed=0)
    assert [flags[dealt == fold].sum(0).tolist() for fold in range(5)] == [[4, 4]] * 5
    numbers = np.linspace(-1, 1, 50)
    dealt = folds(range(50), classes(numbers), 5, seed=0)
    assert [np.bincount(dealt[start : start + 10]).tolist() for start in range(0, 50, 10)] == [[2] * 5] * 5


def test_predictions_are_counted_by_their_row():
    held = strata_of(np.array([4, 4, 9, 4]), np.array([0, 0, 0, 2]), 3)
    assert held.tolist() == [[2, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize(("units", "parts"), [([], 0), ([7], 1), ([7, 7, 7], 1), ([7, 1, 7], 2), ([4, 3, 2, 1], 4)])
def test_few_units_make_few_folds(units, parts):
    dealt = folds(units, classes([0] * len(units)), 5, seed=0)
    assert set(dealt) == set(range(parts))


def test_equal_seeds_deal_alike_and_others_do_not():
    labels = classes([0, 1] * 20)
    first, again, other = (folds(range(40), labels, 5, seed).tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other
