"""Token classification: the words of a text in, a tag for each of them out, said at its first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from molehill.entities import Tagging
from molehill.errors import DataError, ModelError
from molehill.intervals import Interval, of_bounded
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_class
from molehill.plan import Figure, Scores
from molehill.tasks.batches import IGNORE, Batch, Example, pad
from molehill.tasks.lengths import Examples, Lengths
from molehill.tasks.measures import MACRO_F1, TOKEN_ACCURACY
from molehill.tasks.metrics import ScoreSum
from molehill.tasks.outcomes import Outcomes, Parts
from molehill.tasks.rows import Rows
from molehill.tasks.units import numbers


class TokenClassification:
    """Words with a tag each; implements `molehill.tasks.task.Task`.

    The words of a row become one text, with a space between them. The first token of a word has its tag, the others
    have none.

    Args:
        tokenizer: Of the base model: a fast one, with a padding token.
        labels: Tags in the order of the logits.
        max_length: Longest input in tokens, special tokens included; longer ones lose their end, and the words in it.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """

    likelihood = staticmethod(of_class)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int) -> None:
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer cannot say where its tokens start", mend="Save it with a tokenizer.json.")
        self.labels = tuple(labels)
        self.outputs = len(self.labels)
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._ids = {label: i for i, label in enumerate(self.labels)}
        self._tagging = Tagging.of(self.labels)

    def encode(self, rows: Rows) -> Examples:
        """Tokenise the words.

        Raises:
            DataError: A row has no word that has a token.
        """
        texts = [" ".join(words) for words in rows["tokens"]]
        encoded = self._tokenizer(texts, return_offsets_mapping=True, verbose=False) if texts else {"input_ids": []}
        ids: list[list[int]] = encoded["input_ids"]
        lengths = tuple(map(len, ids))
        places = encoded.get("offset_mapping", [])
        long = [i for i, n in enumerate(lengths) if n > self.max_length]
        if long:  # cut by the tokenizer, so that its special tokens at the end stay
            some = [texts[i] for i in long]
            short = self._tokenizer(some, truncation=True, max_length=self.max_length, return_offsets_mapping=True)
            for i, fewer, where in zip(long, short["input_ids"], short["offset_mapping"], strict=True):
                ids[i], places[i] = fewer, where
        told = list(rows.told())
        examples, gone = [], 0
        for i, (words, tags) in enumerate(zip(rows["tokens"], rows["tags"], strict=True)):
            firsts = first_tokens(words, places[i])
            labels = [IGNORE] * len(ids[i])
            for first, tag in zip(firsts, tags, strict=True):
                if first is not None:
                    labels[first] = self._ids[tag]
            missing = firsts.count(None)
            if missing == len(words):
                raise DataError("no word has a token", where=rows.where[i], mend="Remove the row.")
            gone += missing
            examples.append(Example(ids[i], labels, *told[i]))
        return Examples(examples, Lengths(lengths, self.max_length, words=gone), numbers(rows))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples to one length; labels ``[B, T]`` with `IGNORE` on all but the first tokens of words."""
        return pad(examples, self._tokenizer.pad_token_id, "token")

    def counts(self, examples: Sequence[Example]) -> list[int]:
        """See `molehill.tasks.task.Classes`."""
        some = [np.array(example.labels) for example in examples]
        every = np.concatenate(some) if some else np.zeros(0, np.int64)
        return np.bincount(every[every != IGNORE], minlength=self.outputs).tolist()  # type: ignore[no-any-return]  # numpy's lists are Any

    def tally(self) -> EntitySum:
        """Precision, recall and F1 of entities, accuracy and cross-entropy of words."""
        return EntitySum(self._tagging, self.outputs)


def first_tokens(words: Sequence[str], places: Sequence[tuple[int, int]]) -> list[int | None]:
    """The token that speaks for each word: the first that shows a part of it, and that no word before it has.

    Args:
        words: They are one text, with a space between them.
        places: First character of the text, and one past the last, of every token.

    Returns:
        A place among the tokens for each word; None where it has no token, as when it was cut off.
    """
    found: list[int | None] = []
    at = begin = 0
    for word in words:
        end = begin + len(word)
        while at < len(places) and (places[at][1] <= begin or places[at][0] == places[at][1]):
            at += 1
        if at < len(places) and places[at][0] < end:
            found.append(at)
            at += 1
        else:
            found.append(None)
        begin = end + 1
    return found


class EntitySum:
    """Entities that were found, and those that there are; the order of the batches does not matter.

    An entity is right when its first word, its last word and its type are, as the CoNLL shared tasks count (Tjong Kim
    Sang and De Meulder 2003); all types count together. What is of one row goes together in the intervals.

    Args:
        tagging: What the tags mean.
        classes: Number of tags.
    """

    def __init__(self, tagging: Tagging, classes: int) -> None:
        self._tagging = tagging
        self._words = ScoreSum(classes, TOKEN_ACCURACY)
        self._rows = 0
        self._each: list[NDArray[np.int64]] = []  # right, found and there of every row
        self._sums = np.zeros(3, np.int64)
        self._products = np.zeros((3, 3), np.int64)  # of every row times themselves
        self._types = np.zeros((len(tagging.types), 3), np.int64)

    @torch.no_grad()
    def add(self, forward: Forward) -> None:
        """Count one batch: a tag per word, in the order of the words of every row."""
        self._words.add(forward)
        rows, places = np.unique(forward.rows.cpu().numpy(), return_inverse=True)
        firsts = np.diff(places, prepend=-1) != 0
        found = self._tagging.spans(forward.logits.argmax(-1).cpu().numpy(), firsts)
        there = self._tagging.spans(forward.labels.cpu().numpy(), firsts)
        right = found[np.isin(self._keys(found, len(places)), self._keys(there, len(places)))]
        each = np.zeros((len(rows), 3), np.int64)
        for column, spans in enumerate((right, found, there)):
            each[:, column] = np.bincount(places[spans[:, 0]], minlength=len(rows))
            self._types[:, column] += np.bincount(spans[:, 2], minlength=len(self._types))
        self._each.append(each)
        self._rows += len(rows)
        self._sums += each.sum(0)
        self._products += each.T @ each

    def scores(self) -> Scores:
        """Micro-averaged F1, precision and recall of entities; accuracy and mean cross-entropy of words.

        Where no entity is found, precision is 0, as F1 is. Where there is none to find, none of them means anything.

        Raises:
            DataError: Nothing was counted.
            TrainingError: The loss is not finite.
        """
        words, (_right, found, there) = self._words.scores(), self._sums.tolist()
        figures = {}
        if there:
            figures["entity_f1"] = self._figure(np.array([2, 0, 0]), np.array([0, 1, 1]))
            figures["entity_precision"] = (
                self._figure(np.array([1, 0, 0]), np.array([0, 1, 0])) if found else Figure(value=0.0)
            )
            figures["entity_recall"] = self._figure(np.array([1, 0, 0]), np.array([0, 0, 1]))
        return words.model_copy(update={"macro_f1": None, "macro_f1_interval": None, "figures": figures})

    def outcomes(self) -> Outcomes:
        """See `molehill.tasks.task.Tally`."""
        words, (right, found, there) = self._words.outcomes(), np.concatenate(self._each).T
        parts = {name: part for name, part in words.parts.items() if name != MACRO_F1.name}
        if there.any():
            parts["entity_f1"] = Parts.of_rows(right, (found + there) / 2)
        return Outcomes(words.n, parts)

    @property
    def confusion(self) -> list[list[int]] | None:
        """How many words of each tag (row) were taken for each (column)."""
        return self._words.confusion

    @property
    def found(self) -> Mapping[str, tuple[int, int, int]]:
        """Of every type how many entities are right, were found and are there."""
        counts = [(right, found, there) for right, found, there in self._types.tolist()]
        return dict(zip(self._tagging.types, counts, strict=True))

    def _keys(self, spans: NDArray[np.int64], words: int) -> NDArray[np.int64]:
        """A number for every entity; equal ones are the same."""
        keys: NDArray[np.int64] = (spans[:, 0] * (words + 1) + spans[:, 1]) * (len(self._types) + 1) + spans[:, 2]
        return keys

    def _figure(self, above: NDArray[np.int64], below: NDArray[np.int64]) -> Figure:
        """A ratio of sums over rows, with what it is in by how much it changes with each row (the delta method)."""
        total = float(below @ self._sums)
        value = float(above @ self._sums) / total
        error = None
        if self._rows > 1:
            change = (above - value * below) / total
            square = max(0.0, float(change @ self._products @ change))
            error = float(np.sqrt(square * self._rows / (self._rows - 1)))
        interval: Interval = of_bounded(value, error, min(self._rows, total))
        return Figure(value=value, interval=interval)
