"""Preference: two answers to one question, written as a causal language model reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from molehill.errors import DataError
from molehill.intervals import of_bounded, of_mean
from molehill.molora.forward import Forward
from molehill.molora.pairs import margins
from molehill.plan import Figure, Scores
from molehill.rowfiles.preferences import pair_of
from molehill.tasks.batches import IGNORE, Batch, Example, pad
from molehill.tasks.causal_lm import CausalLM
from molehill.tasks.lengths import Examples, Lengths
from molehill.tasks.measures import LOSS
from molehill.tasks.metrics import require_scores
from molehill.tasks.outcomes import Outcomes, Parts
from molehill.tasks.rows import Rows
from molehill.tasks.units import numbers


@dataclass(frozen=True, slots=True)
class Pair(Example):
    """The chosen answer after its question; and the rejected one.

    Attributes:
        other_ids: Token ids of the question and the rejected answer.
        other_labels: One label per token of these.
    """

    other_ids: list[int] = field(default_factory=list)
    other_labels: list[int] = field(default_factory=list)


class Preference(CausalLM):
    """Questions with two answers; implements `molehill.tasks.task.Task`.

    Args:
        tokenizer: Of the base model, as of `CausalLM`.
        max_length: Longest input in tokens. A longer one loses its end; when of one answer no token is left, the pair
            is left out, and counted.
    """

    def encode(self, rows: Rows) -> Examples:
        """Tokenise both answers of every row, each after the question.

        Raises:
            DataError: A row does not fit the chat template, or no row has both answers within ``max_length``.
        """
        examples: list[Example] = []
        tokens, lost, units = [], 0, []
        for (where, row), told, unit in zip(rows.records(), rows.told(), numbers(rows), strict=True):
            sides = []
            for form in pair_of(row, where):
                text, spans, _ = self._render(form, where)
                sides.append(self._tokenise(text, spans))
            tokens.append(max(len(ids) for ids, _ in sides))
            (ids, labels), (others, other) = ((i[: self.max_length], y[: self.max_length]) for i, y in sides)
            if all(any(label != IGNORE for label in side[1:]) for side in (labels, other)):
                examples.append(Pair(ids, labels, *told, others, other))
                units.append(unit)
            else:
                lost += 1
        lengths = Lengths(tuple(tokens), self.max_length, lost)
        if lost and not examples:
            mend = f"Raise task.max_length above {self.max_length}: {lengths.quantiles}."
            raise DataError("no pair has both answers within task.max_length", where=rows.source, mend=mend)
        return Examples(examples, lengths, units)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad pairs to one length: the chosen answers in the even rows, the rejected ones in the odd."""
        sides = []
        for each in examples:
            assert isinstance(each, Pair)  # of this task
            sides += [each, Example(each.other_ids, each.other_labels, each.task, each.domain)]
        return pad(sides, self._tokenizer.pad_token_id, "pair")

    def tally(self) -> PairSum:  # type: ignore[override]  # of pairs, where a causal LM counts tokens
        """How many pairs are preferred aright, by how much, and the objective's loss."""
        return PairSum()


class PairSum:
    """Pairs that were judged; the order of the batches does not matter."""

    confusion = None
    found = None

    def __init__(self) -> None:
        self._margins: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._objective: Callable[[Forward], Tensor] | None = None

    def by(self, objective: Callable[[Forward], Tensor]) -> None:
        """See `molehill.tasks.task.ByObjective`."""
        self._objective = objective

    @torch.no_grad()
    def add(self, forward: Forward) -> None:
        """Count one batch; the base is run over it once more."""
        reference = forward.reference()
        known = replace(forward, records=[], reference=lambda: reference)
        found = margins(known)
        self._margins.append(found.double().cpu())
        assert self._objective is not None  # `by` comes first
        losses = torch.stack([self._objective(pair) for pair in known.by_client(len(found), 2)])
        self._losses.append(losses.double().cpu())

    def scores(self) -> Scores:
        """Shares, margins and loss.

        Raises:
            DataError: Nothing was counted.
            TrainingError: The loss is not finite.
        """
        found, losses = (
            torch.cat(parts).sort().values if parts else torch.zeros(0) for parts in (self._margins, self._losses)
        )
        n = len(found)
        require_scores(n, float(losses.sum()))
        right = _right(found)
        share, error = float(right.mean()), _error(right)
        margin, loss = float(found.mean()), float(losses.mean())
        return Scores(
            n=n,
            loss=loss,
            loss_interval=None if (spread := _error(losses)) is None else of_mean(loss, spread),
            figures={
                "preferred": Figure(value=share, interval=of_bounded(share, error, n)),
                "margin": Figure(
                    value=margin,
                    interval=None if (off := _error(found)) is None else of_mean(margin, off, low=-math.inf),
                ),
            },
        )  # fmt: skip

    def outcomes(self) -> Outcomes:
        """See `molehill.tasks.task.Tally`."""
        found, losses = torch.cat(self._margins), torch.cat(self._losses)
        parts = {"preferred": Parts.of_rows(_right(found)), "margin": Parts.of_rows(found)}
        return Outcomes(len(found), {**parts, LOSS.name: Parts.of_rows(losses)})


def _right(found: Tensor) -> Tensor:
    """Of every margin 1 where it is above 0, and half where it is 0."""
    return (found > 0).double() + (found == 0).double() / 2


def _error(values: Tensor) -> float | None:
    """Standard error of a mean; None of a single value."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
