"""Sequence classification: a text in, one of a list of labels out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from molehill.errors import DataError
from molehill.tasks.batches import Batch, Example, pad
from molehill.tasks.lengths import Examples, Lengths
from molehill.tasks.rows import TASK, Rows


class Classification:
    """Texts with one label each; implements `molehill.tasks.task.Task`.

    Args:
        tokenizer: Of the base model, with a padding token.
        labels: Class names in the order of the logits.
        max_length: Longest input in tokens, special tokens included; longer ones lose their end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int) -> None:
        self.labels = tuple(labels)
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._ids = {label: i for i, label in enumerate(self.labels)}

    def encode(self, rows: Rows) -> Examples:
        """Tokenise the columns text and label (and the task, where there is one).

        Raises:
            DataError: A text has no tokens.
        """
        texts = list(rows["text"])
        encoded = self._tokenizer(texts, verbose=False)["input_ids"] if texts else []
        lengths = Lengths(tuple(map(len, encoded)), self.max_length)
        long = [i for i, ids in enumerate(encoded) if len(ids) > self.max_length]
        if long:  # cut by the tokenizer, so that its special tokens at the end stay
            short = self._tokenizer([texts[i] for i in long], truncation=True, max_length=self.max_length)["input_ids"]
            for i, ids in zip(long, short, strict=True):
                encoded[i] = ids
        tasks = rows.columns.get(TASK, (None,) * len(rows))
        examples = []
        for ids, label, task, where in zip(encoded, rows["label"], tasks, rows.where, strict=True):
            if not ids:
                raise DataError("the text has no tokens", where=where, mend="Remove the row.")
            examples.append(Example(ids, self._ids[label], task))
        return Examples(examples, lengths)

    def counts(self, examples: Sequence[Example]) -> list[int]:
        """See `molehill.tasks.task.Classes`."""
        found = Counter(example.labels for example in examples)
        return [found[i] for i in range(len(self.labels))]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples to one length; labels ``[B]``."""
        return pad(examples, self._tokenizer.pad_token_id)
