"""Texts, or pairs of texts, of which something is to be said as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from molehill.errors import DataError
from molehill.rowfiles.pairs import PAIR, TEXT
from molehill.tasks.batches import Batch, Example, pad
from molehill.tasks.lengths import Examples, Lengths
from molehill.tasks.rows import Rows
from molehill.tasks.units import numbers


class OfTexts(ABC):
    """Texts with a label each; implements the half of `molehill.tasks.task.Task` that is the same for all labels.

    Args:
        tokenizer: Of the base model, with a padding token.
        max_length: Longest input in tokens, special tokens included; longer ones lose their end, of a pair that of the
            longer text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer

    @abstractmethod
    def labels_of(self, rows: Rows) -> Sequence[int | float | tuple[float, ...]]:
        """What is to be said of each row."""

    def encode(self, rows: Rows) -> Examples:
        """Tokenise the texts.

        Raises:
            DataError: A text has no tokens.
        """
        columns = [list(rows[name]) for name in (TEXT, PAIR) if name in rows.columns]
        encoded = self._tokenizer(*columns, verbose=False)["input_ids"] if len(rows) else []
        lengths = Lengths(tuple(map(len, encoded)), self.max_length)
        long = [i for i, ids in enumerate(encoded) if len(ids) > self.max_length]
        if long:  # cut by the tokenizer, so that its special tokens at the end stay
            parts = [[column[i] for i in long] for column in columns]
            short = self._tokenizer(*parts, truncation=True, max_length=self.max_length)["input_ids"]
            for i, ids in zip(long, short, strict=True):
                encoded[i] = ids
        examples = []
        for ids, label, told, where in zip(encoded, self.labels_of(rows), rows.told(), rows.where, strict=True):
            if not ids:
                raise DataError("the text has no tokens", where=where, mend="Remove the row.")
            examples.append(Example(ids, label, *told))
        return Examples(examples, lengths, numbers(rows))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples to one length."""
        return pad(examples, self._tokenizer.pad_token_id)
