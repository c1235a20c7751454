"""Rows with two answers, in the shapes that people have."""

from __future__ import annotations

import json

import pytest

from molehill import config
from molehill.errors import DataError
from molehill.tasks.batches import IGNORE
from molehill.tasks.kind import make_task
from molehill.tasks.schema import content_keys, load_rows

TASK = config.Task(kind="preference", max_length=32)


def load(write, *rows):
    return load_rows(config.Data(source=str(write("rows.jsonl", list(rows)))), TASK)[0]


def say(*turns):
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[role], "content": text} for role, text in turns]


PLAIN = {"prompt": "one", "chosen": "a", "rejected": "b"}
TURNS = {"prompt": say(("u", "one")), "chosen": say(("a", "a")), "rejected": say(("a", "b"))}
WHOLE = {"chosen": say(("u", "one"), ("a", "a")), "rejected": say(("u", "one"), ("a", "b"))}
BOTH = WHOLE | {"prompt": "one"}
TABLE = {name: json.dumps(value) for name, value in TURNS.items()}


@pytest.mark.parametrize("row", [PLAIN, TURNS, WHOLE, BOTH, TABLE], ids=["texts", "turns", "whole", "both", "table"])
def test_every_shape_gives_the_same_two_answers(write, chat_tokenizer, row):
    task = make_task(TASK, chat_tokenizer)
    (example,) = task.encode(load(write, row))
    (expected,) = task.encode(load(write, PLAIN))
    assert example == expected
    chosen, rejected = (
        [chat_tokenizer.convert_ids_to_tokens(y) for y in labels if y != IGNORE]
        for labels in (example.labels, example.other_labels)
    )
    assert chosen[0] == "a"
    assert rejected[0] == "b"
    assert chosen[1:] == rejected[1:]
    batch = task.collate([example, expected])
    assert batch.of == "pair"
    assert batch.predictions == 2
    assert batch.labels.shape[0] == 4


def test_only_what_comes_after_the_question_is_learnt(write, chat_tokenizer):
    before = (("u", "one"), ("a", "c"), ("u", "two"))
    row = {"chosen": say(*before, ("a", "a")), "rejected": say(*before, ("a", "b"))}
    (example,) = make_task(TASK, chat_tokenizer).encode(load(write, row))
    learnt = chat_tokenizer.convert_ids_to_tokens([y for y in example.labels if y != IGNORE])
    assert "c" not in learnt
    assert learnt[0] == "a"


def test_a_pair_that_is_cut_is_left_out_and_counted(write, chat_tokenizer):
    long = PLAIN | {"prompt": "one " * 40}
    examples = make_task(TASK, chat_tokenizer).encode(load(write, PLAIN, long))
    assert len(examples) == 1
    assert (examples.lengths.cut, examples.lengths.lost) == (1, 1)
    with pytest.raises(DataError, match=r"no pair has both answers within task\.max_length.* Raise task\.max_length"):
        make_task(TASK, chat_tokenizer).encode(load(write, long))


def test_rows_of_one_question_stay_together(write):
    other = {"chosen": say(("u", "one"), ("a", "b")), "rejected": say(("u", "one"), ("a", "c"))}
    first, second = content_keys(load(write, WHOLE, other))
    assert first == second


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "one", "chosen": "a"}, "there is no column 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "the row has no 'prompt'"),
        (PLAIN | {"rejected": "a"}, "'chosen' and 'rejected' are the same"),
        (PLAIN | {"rejected": say(("a", "b"))}, "one is a text and the other a list of messages"),
        (WHOLE | {"rejected": say(("u", "two"), ("a", "b"))}, "do not begin with one and the same 'prompt'"),
        (WHOLE | {"prompt": "two"}, "do not begin with one and the same 'prompt'"),
        (TURNS | {"prompt": None}, "both answers begin with one"),
        (PLAIN | {"chosen": " "}, "'chosen' is empty"),
    ],
)
def test_what_is_no_pair_is_refused(write, row, says):
    with pytest.raises(DataError, match=says):
        load(write, row)


def test_its_objective_is_its_own_where_none_is_named():
    assert config.parse({"task": {"kind": "preference"}}).train.objective.name == "dpo"
    assert config.parse({"task": {"kind": "regression"}}).train.objective.name == "sft"
    named = config.parse({"task": {"kind": "preference"}, "train": {"objective": {"name": "dpo", "beta": 0.5}}})
    assert named.train.objective.params == {"beta": 0.5}
    assert config.parse(named.model_dump(mode="json")) == named
