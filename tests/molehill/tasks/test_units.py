"""What belongs together is a unit: rows of a group, and twins however they are written."""

from __future__ import annotations

import pytest

from molehill import config, registry
from molehill.characters import bare
from molehill.tasks.kind import make_task
from molehill.tasks.lengths import Examples, Lengths
from molehill.tasks.rows import GROUP, Rows
from molehill.tasks.schema import load_rows
from molehill.tasks.units import lots, numbers, units


def table(**columns):
    n = len(next(iter(columns.values())))
    return Rows({name: tuple(values) for name, values in columns.items()}, tuple(map(str, range(n))), "rows")


def alike(name, first, second):
    return units(table(**{name: [first, second]})) == [[0, 1]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Good film", "good FILM"),
        ("Good film.", " good,  film!\n"),
        ("Don't", "don\u2019t"),
        ("wait...what", "Wait... what?"),
        ("\u201cgood\u201d", '"good"'),
        ("caf\u00e9", "cafe\u0301"),
        ("\ufb01lm", "film"),
        ("Stra\u00dfe", "STRASSE"),
        ("so\u00adft\u200b", "soft"),
        ("5 stars \u2b50", "5 stars"),
        ("\u0939\u093f\u0902\u0926\u0940 \u0964", "\u0939\u093f\u0902\u0926\u0940"),
        ("\u2764\ufe0f", "\u2764"),
        (": - )", ":-)"),
    ],
)
def test_twins_differ_in_case_punctuation_space_or_form_alone(first, second):
    assert alike("text", first, second)
    assert alike("tokens", first.split(), second.split())
    assert alike("messages", *([{"role": "user", "content": text}] for text in (first, second)))
    assert alike("prompt", *([{"role": "user", "content": [{"type": "text", "text": t}]}] for t in (first, second)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("good film", "good films"),
        ("caf\u00e9", "cafe"),
        ("room 12", "room 13"),
        ("\u0939\u0940", "\u0939\u093f"),  # vowels are marks
        ("?!", "..."),
        ("\U0001f600", "\U0001f621"),
        (":-)", ":-("),
        ("\u2764\ufe0f", "\u2b50\ufe0f"),
    ],
)
def test_other_letters_digits_and_texts_of_other_symbols_are_other_rows(first, second):
    assert not alike("text", first, second)
    assert not alike("tokens", first.split(), second.split())
    assert not alike("messages", *([{"role": "user", "content": text}] for text in (first, second)))


def test_what_a_text_is_bare():
    assert bare(" \u201cI\u2019d Buy 2!\u201d\n(again) C++_x \u00bd") == "idbuy2againcx12"
    assert bare("\ud800 a") == "a"  # half a character is no letter
    assert bare("") == ""


def said(*turns):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, turns, strict=False)]


def of_file(write, rows, **task):
    """Units of the rows of a file."""
    path = write("twins.jsonl", rows)
    return units(load_rows(config.Data(source=path), config.Task(**task))[0])


def test_the_last_answer_of_a_conversation_makes_no_difference_and_others_do(write):
    talks = [said("One?", "yes"), said("one", "no"), said("one", "yes", "two", "a"), said("one", "no", "two", "a")]
    assert of_file(write, [{"messages": talk} for talk in talks], kind="causal-lm") == [[0, 1], [2], [3]]
    sharegpt = [{"from": "human", "value": "ONE"}, {"from": "gpt", "value": "never"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "one."}]}, {"role": "assistant", "content": "a"}]
    rows = [{"conversations": talk} for talk in (sharegpt, talks[0], parts)]
    assert of_file(write, rows, kind="causal-lm") == [[0, 1, 2]]
    told = [[{"role": "system", "content": "Tell."}, {"role": "assistant", "content": text}] for text in "ab"]
    assert of_file(write, [{"messages": talk} for talk in told], kind="causal-lm") == [[0], [1]]  # nobody asks


def test_columns_that_are_not_read_make_no_difference(write):
    rows = [{"text": "Good.", "label": label, "prompt": label, "messages": "none"} for label in "xy"]
    assert of_file(write, rows) == [[0, 1]]
    rows = [{"prompt": "a", "completion": "b", "text": text} for text in "xy"]
    assert of_file(write, rows, kind="causal-lm") == [[0, 1]]
    rows = [{"text": "a", "label": "x", "text_pair": pair} for pair in ("b", "c")]
    assert of_file(write, [*rows, {**rows[0], "label": "y"}]) == [[0, 2], [1]]


def test_roles_make_a_difference():
    assert not alike("messages", *([{"role": role, "content": "Hi"}] for role in ("user", "system")))


def test_units_are_transitive():
    rows = table(**{"text": ["x", "y", "X!", "z", " y"], GROUP: ["g", "g", "h", None, None]})
    assert units(rows) == [[0, 1, 2, 4], [3]]
    assert numbers(rows) == [0, 0, 0, 1, 0]


def test_the_lots_of_units_are_those_that_they_always_were():
    rows = table(**{"text": ["Good film!", "x", "good film", "y", "X."], GROUP: [None, "a", None, "a", None]})
    for purpose, film, group in (("validation", 0.7923827590747443, 0.30028415960712707),
                                 ("test", 0.5648226581856441, 0.9504340258982467)):  # fmt: skip
        assert lots(rows, purpose) == [film, group, film, group, group]
    assert lots(rows.take([1]), "test") == [0.9504340258982467]  # by its group, whatever the text


def test_lots_are_spread_evenly():
    found = lots(table(text=[f"text {i}" for i in range(2000)]), "test")
    assert all(abs(sum(lot < part for lot in found) / 2000 - part) < 0.03 for part in (0.1, 0.5, 0.9))


LONG = " ".join("abcdefgh" * 4)
SAID = {"chosen": "a", "rejected": "b"}
KINDS = {  # rows of which the first and the third are twins, and those of one group are the second and the fourth
    "classification": [
        {"text": t, "label": label} for t, label in zip(("a b", "c", "A, b!", "d"), "xyyx", strict=True)
    ],
    "multi-label": [{"text": t, "labels": [n]} for t, n in zip(("a b", "c", "A, b!", "d"), "xyyx", strict=True)],
    "regression": [{"text": t, "text_pair": "e", "label": n} for n, t in enumerate(("a b", "c", "A, b!", "d"))],
    "token-classification": [
        {"tokens": words, "tags": [tag] * len(words)}
        for words, tag in ((["a", "b"], "X"), (["c"], "Y"), (["A", "b", "."], "X"), (["d"], "Y"))
    ],
    "causal-lm": [{"text": LONG}, {"text": "c"}, {"text": LONG.replace(" ", "  ")}, {"text": "d"}],
    "preference": [{"prompt": text, **SAID} for text in ("one", "two", "One?", "three")],
}


@pytest.mark.parametrize("kind", [method.name for method in registry.methods("task")])
def test_examples_of_every_task_know_their_unit(write, chat_tokenizer, kind):
    rows = [{**row, "who": who} for row, who in zip(KINDS[kind], ("p", "q", "r", "q"), strict=True)]
    data = config.Data(source=write("rows.jsonl", rows), columns={"group": "who"})
    read, task = load_rows(data, config.Task(kind=kind, max_length=16))
    examples = make_task(task, chat_tokenizer).encode(read)
    pieces = 3 if kind == "causal-lm" else 1  # 32 letters and an end, 16 at a time
    assert examples.units == (*([0] * pieces), 1, *([0] * pieces), 1)
    assert len(examples) == len(examples.units)
    assert make_task(task, chat_tokenizer).encode(read.take([])).units == ()


def test_rows_that_are_left_out_have_no_unit(write, chat_tokenizer):
    long = " ".join("a" * 20)
    told = [{"instruction": text, "output": "b"} for text in ("a", long, "c")]
    rows, task = load_rows(config.Data(source=write("r.jsonl", told)), config.Task(kind="causal-lm", max_length=8))
    examples = make_task(task, chat_tokenizer).encode(rows)
    assert (examples.lengths.lost, examples.units) == (1, (0, 2))
    pairs = [{"prompt": text, **SAID} for text in ("a", long, "c")]
    rows, task = load_rows(config.Data(source=write("p.jsonl", pairs)), config.Task(kind="preference", max_length=8))
    assert make_task(task, chat_tokenizer).encode(rows).units == (0, 2)
    with pytest.raises(ValueError, match="1 units of 0 examples"):
        Examples([], Lengths((), 8), [0])
