"""Text of tokens as they come, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from molehill.errors import AnswerError

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Text:
    """Turns tokens into text as they come, never showing part of a character.

    Args:
        decode: The text of tokens, without special ones.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decoded = decode
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text was returned
        self._begin = 0  # decoding begins here: some tokens before, since how a token reads depends on its neighbours

    def push(self, token: int) -> str:
        """Return the text that a further token completes."""
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith(_BROKEN):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what is left, without a character that was not completed."""
        text = self._new().rstrip(_BROKEN)
        self._begin = self._shown = len(self._ids)
        return text

    def _new(self) -> str:
        shown = self._decode(self._ids[self._begin : self._shown])
        return self._decode(self._ids[self._begin :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self._decoded(ids) if ids else ""


class Stops:
    """Holds text back that may become a stop string.

    Args:
        stops: Strings that end an answer.

    Raises:
        AnswerError: One is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise AnswerError("a stop string is empty", mend="Leave it out.")
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Return what may be shown; after a stop string, `hit` is set and nothing more may."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
