"""An owner's choice among what it could make of the final model, on rows that the rounds never saw."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from molehill.errors import MolehillError, TrainingError
from molehill.tasks.kind import kind_of
from molehill.tasks.measures import LOSS, Measure
from molehill.tasks.outcomes import Outcomes, Parts
from molehill_client.making import Candidate, Company
from molehill_client.participant import Participant
from molehill_client.scores import by_row, score

_log = logging.getLogger(__name__)


def as_good(one: Outcomes, best: Outcomes, judged: Measure, units: Sequence[int]) -> bool:
    """Whether a model is not left for the one of the least loss.

    It is not where its loss is no clearly greater one, and neither where it is as often right: a model that was fitted
    to few rows may know more and be too sure of it.

    Args:
        one: What the model scored on some rows.
        best: What the other scored on them.
        judged: What the task is judged by.
        units: Of every row the number of the unit it is of, ``[N]``.
    """
    if not clearly_worse(one.parts[LOSS.name], best.parts[LOSS.name], units):
        return True
    if judged.name == LOSS.name or judged.name not in best.parts:
        return False
    ours, theirs = (each.parts[judged.name].value() for each in (one, best))
    return ours is not None and theirs is not None and (ours <= theirs if judged.lower else ours >= theirs)


def clearly_worse(one: Parts, best: Parts, units: Sequence[int]) -> bool:
    """Whether a loss is greater by more than one standard error of the paired difference over units.

    Args:
        one: What one model scored on some rows.
        best: What another scored on them.
        units: Of every row the number of the unit it is of, ``[N]``.
    """
    before, after = one.value(), best.value()
    if before is None or after is None:
        return False
    _, places = np.unique(np.asarray(units), return_inverse=True)
    n = int(places.max()) + 1
    each = np.bincount(places, one.changes(len(places)) - best.changes(len(places)), n)
    return bool(before - after > math.sqrt(n / (n - 1) * float(each @ each)))


@dataclass(frozen=True)
class Choice:
    """What an owner makes.

    Attributes:
        name: Of the candidate; empty where there was no choice.
        values: All numbers of the model, ``[P]``.
        replaces: See `Candidate`.
    """

    name: str
    values: Tensor
    replaces: bool


class _Trial(NamedTuple):
    place: int
    way: int
    scored: Outcomes


def choose(company: Company) -> list[Choice]:
    """Choose for every owner of a company, and make it with all rows of the company.

    Every candidate is made with the rows of the rounds and tried on those that were set aside. The first wins that is
    as good as the one of the least loss (`as_good`), so without evidence an earlier one is taken, and without rows that
    were set aside the first.

    Args:
        company: With all training rows of its owners.

    Raises:
        TrainingError: What an owner chose cannot be made; or, with several owners, anything.
    """
    refs = company.bench.config.personal.candidates
    candidates: list[Candidate] = [ref.build("candidate") for ref in refs]
    trying = [n for n, client in enumerate(company.clients) if len(client.aside_rows)]
    chosen = dict.fromkeys(range(len(company.clients)), (0, 0))
    if trying:
        chosen |= dict(zip(trying, _tried(company.part(trying), candidates), strict=True))
    choices: dict[int, Choice] = {}
    for place, way in sorted(set(chosen.values())):
        members = [n for n in chosen if chosen[n] == (place, way)]
        made = candidates[place].make(company.part(members))[way]
        for n, values in zip(members, made, strict=True):
            choices[n] = Choice(refs[place].name, values.clone(), candidates[place].replaces)
    return [choices[n] for n in range(len(company.clients))]


def fit_as_told(company: Company) -> list[Choice]:
    """What every owner of a company makes where there is nothing to choose: the residuals that the configuration says.

    Raises:
        TrainingError: A loss is not finite.
    """
    return [Choice("", values, replaces=False) for values in company.personal(company.received)]


def _tried(company: Company, candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
    """Of every owner the place of the candidate that wins, and which way of it."""
    owners = company.clients
    trial = replace(company, rows=[client.round_rows for client in owners])
    tried: list[list[_Trial]] = [[] for _ in owners]
    for place, candidate in enumerate(candidates):
        try:
            for way, values in enumerate(candidate.make(trial)):
                for found, client, own in zip(tried, owners, values, strict=True):
                    client.bench.model.flat.copy_(own)
                    found.append(_Trial(place, way, scored(client)))
        except MolehillError as error:
            if len(owners) > 1:  # one by one it shows whom it concerns
                raise
            name = company.bench.config.personal.candidates[place].name
            _log.warning("%s cannot make candidate %s: %s", owners[0].name, name, error)
    return [_winner(found, client) for found, client in zip(tried, owners, strict=True)]


def _winner(tried: Sequence[_Trial], client: Participant) -> tuple[int, int]:
    if not tried:
        raise TrainingError("none of personal.candidates can be made", where=f"client {client.name}")
    best = min(tried, key=lambda each: _value(each.scored))
    judged, units = kind_of(client.bench.config.task).measures[0], client.aside_rows.units
    first = next(each for each in tried if each is best or as_good(each.scored, best.scored, judged, units))
    return first.place, first.way


def _value(scored: Outcomes) -> float:
    value = scored.parts[LOSS.name].value()
    return math.inf if value is None else value


def scored(client: Participant) -> Outcomes:
    """What the model as it is scores on the rows that a client set aside.

    Raises:
        TrainingError: A loss is not finite.
    """
    rows = client.aside_rows
    return by_row(client.bench, rows, score(client.bench, rows))
