"""How long rows are in tokens, and what ``task.max_length`` cuts off: nobody sees it in a loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from molehill.words import counted

if TYPE_CHECKING:  # its module needs torch, and a report does not
    from molehill.tasks.batches import Example

_QUANTILES = ((0.5, "half"), (0.9, "90%"), (0.99, "99%"))


@dataclass(frozen=True)
class Lengths:
    """Tokens of rows before they are cut.

    Attributes:
        tokens: Of every row.
        limit: Most tokens that a model gets of a row.
        lost: Rows of which no token of an answer is left; they are left out.
        unlearnt: Answers that are read and not learnt, since the chat template edits them once others follow.
        split: Rows that are longer and lose nothing, since they are learnt in pieces.
        pieces: How many pieces those are.
        words: Words whose tags are neither learnt nor scored, since they are cut off or have no token.
    """

    tokens: tuple[int, ...]
    limit: int
    lost: int = 0
    unlearnt: int = 0
    split: int = 0
    pieces: int = 0
    words: int = 0

    @property
    def cut(self) -> int:
        """Rows that lose their end, the lost ones among them."""
        return sum(count > self.limit for count in self.tokens) - self.split

    def quantile(self, part: float) -> int:
        """The fewest tokens that this part of the rows, from 0 to 1, does not exceed; there must be rows."""
        ordered = sorted(self.tokens)
        return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]

    @property
    def quantiles(self) -> str:
        """Such as ``half have up to 20 tokens, 90% up to 31, 99% up to 40, the longest 44``; empty without rows."""
        if not self.tokens:
            return ""
        parts = [f"{name} up to {self.quantile(part)}" for part, name in _QUANTILES]
        longest = f"the longest {self.quantile(1.0)}"
        return ", ".join([parts[0].replace("up", "have up", 1) + " tokens", *parts[1:], longest])

    @property
    def enough(self) -> str:
        """Which ``task.max_length`` keeps 95% of the rows whole, and which all; empty where all are."""
        if not self.cut and not self.split:
            return ""
        most, longest = self.quantile(0.95), self.quantile(1.0)
        part = f"{most} keeps 95% of them whole, " if self.limit < most < longest else ""
        return f"task.max_length = {part}{longest} keeps all"

    @property
    def loss(self) -> str:
        """What is cut, learnt in pieces or not learnt, in words; empty when nothing is."""
        long = f"{self.split} of {len(self.tokens)} rows are longer than task.max_length = {self.limit} and learnt in "
        parts = f"{long}{self.pieces} pieces" if self.split else ""
        lost = loss_in_words(self.cut, self.lost, len(self.tokens), self.unlearnt, self.limit)
        has = (
            "has no token left, so that its tag is" if self.words == 1 else "have no token left, so that their tags are"
        )
        words = f"{counted(self.words, 'word')} {has} neither learnt nor scored"
        return ". ".join(filter(None, (parts, lost, words if self.words else "")))


class Examples(list["Example"]):
    """Encoded rows, without those that have no answer left.

    Args:
        examples: The rows, or pieces of them.
        lengths: Of all rows.
        units: Of every example the number of the unit that its row is of (see `molehill.tasks.units`), so that folds
            can keep together what belongs together.

    Raises:
        ValueError: There are not as many units as examples.
    """

    def __init__(self, examples: Iterable[Example], lengths: Lengths, units: Sequence[int]) -> None:
        super().__init__(examples)
        if len(units) != len(self):
            raise ValueError(f"{len(units)} units of {len(self)} examples")
        self.lengths = lengths
        self.units = tuple(units)

    def part(self, places: Iterable[int]) -> Examples:
        """Some of the examples, with the units that they are of; the lengths stay those of all rows."""
        kept = list(places)
        return Examples([self[i] for i in kept], self.lengths, [self.units[i] for i in kept])


def together(parts: Sequence[Lengths]) -> Lengths:
    """The lengths of all rows of several parts, which have one limit.

    Args:
        parts: At least one.
    """
    tokens = tuple(n for part in parts for n in part.tokens)
    counts = ((part.lost, part.unlearnt, part.split, part.pieces, part.words) for part in parts)
    return Lengths(tokens, parts[0].limit, *map(sum, zip(*counts, strict=True)))


def loss_in_words(cut: int, lost: int, rows: int, unlearnt: int, limit: int | None = None) -> str:
    """What is cut or not learnt, in sentences; empty when nothing is.

    Args:
        cut: Rows that lose their end.
        lost: Of them, those without any token of an answer.
        rows: All rows.
        unlearnt: Answers that the chat template edits.
        limit: Most tokens of a row, where it is known.
    """
    most = "task.max_length" if limit is None else f"task.max_length = {limit}"
    gone = f"; of {lost} the whole answer is cut away, and they are left out" if lost else ""
    long = f"{cut} of {rows} rows are longer than {most} and lose their end{gone}" if cut else ""
    edited = f"the chat template edits answers before the last, so they are read and not learnt: {unlearnt}"
    return ". ".join(filter(None, (long, edited if unlearnt else "")))
