"""Sequence classification: a text, or a pair of texts, in; one of a list of labels out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from molehill.molora.likelihoods import of_class
from molehill.tasks.batches import Example
from molehill.tasks.metrics import ScoreSum
from molehill.tasks.of_texts import OfTexts
from molehill.tasks.rows import Rows


class Classification(OfTexts):
    """Texts with one label each; implements `molehill.tasks.task.Task`.

    Args:
        tokenizer: Of the base model, with a padding token.
        labels: Class names in the order of the logits.
        max_length: Longest input in tokens, special tokens included; longer ones lose their end.
    """

    likelihood = staticmethod(of_class)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self.labels = tuple(labels)
        self.outputs = len(self.labels)
        self._ids = {label: i for i, label in enumerate(self.labels)}

    def labels_of(self, rows: Rows) -> list[int]:
        """The place of each row's label among the logits."""
        return [self._ids[label] for label in rows["label"]]

    def counts(self, examples: Sequence[Example]) -> list[int]:
        """See `molehill.tasks.task.Classes`."""
        found = Counter(example.labels for example in examples)
        return [found[i] for i in range(len(self.labels))]

    def tally(self) -> ScoreSum:
        """Accuracy, macro-F1 and cross-entropy."""
        return ScoreSum(classes=self.outputs)
