"""Text that came from elsewhere: what is no Unicode in it, and how it is shown on a terminal or in a log.

Standard library only: devices import it (docs/adr/0006).
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from decimal import Decimal

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile(r"[\t\n]")
_BETWEEN = re.compile(r"(?<=[^\W_])[\s_\u2010-\u2015-]+(?=[^\W_])")  # of two words, unlike the dash of a grade A-
_QUOTES = "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb"
_UNSEEN = re.compile(r"[\u034f\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # marks that choose a look


def flaw(text: str) -> str:
    """What makes a text unusable for a tokenizer, as the end of a sentence; empty when nothing does.

    Args:
        text: Any string; JSON may smuggle in halves of characters, binary data zero characters.
    """
    at = text.find("\0")
    if at >= 0:
        return f"has a zero character (U+0000) at {at}"
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a character (U+{ord(text[error.start]):04X}, a lone surrogate) at {error.start}"
    return ""


def recovered(text: str) -> str:
    """The text of bytes that Python could not decode, as UTF-8 where they are; else the text as it is.

    Arguments and standard input come like that where the locale has another encoding.
    """
    if text.isascii():
        return text
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        return text


def harmless(text: str, *, lines: bool = False) -> str:
    r"""A text that a terminal only shows: what it would obey, or could not show, is written as ``\x1b`` or ``\ud800``.

    Args:
        text: Of a row, a name, a model's answer, or an error that quotes them.
        lines: Whether line breaks and tabs stay.
    """
    shown = _CONTROL.sub(_escape, text)
    return shown if lines else _BREAKS.sub(" ", shown)


def survive() -> None:
    """Let standard output and error of this process write any text, whatever their encoding.

    What an encoding lacks is written as an escape; standard input gives bytes that it cannot decode (see `recovered`).
    """
    for stream, errors in (
        (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "surrogateescape"),
    ):  # fmt: skip
        reconfigure = getattr(stream, "reconfigure", None)  # a stream that a program has put there may have none
        if reconfigure is not None:
            reconfigure(errors=errors)


def alike(text: str) -> str:
    """A key that is equal for texts that people take for the same.

    Case, what stands between and around words (white space, dashes; quotes, a full stop), the Unicode form (also
    full-width and ligatures), characters without any appearance, and the way a number is written make no difference.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    plain = unicodedata.normalize("NFKC", " ".join(plain.split()).casefold())
    try:
        value = Decimal(plain if any(c.isdecimal() for c in plain) else "none")
    except ArithmeticError:
        value = Decimal("nan")
    if not value.is_finite():  # nan12 is a number to decimal
        bare = plain.strip(_QUOTES).rstrip(".,;: ").strip(_QUOTES) or plain
        return _BETWEEN.sub(" ", bare)
    sign, digits, exponent = value.as_tuple()
    shown = "".join(map(str, digits)).lstrip("0")
    significant = shown.rstrip("0")
    return (
        f"{-sign if significant else 0}:{significant}:{int(exponent) + len(shown) - len(significant) if shown else 0}"
    )


def bare(text: str) -> str:
    """What a text is without case, punctuation, symbols, white space and Unicode form: its letters, marks and digits.

    A text of symbols alone keeps them.
    """
    folded = _UNSEEN.sub("", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))
    words = folded.translate(_WORDS)
    return words if any(map(str.isalnum, words)) else folded.translate(_SEEN)


class _Kept(dict[int, int | None]):
    """A table for `str.translate` that is filled as characters are met; what is not kept goes."""

    def __init__(self, keeps: Callable[[str], bool]) -> None:
        super().__init__()
        self._keeps = keeps

    def __missing__(self, code: int) -> int | None:
        self[code] = code if self._keeps(chr(code)) else None
        return self[code]


_WORDS = _Kept(lambda char: char.isalnum() or unicodedata.category(char)[0] == "M")
_SEEN = _Kept(lambda char: unicodedata.category(char) not in {"Cc", "Cf", "Zs", "Zl", "Zp"})


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
