"""Entities in texts: which tags make one (IOB2), and where it lies. Needs numpy alone, as devices do.

``B-TYPE`` begins an entity and ``I-TYPE`` goes on with it. An ``I-`` that follows no entity of its type begins one, as
in the CoNLL shared tasks, so tags of IOB1 are read alike. ``O`` is none. Any other tag is of one word, which is an
entity by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NONE = "O"
_BEGIN, _INSIDE = "B-", "I-"


def type_of(tag: str) -> str:
    """The type of the entities that a tag is of; empty for none."""
    if tag == NONE:
        return ""
    return tag[2:] if tag[:2] in {_BEGIN, _INSIDE} and len(tag) > 2 else tag


@dataclass(frozen=True)
class Tagging:
    """What the tags of a model mean.

    Attributes:
        types: Types of entities, in the order in which their tags come.
        kinds: Place among them of every tag's type ``[C]``; -1 for none.
        inside: Whether a tag goes on with what is before it ``[C]``.
        alone: Whether it is of one word ``[C]``.
    """

    types: tuple[str, ...]
    kinds: Array
    inside: Array
    alone: Array

    @classmethod
    def of(cls, tags: Sequence[str]) -> Self:
        """Read the names of tags, in the order of the logits."""
        types = tuple(dict.fromkeys(filter(None, map(type_of, tags))))
        return cls(
            types,
            np.array([types.index(type_of(tag)) if type_of(tag) else -1 for tag in tags], np.int64),
            np.array([tag.startswith(_INSIDE) and type_of(tag) != tag for tag in tags]),
            np.array([type_of(tag) == tag for tag in tags]),
        )

    def spans(self, tags: Array, firsts: Array) -> Array:
        """The entities of words in order.

        Args:
            tags: Tag of every word ``[N]`` int64.
            firsts: Whether it is the first of its text ``[N]``.

        Returns:
            First word, one past the last, and type of every entity ``[K, 3]`` int64, in order.
        """
        kinds, alone = self.kinds[tags], self.alone[tags]
        before = np.concatenate([[-1], kinds[:-1]])
        joins = self.inside[tags] & ~firsts & (kinds == before) & ~np.concatenate([[False], alone[:-1]])
        runs = np.flatnonzero(~joins)
        ends = np.concatenate([runs[1:], [len(tags)]]).astype(np.int64)
        there = kinds[runs] >= 0
        return np.stack([runs[there], ends[there], kinds[runs[there]]], 1)


def begins(text: str, places: Sequence[tuple[int, int]], words: Sequence[int | None]) -> list[int]:
    """Which tokens begin a word: where the tokenizer's pre-tokenizer begins one, or after white space.

    Args:
        text: The text.
        places: First character, and one past the last, of every token.
        words: Which of its words the pre-tokenizer has a token in; None for special tokens.
    """
    found: list[int] = []
    last, end = -1, 0
    for at, ((start, stop), word) in enumerate(zip(places, words, strict=True)):
        if word is None or not text[start:stop].strip():
            continue
        apart = text[start].isspace() or (start > 0 and text[start - 1].isspace())
        if not found or word != last or (apart and start >= end):
            found.append(at)
        last, end = word, stop
    return found
