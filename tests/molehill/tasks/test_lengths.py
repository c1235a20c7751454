"""Lengths are those of whole rows, and what is cut is counted."""

from __future__ import annotations

from molehill.tasks.classification import Classification
from molehill.tasks.lengths import Lengths, together
from molehill.tasks.rows import Rows


def test_quantiles_and_what_is_cut():
    lengths = together([Lengths(tuple(range(1, 51)), 90), Lengths(tuple(range(51, 101)), 90, lost=2)])
    assert lengths.quantiles == "half have up to 50 tokens, 90% up to 90, 99% up to 99, the longest 100"
    assert (lengths.cut, lengths.lost) == (10, 2)
    assert lengths.loss == (
        "10 of 100 rows are longer than task.max_length = 90 and lose their end; of 2 the whole answer is cut away, "
        "and they are left out"
    )
    assert Lengths((3,), 3).loss == ""
    assert Lengths((3,), 3).quantiles == "half have up to 3 tokens, 90% up to 3, 99% up to 3, the longest 3"
    assert Lengths((), 3).quantiles == ""


def test_the_length_that_keeps_rows_whole():
    assert Lengths((5, 9), 9).enough == ""
    assert Lengths(tuple(range(1, 101)), 90).enough == "task.max_length = 95 keeps 95% of them whole, 100 keeps all"
    assert Lengths(tuple(range(1, 101)), 97).enough == "task.max_length = 100 keeps all"


def test_texts_are_measured_before_they_are_cut(tokenizer):
    rows = Rows({"text": ("a b", "a " * 20, "c"), "label": ("x", "y", "x")}, ("f:1", "f:2", "f:3"), "f")
    examples = Classification(tokenizer, ("x", "y"), 8).encode(rows)
    assert [len(example.input_ids) for example in examples] == [2, 8, 1]
    assert (examples.lengths.tokens, examples.lengths.cut, examples.lengths.lost) == ((2, 20, 1), 1, 0)
