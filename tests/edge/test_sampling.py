"""Drawing tokens: the likeliest, or by their probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from molehill.decoding.sampling import Sampler, Sampling
from molehill.errors import AnswerError

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))
DRAWS = 4000


def drawn(**how):
    sampler = Sampler(Sampling(**how))
    return np.bincount([sampler(LOGITS) for _ in range(DRAWS)], minlength=5)


def fits(counts, wanted):
    """A chi-square test whose threshold a right sampler passes in all but one of a thousand seeds."""
    wanted = np.array(wanted) / sum(wanted)
    assert counts[wanted == 0].sum() == 0
    kept = wanted > 0
    chi = ((counts[kept] - DRAWS * wanted[kept]) ** 2 / (DRAWS * wanted[kept])).sum()
    assert chi < {2: 10.8, 3: 13.8, 4: 16.3, 5: 18.5}[kept.sum()]


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"temperature": 1.0}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 0.5}, [0.0025, 0.16, 0.01, 0.09, 0.0225]),
        ({"temperature": 2.0}, np.sqrt([0.05, 0.4, 0.1, 0.3, 0.15])),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 1.0, "top_k": 99}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 0.4, 0, 0.3, 0.15]),
        ({"temperature": 1.0, "top_p": 0.5}, [0, 0.4, 0, 0.3, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [0, 0.4, 0, 0.3, 0]),  # 0.7 / 0.85 is more than 0.8
    ],
)
def test_tokens_come_as_often_as_they_should(how, wanted):
    fits(drawn(**how, seed=1), np.asarray(wanted, float))


def test_the_likeliest_without_temperature():
    assert drawn()[1] == DRAWS
    assert drawn(temperature=1e-30, seed=0)[1] == DRAWS
    assert drawn(temperature=1.0, top_p=0.01, seed=0)[1] == DRAWS
    assert drawn(temperature=1.0, top_k=1, seed=0)[1] == DRAWS


def test_equal_seeds_draw_equal_tokens():
    how = Sampling(temperature=1.0, seed=3)
    one, other = Sampler(how), Sampler(how)
    assert [one(LOGITS) for _ in range(50)] == [other(LOGITS) for _ in range(50)]
    assert [Sampler(Sampling(temperature=1.0))(LOGITS) for _ in range(50)] != [1] * 50


def test_masked_tokens_are_never_drawn():
    logits = np.array([0, -np.inf, 0], np.float32)
    sampler = Sampler(Sampling(temperature=5.0, seed=0))
    assert {sampler(logits) for _ in range(100)} == {0, 2}


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [-np.inf, -np.inf], [np.inf, 0.0]])
def test_numbers_that_are_none(logits):
    with pytest.raises(AnswerError, match="not finite"):
        Sampler(Sampling())(np.array(logits, np.float32))


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range(how, what):
    with pytest.raises(AnswerError, match=what):
        Sampling(**how)
