"""How alike an answer that a model wrote is to the right one, and figures of many of them."""

from __future__ import annotations

import functools
import math
import re
import string
import unicodedata
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rapidfuzz.distance import LCSseq

from molehill.plan import Answers

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"\w+")


def normalised(text: str) -> str:
    """A text as SQuAD compares answers: in lower case, without punctuation, English articles and spare white space.

    Punctuation is that of any script, where SQuAD's own script knows ASCII's only (Rajpurkar et al. 2016,
    https://arxiv.org/abs/1606.05250).
    """
    kept = "".join(char for char in text.lower() if not _is_punctuation(char))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def exact(written: str, right: str) -> bool:
    """Whether both are the same but for white space around them."""
    return written.strip() == right.strip()


def matched(written: str, right: str) -> bool:
    """Whether both are the same once normalised."""
    return normalised(written) == normalised(right)


def rouge_l(written: str, right: str) -> float:
    """ROUGE-L of one answer, in [0, 1]: F1 of the longest common subsequence of words (Lin 2004).

    Words are runs of letters and digits of any script, in lower case and not stemmed.
    """
    ours, theirs = (_WORDS.findall(text.lower()) for text in (written, right))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))


def chrf(written: str, right: str) -> float:
    """chrF2 of one answer, in [0, 1]: F2 of character n-grams up to 6 (Popovic 2015), as sacrebleu computes it."""
    if not written.strip() or not right.strip():
        return float(written.strip() == right.strip())
    return float(min(1.0, _chrf().sentence_score(written, [right]).score / 100))


@functools.cache
def _chrf() -> Any:
    return import_module("sacrebleu.metrics").CHRF()  # a third of a second that only who asks for answers spends


def added_up(pairs: Sequence[tuple[str, str]]) -> Answers:
    """Sums over answers.

    Args:
        pairs: What was written, and what would have been right; at least one.
    """
    rouges, chrfs = ([score(*pair) for pair in pairs] for score in (rouge_l, chrf))
    return Answers(
        n=len(pairs),
        exact_match=sum(exact(*pair) for pair in pairs),
        normalised_match=sum(matched(*pair) for pair in pairs),
        rouge_l=math.fsum(rouges),
        rouge_l_squares=math.fsum(value**2 for value in rouges),
        chrf=math.fsum(chrfs),
        chrf_squares=math.fsum(value**2 for value in chrfs),
    )
