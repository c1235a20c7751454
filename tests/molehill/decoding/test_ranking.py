"""Whole answers are ordered by what the model itself thinks of them."""

from __future__ import annotations

import numpy as np
import pytest
from number_passes import NumberPasses, sure

from molehill.decoding import ranking
from molehill.decoding.interfaces import Setting, log_softmax
from molehill.decoding.stream import Asked, Reader, Stream, replayed
from molehill.errors import AnswerError

SAYS = {"e0": lambda ids: sure((ids[-1] + 1) % 5, 5), "e1": lambda ids: sure((ids[-1] + 2) % 5, 5)}
PASSES = NumberPasses(SAYS, writes=True)


def test_likelihood_is_the_mean_over_the_tokens_of_the_answer_alone():
    one = Setting(mask=(True, False))
    high, low = log_softmax(sure(0, 5))[:2]
    found = ranking.scores("likelihood", PASSES, [4, 4, 4], [[0, 1, 2], [0], [0, 3], [4, 4]], one)
    assert found == pytest.approx([high, high, (high + low) / 2, low], abs=1e-6)  # long ones are no worse
    other = ranking.scores("likelihood", PASSES, [4], [[0], [1]], Setting(mask=(False, True)))
    assert other == pytest.approx([low, high], abs=1e-6)


def test_what_has_no_score():
    with pytest.raises(AnswerError, match=r"--rank-by: answers have no score 'taste'\. There is likelihood"):
        ranking.scores("taste", PASSES, [1], [[2]])
    broken = NumberPasses({"e0": lambda _: np.full(5, np.nan)}, writes=True)
    with pytest.raises(AnswerError, match="not finite"):
        ranking.scores("likelihood", broken, [1], [[2]])


@pytest.mark.parametrize("stop", [(), ("d",), ("c", "cd"), ("ef",), ("\N{CAT}",), ("x",)])
@pytest.mark.parametrize("most", [3, 12])
def test_tokens_drawn_together_are_told_as_a_stream_tells_them(stop, most):
    bytes_ = list("abcdef\N{CAT}".encode())
    reader = Reader(lambda ids: bytes(ids).decode(errors="replace"), frozenset({0}), 32)
    wanted = Stream(lambda ids: sure([*bytes_, 0][len(ids) - 1], 256), [9], reader, Asked(most, stop=stop)).rest()
    assert wanted.ids[: len(bytes_)] == tuple(bytes_[: wanted.tokens])
    drawn, end = (bytes_, 0) if most > len(bytes_) else (bytes_[:most], None)
    assert replayed(drawn, end, 1, reader, stop) == wanted
