"""Words of sentences for people."""

from __future__ import annotations

import pytest

from molehill.words import counted


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(1, "bias", "1 bias"), (2, "bias", "2 biases"), (0, "round", "0 rounds"), (3, "batch", "3 batches")],
)
def test_a_number_goes_with_its_noun(number, noun, said):
    assert counted(number, noun) == said
