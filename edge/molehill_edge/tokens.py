"""Tokens of texts. What the tokenizer of a bundle does wrong, however it says so, is a `BundleError`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from molehill.characters import flaw
from molehill.errors import BundleError, first_line
from molehill.rowfiles.pairs import Text

_TRIAL = "A trial: 1, 2 and \N{LATIN SMALL LETTER E WITH ACUTE}."


def load(path: Path) -> Tokenizer:
    """Read a tokenizer, and try it.

    Args:
        path: A ``tokenizer.json``.

    Returns:
        It, with neither truncation nor padding, which as stored it may do unasked.

    Raises:
        BundleError: It cannot be read or used.
    """
    with _guarded("the tokenizer cannot be read", str(path)):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode(_TRIAL).ids)  # much of what is wrong with one shows only in use
    return tokenizer


def encode(tokenizer: Tokenizer, text: Text, *, special: bool = True) -> Encoding:
    """Tokens of a text.

    Args:
        tokenizer: Of the bundle.
        text: A text, or two that are read together.
        special: Whether the tokenizer adds its special tokens.

    Raises:
        BundleError: The text is no Unicode, or the tokenizer fails.
    """
    first, *second = _parts(text)
    with _guarded():
        return tokenizer.encode(first, second[0] if second else None, add_special_tokens=special)


def encode_all(tokenizer: Tokenizer, texts: Sequence[Text]) -> list[list[int]]:
    """Ids of texts, or of pairs of them.

    Raises:
        BundleError: A text is no Unicode, or the tokenizer fails.
    """
    for text in texts:
        _parts(text)
    with _guarded():
        return [list(found.ids) for found in tokenizer.encode_batch(list(texts))]


def truncated(tokenizer: Tokenizer, most: int) -> Tokenizer:
    """A tokenizer that cuts what is longer; not a cut of the ids, so the special tokens at the end stay.

    Raises:
        BundleError: The tokenizer fails.
    """
    with _guarded():
        short = Tokenizer.from_str(tokenizer.to_str())
        short.enable_truncation(most)
        return short


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones.

    Raises:
        BundleError: The tokenizer fails.
    """
    with _guarded():
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _parts(text: Text) -> tuple[str, ...]:
    """The text, or both of a pair; each is Unicode."""
    parts = (text,) if isinstance(text, str) else text
    for part in parts:
        if wrong := flaw(part):
            raise BundleError(f"the text {wrong}", mend="Write it anew.")
    return parts


@contextmanager
def _guarded(what: str = "the tokenizer of the bundle fails", where: str = "") -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # noqa: BLE001  # the library panics, which is no Exception
        raise BundleError(
            f"{what}: {first_line(error)[:200]}", where=where, mend="Use another text or bundle."
        ) from None
