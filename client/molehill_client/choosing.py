"""An owner's choice among what it could make of the final model, on rows that the rounds never saw."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from molehill.errors import MolehillError, TrainingError
from molehill.tasks.kind import kind_of
from molehill.tasks.measures import LOSS
from molehill.tasks.outcomes import Parts
from molehill_client.making import Candidate, Company
from molehill_client.participant import Participant
from molehill_client.scores import batches_of, by_row, placed, score

_log = logging.getLogger(__name__)

TEMPERATURES = (0.5, 0.63, 0.79, 1.0, 1.26, 1.59, 2.0)
_LOGITS = ("class", "flags")  # what is predicted by logits, see `molehill.tasks.kind.Kind`


def clearly_worse(one: Parts, best: Parts, units: Sequence[int]) -> bool:
    """Whether a loss is greater by more than one standard error of the paired difference over units.

    One unit alone has no such error, and tells nothing.

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
    if n < 2:
        return False
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
    losses: Parts


def choose(company: Company) -> list[Choice]:
    """Choose for every owner of a company, and make it with all rows of the company.

    Every candidate is made with the rows of the rounds and tried on those that were set aside. The first wins that is
    not worse than the best by more than a standard error, so without evidence an earlier one is taken, and without rows
    that were set aside the first.

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
                    found.append(_Trial(place, way, losses_of(client)))
        except MolehillError as error:
            if len(owners) > 1:  # one by one it shows whom it concerns
                raise
            name = company.bench.config.personal.candidates[place].name
            _log.warning("%s cannot make candidate %s: %s", owners[0].name, name, error)
    return [_winner(found, client) for found, client in zip(tried, owners, strict=True)]


def _winner(tried: Sequence[_Trial], client: Participant) -> tuple[int, int]:
    if not tried:
        raise TrainingError("none of personal.candidates can be made", where=f"client {client.name}")
    best = min(tried, key=lambda each: _value(each.losses))
    units = client.aside_rows.units
    first = next(each for each in tried if each is best or not clearly_worse(each.losses, best.losses, units))
    return first.place, first.way


def _value(losses: Parts) -> float:
    value = losses.value()
    return math.inf if value is None else value


@torch.no_grad()
def losses_of(client: Participant) -> Parts:
    """What the model as it is loses on the rows that a client set aside, when it is as sure as it has a right to be.

    The logits of a head are divided by the temperature of `TEMPERATURES` with the least loss (Guo et al. 2017,
    On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599): a model that was fitted to few rows may
    know more than another and be too sure of it. They span a narrow range, since in a wide one what is surely wrong
    becomes no worse than ignorant. A model that writes is used as sure as it is, and judged so.

    Raises:
        TrainingError: A loss is not finite.
    """
    bench, rows = client.bench, client.aside_rows
    if bench.model.head is None or kind_of(bench.config.task).predicts not in _LOGITS:
        return by_row(bench, rows, score(bench, rows)).parts[LOSS.name]
    model, counts = bench.model, np.zeros(len(rows))
    model.eval()
    totals = np.zeros((len(TEMPERATURES), len(rows)))
    for places, batch in zip(placed(bench, rows), batches_of(bench, rows), strict=True):
        forward = model(batch.input_ids, batch.attention_mask, batch.labels, batch.told)
        at = np.asarray(places)[forward.rows.cpu().numpy()]
        np.add.at(counts, at, 1.0)
        for total, temperature in zip(totals, TEMPERATURES, strict=True):
            each = forward.likelihood(forward.scores / temperature, forward.labels)
            np.add.at(total, at, each.double().cpu().numpy())
    if not np.isfinite(totals).all():
        raise TrainingError("the loss on rows that were set aside is not finite", where=f"client {client.name}")
    return Parts.of_rows(totals[totals.sum(1).argmin()], counts)
