"""Words of sentences for people."""

from __future__ import annotations

import pytest

from molehill.words import counted, short_figure


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(1, "bias", "1 bias"), (2, "bias", "2 biases"), (0, "round", "0 rounds"), (3, "batch", "3 batches")],
)
def test_a_number_goes_with_its_noun(number, noun, said):
    assert counted(number, noun) == said


def test_a_short_figure_keeps_its_sign():
    values = (0.7126, -0.1, 1.0, -0.9999, 0.0, None)
    assert [short_figure(value) for value in values] == [".713", "-.100", "1.00", "-1.00", ".000", "   -"]
