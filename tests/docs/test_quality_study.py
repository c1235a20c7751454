"""The arithmetic of the quality study, and the rules its data are made by."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from molehill.tasks.outcomes import Parts


def module(name):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


paired, data = module("paired"), module("quality_data")


def right(rate, n=200, seed=0):
    return Parts.of_rows((np.random.default_rng(seed).random(n) < rate).astype(float))


def scores(rates, n=200, per_unit=1):
    """Of two seeds; the rows of an owner are drawn alike whatever the rate."""
    units = np.arange(n) // per_unit
    return {
        (s, name): (right(rate, n, 10 * s + at), units) for s in (2, 3) for at, (name, rate) in enumerate(rates.items())
    }


def test_nothing_differs_from_itself():
    same = scores({"a": 0.6, "b": 0.8})
    assert paired.differences(same, same) == (0.0, 0.0, 0.0, 0.0, 0, 2)


def test_a_difference_is_the_mean_over_owners_and_lies_in_its_interval():
    ours, theirs = scores({"a": 0.7, "b": 0.8}), scores({"a": 0.6, "b": 0.8})
    mean, low, high, worst, losers, owners = paired.differences(ours, theirs)
    wanted = np.mean([ours[key][0].value() - theirs[key][0].value() for key in ours])
    assert mean == pytest.approx(wanted)
    assert low < mean < high
    assert (worst, losers, owners) == (0, 0, 2)
    assert paired.means(ours)[1] == pytest.approx(np.mean([min(ours[s, o][0].value() for o in "ab") for s in (2, 3)]))


def test_an_owner_loses_who_is_worse_by_more_than_chance():
    ours, theirs = scores({"a": 0.9, "b": 0.5, "c": 0.6}), scores({"a": 0.6, "b": 0.8, "c": 0.601})
    found = paired.differences(ours, theirs)
    assert (found.losers, found.owners) == (1, 3)
    assert paired.differences(ours, theirs, same_owners=False).owners == 6
    assert found.worst < -0.2


def test_rows_of_one_unit_are_drawn_together():
    def width(per_unit):
        block = np.repeat(np.random.default_rng(1).random(200 // 20) < 0.5, 20).astype(float)
        units = np.arange(200) // per_unit
        ours = {(2, "a"): (Parts.of_rows(block), units)}
        theirs = {(2, "a"): (Parts.of_rows(np.zeros(200)), units)}
        found = paired.differences(ours, theirs)
        return found.high - found.low

    assert width(20) > 3 * width(1)


def test_other_rows_are_no_pair():
    ours = scores({"a": 0.7})
    theirs = {key: (parts, units + 1) for key, (parts, units) in ours.items()}
    with pytest.raises(ValueError, match="other rows"):
        paired.differences(ours, theirs)


def test_opinions_are_those_that_are_stated(monkeypatch):
    ratings = [-3.0, -1.0, -0.3, 0.3, 1.0, 3.0]
    rows = [
        {"text": str(r), "label": "", "rating": r, "domain": "nyt", "group": f"{r}/{n}"}
        for r in ratings
        for n in range(40)
    ]
    monkeypatch.setattr(data, "_sample", lambda: iter(rows))
    said = {}
    for row in data.disagreement():
        said.setdefault(row["owner"].partition("-")[0], {})[row["rating"]] = int(row["label"][-1])
    assert {name: [found[r] for r in ratings] for name, found in said.items()} == {
        "polarity": [0, 0, 1, 1, 2, 2],
        "strict": [0, 0, 0, 1, 1, 2],
        "strength": [2, 1, 0, 0, 1, 2],
    }
    assert len({row["owner"] for row in data.disagreement()}) == 6
