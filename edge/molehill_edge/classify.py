"""Texts that a bundle says something of, several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from molehill.errors import BundleError
from molehill.rowfiles.pairs import Text
from molehill_edge import tokens

Array = np.ndarray[Any, Any]

_TOKENS = 256  # of one batch, padding included: what larger ones save in calls they lose in caches of the processor
_PADS = ("[PAD]", "<pad>", "<|endoftext|>")


def encode(tokenizer: Tokenizer, texts: Sequence[Text], most: int, *, truncate: bool) -> list[list[int]]:
    """Ids of texts.

    Args:
        tokenizer: Of the bundle, with neither padding nor truncation.
        texts: The texts, or pairs of them.
        most: Tokens that fit, special ones included.
        truncate: Let longer texts lose their end.

    Raises:
        BundleError: A text is too long or has no tokens, or the tokenizer fails.
    """
    encoded = tokens.encode_all(tokenizer, texts)
    long = [i for i, ids in enumerate(encoded) if len(ids) > most]
    if long and not truncate:
        which = f"text {long[0] + 1}" if len(texts) > 1 else "the text"
        mend = "Give a shorter text, or let it lose its end (--truncate)."
        raise BundleError(f"{which} has {len(encoded[long[0]])} tokens, where {most} fit", mend=mend)
    if long:
        short = tokens.truncated(tokenizer, most)
        for i in long:
            encoded[i] = list(tokens.encode(short, texts[i]).ids)
    if not all(encoded):
        raise BundleError("a text has no tokens", mend="Leave it out.")
    return encoded


def batches(encoded: Sequence[Sequence[int]], pad: int) -> Iterator[tuple[list[int], Array, Array]]:
    """Group texts of similar length.

    Args:
        encoded: Ids of texts.
        pad: Id that fills rows on the right.

    Yields:
        Which texts; their ids ``[batch, sequence]``; 1 for real tokens ``[batch, sequence]``.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    while order:
        count = 1
        while count < len(order) and (count + 1) * len(encoded[order[count]]) <= _TOKENS:
            count += 1
        rows, order = order[:count], order[count:]
        longest = max(len(encoded[i]) for i in rows)
        ids = np.full((count, longest), pad, np.int64)
        mask = np.zeros((count, longest), np.int64)
        for row, i in enumerate(rows):
            ids[row, : len(encoded[i])] = encoded[i]
            mask[row, : len(encoded[i])] = 1
        yield rows, ids, mask


def pad_of(tokenizer: Tokenizer) -> int:
    """An id to pad with; masked, so any will do."""
    found = (tokenizer.token_to_id(name) for name in _PADS)
    return next((int(i) for i in found if i is not None), 0)
