"""Texts that a model says something of, alone or in pairs, as commands and files give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from molehill.characters import recovered
from molehill.errors import DataError
from molehill.rowfiles.values import require_text, text_of

TEXT, PAIR = "text", "text_pair"
Text: TypeAlias = str | tuple[str, str]  # of a pair both are read together


def given(texts: Sequence[str] | None, pairs: Sequence[str] | None, option: str) -> list[Text]:
    """Texts of a command line.

    Args:
        texts: As they were typed.
        pairs: The second of each; none where they are alone.
        option: That gives the first.

    Raises:
        DataError: One is no text, or there are more of the ones than of the others.
    """
    found = [recovered(text) for text in texts or ()]
    for text in found:
        require_text(text, option.lstrip("-"), option)
    if not pairs:
        return list(found)
    if len(pairs) != len(found):
        what = f"{len(found)} times {option}, and {len(pairs)} times --pair"
        raise DataError(what, mend="Give each text its second one, or give none.")
    seconds = [recovered(text) for text in pairs]
    for text in seconds:
        require_text(text, "pair", "--pair")
    return list(zip(found, seconds, strict=True))


def of_row(row: Mapping[str, Any], where: str) -> Text:
    """The text of a row, or its two.

    Args:
        row: With ``text``, and perhaps ``text_pair``.
        where: Its place.

    Raises:
        DataError: One of them is no text, or empty.
    """
    first, second = text_of(row.get(TEXT), TEXT, where), row.get(PAIR)
    return first if second is None or second == "" else (first, text_of(second, PAIR, where))


def told(text: Text) -> dict[str, str]:
    """A text for programs, as rows have it."""
    return {TEXT: text} if isinstance(text, str) else dict(zip((TEXT, PAIR), text, strict=True))


def shown(text: Text) -> str:
    """A text for people."""
    return text if isinstance(text, str) else " / ".join(text)
