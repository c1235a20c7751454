"""Token classification: the words of a text in, a tag for each of them out; tags make entities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from molehill import config
from molehill.entities import Tagging, type_of
from molehill.errors import DataError
from molehill.registry import register
from molehill.tasks import labels
from molehill.tasks.kind import Kind
from molehill.tasks.measures import LOSS, TOKEN_ACCURACY, figured
from molehill.tasks.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from molehill.tasks.task import Task

TOKENS, TAGS = "tokens", "tags"
_OTHER_SCHEMES = {"E-": "I-", "L-": "I-", "S-": "B-", "U-": "B-"}  # of BIOES and BILOU


@register("task", "token-classification", paper="house: softmax over the tags of every word, at its first token")
class TokenClassification(Kind):
    """Every word has a tag: ``tokens, tags``, two lists of one length; tags of IOB2, or a class for each word."""

    columns = (TOKENS, TAGS)
    required = (TOKENS, TAGS)
    head = "token"
    labelled = True
    spans = True
    bundle = "token-classification"
    pipeline = "token-classification"
    measures = (
        figured("entity_f1", "entity F1", "F1"),
        replace(TOKEN_ACCURACY, short="tokens"),
        figured("entity_precision", "entity precision", "precision", tabled=False),
        figured("entity_recall", "entity recall", "recall", tabled=False),
        LOSS,
    )
    stages = (
        "An entity is right when its words and its type are. "
        "Base: frozen model with a head trained on that client. Local: the same adapter trained on that client alone. "
        "Global: the federated model. Personalised: the federated model with the client's own gate and head."
    )

    def settle(self, rows: Rows, task: config.Task) -> config.Task:
        """Take the tags that occur, where the configuration lists none.

        Raises:
            DataError: They make no list of tags.
        """
        if task.labels:
            _require_iob(task.labels, "task.labels")
            return task
        there: list[tuple[Any, str]] = []
        for tags, where in zip(rows[TAGS], rows.where, strict=True):
            distinct = {repr(tag): tag for tag in _list(tags, TAGS, where)}  # so that rows are counted, not words
            there += [(tag, where) for tag in distinct.values()]
        found = labels.derive(there, rows.source)
        _require_iob(found, rows.source)
        return task.model_copy(update={"labels": found})

    def conform(self, rows: Rows, task: config.Task, named: Collection[str] = ()) -> Rows:
        """Check the words, and bring their tags to texts.

        Raises:
            DataError: A row has no list of words or not a tag for each of them, a word is empty, or a tag is none that
                there is.
        """
        del named
        known, words, tags = set(task.labels), list[list[str]](), list[list[str]]()
        for some, theirs, where in zip(rows[TOKENS], rows[TAGS], rows.where, strict=True):
            words.append(_words(some, where))
            found = _list(theirs, TAGS, where)
            if len(found) != len(words[-1]):
                what = f"the row has {len(words[-1])} {TOKENS} and {len(found)} {TAGS}"
                raise DataError(what, where=where, mend="Give every word one tag.")
            named_so = (isinstance(tag, str) and tag in known for tag in found)
            tags.append(
                [
                    tag if right else labels.known(tag, task.labels, where)
                    for tag, right in zip(found, named_so, strict=True)
                ]
            )
        return rows.having(**{TOKENS: words, TAGS: tags})

    def counts(self, rows: Rows, labels: Sequence[str]) -> Mapping[str, int]:
        """Entities of every type, in the order in which the tags name them."""
        tagging, place = Tagging.of(labels), {label: i for i, label in enumerate(labels)}
        flat = [place[tag] for tags in rows[TAGS] for tag in tags]
        lengths = [len(tags) for tags in rows[TAGS]]
        firsts = np.zeros(len(flat), bool)
        firsts[np.cumsum([0, *lengths[:-1]])[: len(lengths)]] = True
        found = Counter(tagging.spans(np.array(flat, np.int64), firsts)[:, 2].tolist())
        return {name: found[i] for i, name in enumerate(tagging.types)}

    def strata(self, rows: Rows) -> Sequence[str]:
        """Which types of entities a row has."""
        return [" ".join(sorted({type_of(tag) for tag in tags} - {""})) for tags in rows[TAGS]]

    def make(self, tokenizer: PreTrainedTokenizerBase, task: config.Task) -> Task:
        """What turns rows into tensors.

        Raises:
            ModelError: The tokenizer is not a fast one.
        """
        from molehill.tasks.token_classification import TokenClassification as Made  # noqa: PLC0415  (needs torch)

        return Made(tokenizer, task.labels, task.max_length)


def _list(value: Any, name: str, where: str) -> list[Any]:
    """A list that is not empty."""
    if value is None:
        raise DataError(f"the row has no {name!r}", where=where, mend="Fill it in, or remove the row.")
    if not isinstance(value, list):
        what = f"{name!r} must be a list, but is {type(value).__name__} {value!r:.40}"
        raise DataError(what, where=where, mend="Give one value for each word, as in JSON lines or Parquet.")
    if not value:
        raise DataError(f"{name!r} is empty", where=where, mend="Remove the row.")
    return value


def _words(value: Any, where: str) -> list[str]:
    words = _list(value, TOKENS, where)
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            what = f"word {number} of {TOKENS!r} is {'empty' if isinstance(word, str) else f'{word!r:.40}, no text'}"
            raise DataError(what, where=where, mend="Mend the row, or remove it.")
    return words


def _require_iob(tags: Sequence[str], where: str) -> None:
    """Refuse other schemes, whose tags would each be an entity of one word."""
    types = {tag[2:] for tag in tags if tag[:2] in {"B-", "I-"}}
    for tag in tags:
        if tag[:2] in _OTHER_SCHEMES and tag[2:] in types:
            what = f"the tag {tag!r} is of BIOES or BILOU"
            mend = f"Write it as {_OTHER_SCHEMES[tag[:2]]}{tag[2:]}, as IOB2 has it."
            raise DataError(what, where=where, mend=mend)
