"""The best head for what a model that stands still reads of an owner's rows, found by convex optimisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molehill.errors import TrainingError
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import Likelihood
from molehill.molora.passes import start_of
from molehill.tasks.batches import IGNORE, eval_order
from molehill.tasks.lengths import Examples
from molehill.tasks.task import Example
from molehill_client.folds import folds, strata_of
from molehill_client.goals import Goal
from molehill_client.workbench import Workbench

_FOLDS = 5
_PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-3)  # of the mean loss in nats; strongest first
_WORSE = 2  # weaker penalties in a row that are worse than the best, after which none is tried
_FLOOR = 1e-3  # of the mean deviation: features that move less are not blown up further
_BIAS = 0.1  # rows: what pulls the bias, so that a class without a row stays at a finite distance
_ROUGH, _EXACT = (1e-4, 1e-6, 200), (1e-9, 1e-13, 2000)  # gradient, change of the loss, iterations


class Line(NamedTuple):
    """A head's numbers.

    Attributes:
        weight: ``[C, d]``.
        bias: ``[C]``.
    """

    weight: Tensor
    bias: Tensor


class Readings(NamedTuple):
    """What a head gets to see of rows, in their order.

    Attributes:
        features: Of every prediction, ``[M, d]`` float32.
        labels: As in `Forward`.
        rows: Row of every prediction, ``[M]`` int64, ascending.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor


@torch.no_grad()
def read(bench: Workbench, rows: Sequence[Example]) -> Readings:
    """Have the model as it is read rows once: pooled, or every token that has a label.

    Args:
        bench: With a model that has a head.
        rows: At least one.
    """
    model, device = bench.model, bench.model.flat.device
    assert model.head is not None
    model.eval()
    features, labels, places = [], [], []
    lengths = [len(row.input_ids) for row in rows]
    for indices in eval_order(lengths, bench.config.evaluate.batch_size, start_of(model)):
        batch = bench.task.collate([rows[i] for i in indices]).to(device)
        mask = batch.attention_mask.bool()
        found, wanted = model.head.pool(model.hidden(batch.input_ids, mask, batch.told), mask), batch.labels
        place = torch.tensor(indices, device=device)
        if not model.head.pools:
            keep = wanted != IGNORE
            found, wanted, place = found[keep], wanted[keep], place.unsqueeze(1).expand_as(keep)[keep]
        features.append(found)
        labels.append(wanted)
        places.append(place)
    place, order = torch.cat(places).sort(stable=True)
    return Readings(torch.cat(features)[order], torch.cat(labels)[order], place)


def best_head(bench: Workbench, rows: Examples, start: Line, *, careful: bool, seed: int, where: str) -> Line:
    """Find the head that does best after the model as it is, on some rows of an owner; see `find_head`.

    Args:
        bench: With a model that has a head.
        rows: Those to find it for.
        start: The head to change.
        careful: As for `find_head`.
        seed: As for `find_head`.
        where: As for `find_head`.

    Raises:
        TrainingError: Features or losses are not finite.
    """
    readings, goal, likelihood = read(bench, rows), bench.goal(rows, personal=True), bench.model.likelihood
    return find_head(readings, rows.units, goal, likelihood, start, careful=careful, seed=seed, where=where)


def find_head(
    readings: Readings,
    units: Sequence[int],
    goal: Goal,
    likelihood: Likelihood,
    start: Line,
    *,
    careful: bool,
    seed: int,
    where: str,
) -> Line:
    """Find the head with the least loss plus ``penalty / 2 * ||change||^2``, the penalty being chosen on folds.

    The change is that of the weight from the start, for features of unit deviation; the bias is free. (It is pulled by
    a tenth of a row, or a class that the owner has no row of would go to infinity.) Penalties are tried from the
    strongest, which hardly leaves more than a change of the bias, each from where the one before led to, and judged by
    the loss of rows that were left out.

    Args:
        readings: Of the owner's training rows.
        units: Of every row the number of its unit, which is in one fold.
        goal: What is minimised, in the scores; convex.
        likelihood: Of the labels.
        start: The head to change, on the device of the readings.
        careful: Prefer a stronger penalty, and to stay at the start, while that is worse than the best by no more than
            one standard error of the difference, over folds. Else the best penalty is taken.
        seed: Of the folds.
        where: Client and occasion, for error messages.

    Returns:
        The head, float32; the start where there is but one unit.

    Raises:
        TrainingError: Features or losses are not finite.
    """
    n = len(units)
    rows, labels = readings.rows.cpu().numpy(), readings.labels.cpu().numpy()
    dealt = folds(units, strata_of(labels, rows, n), _FOLDS, seed)
    fold = torch.from_numpy(dealt[rows]).to(readings.rows.device)
    problem = _Problem(readings, goal, likelihood, start, where)
    there = sorted(set(fold.tolist()))  # a fold may have no prediction
    if len(there) < 2:
        return start
    everything = problem.part(fold >= 0)
    parts = [(problem.part(fold != one), problem.part(fold == one)) for one in there]
    kept = [problem.start() for _ in parts]
    scores = problem.scores(kept[0])

    def judged() -> NDArray[np.float64]:
        """The loss of all rows, then of each fold's."""
        return np.array([float(problem.loss(scores, some)) for some in (everything, *(out for _, out in parts))])

    at_start, tried = judged(), []
    for penalty in _PENALTIES:
        for number, (others, out) in enumerate(parts):
            kept[number] = problem.solve(penalty, kept[number], others, _ROUGH)
            scores[out.at] = problem.scores(kept[number])[out.at]
        tried.append(judged())
        best = min(range(len(tried)), key=lambda at: tried[at][0])
        if len(tried) > best + _WORSE:
            break
    chosen = best
    if careful:
        if _as_good(at_start, tried[best]):
            return start
        chosen = next(at for at, each in enumerate(tried) if at == best or _as_good(each, tried[best]))
    found = problem.start()
    for at, penalty in enumerate(_PENALTIES[: chosen + 1]):
        found = problem.solve(penalty, found, everything, _EXACT if at == chosen else _ROUGH)
    return problem.line(found)


def _as_good(losses: NDArray[np.float64], best: NDArray[np.float64]) -> bool:
    """Whether losses (of all, then of each fold) are worse by no more than a standard error of the difference."""
    apart = (losses - best)[1:]
    return bool(losses[0] - best[0] <= apart.std(ddof=1) / math.sqrt(len(apart)))


class _Part(NamedTuple):
    """Some of the predictions: which they are, their labels and their rows."""

    at: Tensor
    labels: Tensor
    rows: Tensor


class _Problem:
    """A head in the coordinates of standardised features: ``scores = those of the start + z V^T + c``.

    Args:
        readings: Of the rows.
        goal: What is minimised.
        likelihood: Of the labels.
        start: Where V and c are 0.
        where: For error messages.

    Raises:
        TrainingError: A feature is not finite.
    """

    def __init__(self, readings: Readings, goal: Goal, likelihood: Likelihood, start: Line, where: str) -> None:
        wide = torch.float32 if readings.features.device.type == "mps" else torch.float64
        x = readings.features.to(wide, copy=True)
        self._where = where
        if not bool(x.isfinite().all()):
            raise self._strange("a feature is not finite")
        self._readings, self._goal, self._likelihood = readings, goal, likelihood
        self._start = Line(start.weight.to(wide), start.bias.to(wide))
        self._base = x @ self._start.weight.T + self._start.bias
        self._middle = x.mean(0)
        x -= self._middle
        deviation = torch.linalg.vector_norm(x, dim=0) / math.sqrt(len(x))
        self._deviation = deviation.clamp_min(max(float(deviation.mean()) * _FLOOR, torch.finfo(wide).tiny))
        self._z = x.div_(self._deviation)  # in place: of tokens there are many

    def start(self) -> Line:
        """No change."""
        return Line(torch.zeros_like(self._start.weight), torch.zeros_like(self._start.bias))

    def scores(self, change: Line) -> Tensor:
        """Of all rows, ``[M, C]``."""
        return torch.addmm(self._base + change.bias, self._z, change.weight.T)

    def part(self, mask: Tensor) -> _Part:
        """The predictions where a mask ``[M]`` is true."""
        at = mask.nonzero().squeeze(1)
        return _Part(at, self._readings.labels[at], self._readings.rows[at])

    def loss(self, scores: Tensor, some: _Part) -> Tensor:
        """The goal's over some predictions, by the scores of all."""
        own = scores.index_select(0, some.at)
        return self._goal.of_scores(Forward(own, some.labels, some.rows, [], own.detach, self._likelihood))

    def solve(self, penalty: float, change: Line, some: _Part, tolerance: tuple[float, float, int]) -> Line:
        """The best change under a penalty for some predictions, sought from another.

        Raises:
            TrainingError: It is not finite.
        """
        pull = _BIAS / len(some.at)
        weight, bias = (part.clone().requires_grad_() for part in change)
        gradient, least, most = tolerance
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=most, max_eval=2 * most, history_size=20, tolerance_grad=gradient,
            tolerance_change=least, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> float:
            optimiser.zero_grad()
            loss = self.loss(self.scores(Line(weight, bias)), some)
            loss = loss + penalty / 2 * weight.square().sum() + pull / 2 * bias.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]  # untyped torch
            return float(loss.detach())

        optimiser.step(closure)  # type: ignore[no-untyped-call]  # untyped torch
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise self._strange("the best head is not finite")
        return Line(weight.detach(), bias.detach())

    def line(self, change: Line) -> Line:
        """The head that has this change from the start, for features as they are."""
        moved = change.weight / self._deviation
        bias = self._start.bias + change.bias - moved @ self._middle
        return Line((self._start.weight + moved).float(), bias.float())

    def _strange(self, what: str) -> TrainingError:
        return TrainingError(what, where=self._where, mend="Set base.precision to fp32, or lower train.lr.")
