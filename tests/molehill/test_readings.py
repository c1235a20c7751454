"""Conversations in every form that people have come out as one."""

from __future__ import annotations

import json

import pytest

from molehill.errors import DataError
from molehill.rowfiles.messages import plain, told_by
from molehill.rowfiles.readings import asked, form_of, settled

ASKED = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"of": "b"}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


def turns(row):
    return form_of(row, settled(row), "f:1")["messages"]


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        *(("human", "user"), ("user", "user"), ("system", "system"), ("developer", "developer")),
        *((name, "assistant") for name in ("gpt", "assistant", "model", "chatgpt")),
        *((name, "tool") for name in ("tool", "observation", "function_response", "tool_response", "function")),
    ],
)
def test_speakers_of_sharegpt(speaker, role):
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": speaker, "value": "x"},
            {"from": "gpt", "value": "a"},
        ]
    }
    assert turns(row) == [ASKED, {"role": role, "content": "x"}, SAID]


@pytest.mark.parametrize("value", [CALL, [CALL], json.dumps(CALL), json.dumps([CALL])])
@pytest.mark.parametrize("speaker", ["function_call", "tool_call"])
def test_calls_of_sharegpt_are_those_of_openai(speaker, value):
    said = [{"from": "human", "value": "q"}, {"from": speaker, "value": value}, {"from": "observation", "value": "4"}]
    row = {"conversations": [*said, {"from": "gpt", "value": "a", "weight": 1}]}
    assert turns(row) == [ASKED, CALLED, {"role": "tool", "content": "4"}, {**SAID, "weight": 1}]


def test_what_openai_wrote_once():
    old = [
        ASKED,
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "function", "name": "f", "content": "4"},
    ]
    assert turns({"messages": [*old, SAID]}) == [ASKED, CALLED, {"role": "tool", "content": "4", "name": "f"}, SAID]


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image_url": None}]
    assert turns({"messages": [{"role": "user", "content": parts}, SAID]})[0]["content"] == "one two"
    with pytest.raises(DataError, match="part 2 of message 1 has 'cache_control', which nothing reads"):
        turns({"messages": [{"role": "user", "content": [parts[0], {**parts[1], "cache_control": 1}]}, SAID]})


def test_only_the_completion_is_learnt():
    """As TRL does it; strings are a question and its answer."""
    row = {"prompt": [ASKED, SAID, ASKED], "completion": [SAID], "tools": "[]"}
    assert form_of(row, settled(row), "f:1") == {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID], "tools": None}
    assert (
        turns({"prompt": [ASKED], "completion": "a"}) == turns({"prompt": "q", "completion": [SAID]}) == [ASKED, SAID]
    )
    row = {"prompt": "q", "completion": "a"}
    form = {"instruction": "q", "input": "", "output": "a", "tools": None}
    assert form_of(row, settled(row), "f:1") == form


def test_lists_of_tables_are_json():
    assert turns({"messages": json.dumps([ASKED, SAID])}) == [ASKED, SAID]
    assert turns({"prompt": json.dumps([ASKED]), "completion": "a"}) == [ASKED, SAID]
    row = {"prompt": "[1] is what?", "completion": "a"}
    assert form_of(row, settled(row), "f:1")["instruction"] == "[1] is what?"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "'messages' has half a character"),
        ({"messages": [ASKED, SAID], "tools": '[{"name": "\\ud800"}]'}, "'tools' has half a character"),
        ({"conversations": [{"from": "tool_call", "value": '{"name": "\\ud800"}'}]}, "'value of message 1' has half"),
        (
            {"messages": [ASKED, {**CALLED, "tool_calls": [{"function": {"arguments": '{"a": "\\ud800"}'}}]}]},
            "arguments in 'tool_calls' of message 2",
        ),
        ({"messages": "[" * 100_000}, "must be a list of messages"),
    ],
)
def test_json_inside_a_row_is_text_too(row, what):
    with pytest.raises(DataError, match=what):
        turns(row)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"text": "t", "prompt": None}, {"text": "t"}),
        ({"prompt": "q"}, {"instruction": "q", "input": "", "output": "", "tools": None}),
        ({"prompt": [ASKED]}, {"messages": [ASKED], "tools": None}),
        ({"prompt": [ASKED], "completion": [SAID]}, {"messages": [ASKED, SAID], "tools": None}),
        (
            {"instruction": "q", "input": "i", "text": "t"},
            {"instruction": "q", "input": "i", "output": "", "tools": None},
        ),
        ({"conversations": [{"from": "human", "value": "q"}]}, {"messages": [ASKED], "tools": None}),
        ({"messages": [ASKED, SAID], "prompt": "q", "prompt_id": "7"}, {"messages": [ASKED, SAID], "tools": None}),
    ],
)
def test_rows_ask_with_and_without_answers(row, form):
    assert asked(row, "f:1") == form


def test_rows_that_ask_nothing_or_twice():
    with pytest.raises(DataError, match=r"f:1: the row has none of 'messages', .*'text'. Columns there: question"):
        asked({"question": "q"}, "f:1")
    with pytest.raises(
        DataError, match="f:1: the row can be read by 'prompt' and 'completion', or by 'instruction' and"
    ):
        asked({"prompt": "q", "instruction": "i"}, "f:1")


def test_a_developer_is_the_system_unless_the_template_knows_one():
    said = [{"role": "developer", "content": "x"}, ASKED]
    assert told_by(said, "{% if m.role == 'developer' %}") == said
    assert told_by(said, "{{ m.role }}") == told_by(said, "") == [{"role": "system", "content": "x"}, ASKED]


def test_what_cannot_be_shown_is_named():
    assert plain([ASKED, {**SAID, "weight": 0}], "f:1") == [ASKED, SAID]
    with pytest.raises(DataError, match="f:1: 'tool_calls' of message 2 is not shown to a model here"):
        plain([ASKED, CALLED], "f:1")
