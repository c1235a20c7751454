"""Rows are brought to one form, and what does not fit is refused with its line."""

from __future__ import annotations

import pytest

from molehill import config
from molehill.errors import ConfigError, DataError
from molehill.tasks.conversations import columns_read
from molehill.tasks.rows import DOMAIN, GROUP, TASK
from molehill.tasks.schema import class_counts, content_keys, load_rows

CLASSES = config.Task(labels=("negative", "positive"))
WRITE = config.Task(kind="causal-lm")
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

HUMAN = {"from": "human", "value": "q"}
PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


def load(path, kind=CLASSES, /, **columns):
    return load_rows(config.Data(source=path, columns=columns), kind)


def test_text_and_label(write):
    path = write("r.jsonl", [{"t": "x", "y": "negative", "domain": "d"}, {"t": "z", "y": "positive", "domain": "e"}])
    rows, task = load(path, text="t", label="y")
    assert rows["text"] == ("x", "z")
    assert rows["label"] == ("negative", "positive")
    assert rows["domain"] == ("d", "e")
    assert task == CLASSES


@pytest.mark.parametrize(
    ("labels", "derived"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 2, 2], ("2", "10")),
        (["10", "-1", "2"], ("-1", "2", "10")),
        ([True, False, True], ("false", "true")),
        (["1", "x", "02"], ("02", "1", "x")),
        (["z", "x+1", "x 1"], ("x 1", "x+1", "z")),
    ],
)
def test_labels_are_derived_from_all_rows(write, labels, derived):
    _, task = load(write("r.jsonl", [{"text": "t", "label": label} for label in labels]), config.Task())
    assert task.labels == derived


@pytest.mark.parametrize(
    ("labels", "what", "line"),
    [
        (
            ["bad", "good", "good", " good"],
            r"'good' \(2 rows\) and ' good' \(1 row, the first here\) are nearly equal",
            4,
        ),
        (["bad", "good", "Good"], "'Good' .* and 'good' .* are nearly equal", 2),
        (["mal", "tr\u00e8s", "tre\u0300s"], r"'tre\\u0300s' .* and 'tr\\xe8s' .* are nearly equal", 2),
        (["0", "1", "1.0"], "are nearly equal", 3),
        (["0", "1", "01"], "are nearly equal", 2),
        (["a", "b", "nan"], "'nan' of 1 row is a word for nothing", 3),
        (["a", "b", "N/A"], "is a word for nothing", 3),
        (["a", "b", "None"], "is a word for nothing", 3),
        (["a", "b", "x\u200b", "x"], "are nearly equal", 3),
    ],
)
def test_classes_that_are_an_accident(write, labels, what, line):
    path = write("r.jsonl", [{"text": "t", "label": label} for label in labels])
    with pytest.raises(DataError, match=what) as caught:
        load(path, config.Task())
    assert caught.value.where == f"{path}:{line}"
    assert "task.labels" in caught.value.mend
    told = tuple(dict.fromkeys(labels))
    assert load(path, config.Task(labels=told))[1].labels == told


def test_classes_are_counted(write):
    rows, task = load(write("r.csv", "text,label\nx,b\ny,a\nz,b\n"), config.Task())
    assert class_counts(rows, task) == {"a": 1, "b": 2}
    assert class_counts(rows, config.Task(labels=("b", "c", "a"))) == {"b": 2, "c": 0, "a": 1}
    assert class_counts(rows, WRITE) == {}


def test_sample_labels():
    _, task = load_rows(config.Data(), config.Task())
    assert task.labels == ("negative", "neutral", "positive")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "positive"}, "the row has no 'text'"),
        ({"text": "x"}, "the row has no 'label'"),
        ({"text": None, "label": "positive"}, "the row has no 'text'"),
        ({"text": 3, "label": "positive"}, "'text' must be text, but is int 3"),
        ({"text": "  ", "label": "positive"}, "'text' is empty"),
        ({"text": "x", "label": 0.5}, "'label' must be text, but is float"),
        ({"text": "x", "label": "Positve"}, "Did you mean 'positive'?"),
    ],
)
def test_bad_row_of_classification(write, row, message):
    path = write("r.jsonl", [{"text": "x", "label": "negative"}, row])
    with pytest.raises(DataError) as caught:
        load(path)
    assert caught.value.where == f"{path}:2"
    assert message in str(caught.value)


def test_task_and_group_are_columns_like_others_unless_mapped(write):
    path = write("r.csv", "text,label,task,group,kind\nx,positive,sum,,b\ny,negative,-1,g,a\nz,negative,,g,b\n")
    rows, _ = load(path)
    assert rows["task"] == ("sum", "-1", "")
    assert not {TASK, GROUP} & set(rows.columns)
    rows, _ = load(path, task="kind", group="kind")
    assert (rows[TASK], rows[GROUP]) == ((1, 0, 1), ("b", "a", "b"))
    assert rows["kind"] == ("b", "a", "b")


@pytest.mark.parametrize(
    ("tasks", "ids"), [(["10", "2", "2"], (1, 0, 0)), ([3, 0, 3], (3, 0, 3)), (["b", "a", 1], (2, 1, 0))]
)
def test_tasks_are_numbered(write, tasks, ids):
    rows, _ = load(write("r.jsonl", [{"text": "x", "label": "negative", "t": t} for t in tasks]), task="t")
    assert rows[TASK] == ids


@pytest.mark.parametrize("task", [-1, True, None, " ", 0.5])
def test_a_row_without_its_task(write, task):
    path = write("r.jsonl", [{"text": "x", "label": "negative", "t": t} for t in (0, task)])
    with pytest.raises(DataError, match="'t' must be a name or a whole number") as caught:
        load(path, task="t")
    assert caught.value.where == f"{path}:2"


def load_domains(write, values, domains):
    path = write("r.jsonl", [{"text": "x", "label": "negative", "d": value} for value in values])
    return load_rows(config.Data(source=path, columns={"domain": "d"}, domains=domains), CLASSES)[0][DOMAIN]


def test_domains_are_places_of_names_or_bins_of_numbers(write, caplog):
    assert load_domains(write, ["fr", "en", "de", ""], ("en", "fr")) == (1, 0, -1, -1)
    assert "2 rows, column 'd' has none of data.domains (en, fr)" in caplog.text
    assert load_domains(write, [1, 2, 2.5, "3", 99, None], (2.0, 3.0)) == (0, 0, 1, 1, 2, -1)  # an edge is of the lower
    with pytest.raises(DataError, match="'d' must be a number to be in a bin") as caught:
        load_domains(write, [1, "old"], (2.0,))
    assert caught.value.where.endswith(":2")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"domains": ("a",)}, "need each other"),
        ({"columns": {"domain": "d"}}, "need each other"),
        ({"columns": {"domain": "d"}, "domains": ("a", "a")}, "once"),
        ({"columns": {"domain": "d"}, "domains": (2.0, 1.0)}, "upwards"),
    ],
)
def test_domains_that_cannot_be(section, message):
    with pytest.raises(ConfigError, match=message):
        config.parse({"data": section})


def test_one_class_only(write):
    with pytest.raises(DataError, match="every row has the label 'a'"):
        load(write("r.jsonl", [{"text": "t", "label": "a"}] * 3), config.Task())


def test_no_such_column(write):
    with pytest.raises(DataError, match=r"no column 'text'.*Columns there: review, label"):
        load(write("r.csv", "review,label\nx,positive\n"))


def test_instruction_input_output(write):
    path = write("r.jsonl", [{"instruction": "i", "output": "o"}, {"instruction": "i", "input": "n", "output": "o"}])
    rows, task = load(path, WRITE)
    assert rows["input"] == ("", "n")
    assert task == WRITE


def test_messages_end_with_an_answer(write):
    rows, _ = load(write("r.jsonl", [{"messages": [*TURNS, {"role": "user", "content": "more"}]}]), WRITE)
    assert rows["messages"] == (TURNS,)


def test_what_counts_in_a_message_is_kept(write):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    none = {"tool_calls": None, "name": None, "weight": None, "tool_call_id": None}  # as Parquet has them in every row
    told = [
        {**none, "role": "user", "content": [{"type": "text", "text": "q"}], "name": "ann"},
        {**none, "role": "assistant", "content": None, "tool_calls": [call], "weight": 0.0},
        {**none, "role": "tool", "content": "31", "tool_call_id": "1"},
        {**none, **TURNS[1], "tool_calls": [], "reasoning_content": "", "name": "", "annotations": []},
    ]
    path = write("r.jsonl", [{"messages": told, "tools": '[{"name": "f"}]'}, {"messages": TURNS, "tools": ""}])
    rows, _ = load(path, WRITE)
    assert rows["messages"][0] == [
        {"role": "user", "content": "q", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "31", "tool_call_id": "1"},
        TURNS[1],
    ]
    assert rows["tools"] == ([{"name": "f"}], None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "must be a list"),
        ({"messages": []}, "must be a list"),
        ({"messages": [{"text": "x"}]}, "message 1 lacks 'role'"),
        ({"messages": [{**TURNS[0], "from": "human"}, TURNS[1]]}, "has both 'role' and 'from'"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1 is from 'narrator', whom nothing knows"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "f(x)"}]}, "its value is no call of a function"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "message 2 has neither content"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "a", "loss": True}]}, "message 2 has 'loss'"),
        ({"conversations": "hello"}, "'conversations' must be a list"),
        ({"prompt": TURNS, "completion": [{"role": "user", "content": "b"}]}, "every answer has the weight 0"),
        ({"prompt": "q"}, "no column 'completion'"),
        ({"prompt": "q", "completion": 3}, "'completion' must be text"),
        ({"prompt": [TURNS[0], {**TURNS[1], "weight": 1}], "completion": "b"}, "'prompt' has the weight 1"),
        ({"messages": TURNS, "conversations": TURNS}, "can be read by 'messages', or by 'conversations'"),
        ({"messages": TURNS, "prompt": "q", "completion": "a"}, "or by 'prompt' and 'completion'"),
        ({"prompt": "q", "text": "t"}, "'prompt' without 'completion' asks for an answer, and 'text' could be"),
        ({"text": ""}, "'text' is empty"),
        ({"messages": [{"role": "human", "content": "x"}, TURNS[1]]}, "message 1 has the role 'human'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 3}]}, "'message 2' must be text"),
        ({"messages": [TURNS[0]]}, "no message of the role 'assistant'"),
        ({"messages": [TURNS[1]]}, "no message of the role 'assistant' answers another"),
        ({"messages": [TURNS[0], {**TURNS[1], "train": False}]}, "message 2 has 'train', which nothing reads"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, "'weight' of message 2 is 0.5"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": [1]}]}, "'weight' of message 2 is [1]"),
        ({"instruction": "i", "output": "o", "tools": "[{"}, "'tools' is no JSON"),
        ({"messages": [{**TURNS[0], "weight": 1}, TURNS[1]]}, "'weight' of message 1 is 1, but only answers"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "every answer has the weight 0"),
        ({"messages": [TURNS[0], {**TURNS[1], "content": None}]}, "message 2 has neither content nor tool_calls"),
        ({"messages": [{**TURNS[0], "tool_calls": [{}]}, TURNS[1]]}, "'tool_calls' of message 1 is of the role 'user'"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": "x"}]}, "must be a list of calls"),
        ({"messages": [TURNS[0], {**TURNS[1], "function_call": "f"}]}, "'function_call' of message 2 must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]}, "of the kind 'image_url'"),
        (
            {"messages": [{"role": "user", "content": [*PARTS, "r"]}, TURNS[1]]},
            "part 3 of message 1 is of the kind 'str'",
        ),
        ({"messages": TURNS, "functions": [{"name": "f"}]}, "'functions' is not read"),
        ({"instruction": "i", "output": "o", "system": "Be brief."}, "'system' is not read"),
        ({"instruction": "i", "output": "o", "history": [["q", "a"]]}, "'history' is not read"),
        ({"messages": TURNS, "tools": "[{"}, "'tools' is no JSON"),
        ({"messages": TURNS, "tools": {"name": "f"}}, "'tools' must be a list"),
        ({"instruction": "i", "output": ""}, "'output' is empty"),
        ({"instruction": "i", "input": 5, "output": "o"}, "'input' must be text"),
        ({"output": "o"}, "no column 'instruction'"),
        (
            {"question": "q"},
            "none of these is among the columns: 'messages'; 'conversations'; 'prompt' and 'completion'",
        ),
    ],
)
def test_bad_row_of_causal_lm(write, row, message):
    path = write("r.jsonl", [row])
    with pytest.raises(DataError) as caught:
        load(path, WRITE)
    assert caught.value.where in {path, f"{path}:1"}
    assert message in str(caught.value)


def test_columns_that_are_named_decide(write):
    both = {"messages": TURNS, "instruction": "i", "output": "o", "text": "t"}
    path = write("r.jsonl", [both])
    for column, read in (
        ("messages", {"messages"}),
        ("output", {"instruction", "input", "output"}),
        ("text", {"text"}),
    ):
        rows, _ = load(path, WRITE, **{column: column})
        assert set(columns_read(rows.columns)) == read
        assert read | {"instruction"} <= set(rows.columns)  # others may deal rows by it
    with pytest.raises(DataError, match=r"data\.columns names columns of two shapes: 'messages', and 'text'"):
        load(path, WRITE, messages="messages", text="text")


def test_text_beside_answers_is_not_read(write):
    """As Alpaca's own file has it: the whole text once more."""
    rows, _ = load(write("r.jsonl", [{"instruction": "i", "output": "o", "text": "i o"}]), WRITE)
    assert set(columns_read(rows.columns)) == {"instruction", "input", "output"}


def test_a_column_that_means_something_else_may_have_any_name(write):
    path = write("r.jsonl", [{"messages": TURNS, "system": "site-1", "history": ""}])
    rows, _ = load_rows(config.Data(source=path, columns={"group": "system"}), WRITE)
    assert rows[GROUP] == ("site-1",)


def test_truth_is_no_number(write):
    path = write("r.jsonl", [{"text": "x", "label": label} for label in (0, 1, True)])
    with pytest.raises(DataError, match="this label is true or false and those of other rows are not") as caught:
        load(path, config.Task())
    assert caught.value.where == f"{path}:3"


def test_tools_beside_an_instruction(write):
    row = {"instruction": "i", "output": "o"}
    rows, _ = load(write("r.jsonl", [{**row, "tools": '[{"name": "f"}]'}, {**row, "tools": ""}]), WRITE)
    assert rows["tools"] == ([{"name": "f"}], None)


def test_columns_that_may_not_be_read_are_named(write, caplog):
    path = write("r.jsonl", [{"messages": TURNS, "tools": [{"name": "f"}], "other": 1}])
    rows, _ = load_rows(config.Data(source=path), WRITE, only=("messages",))
    assert set(rows.columns) == {"messages"}
    dealt = write("d.jsonl", [{"messages": TURNS, GROUP: "thread-7", "other": 1}])
    rows, _ = load_rows(config.Data(source=dealt), WRITE, only=("messages",))
    assert set(rows.columns) == {"messages", GROUP}
    assert caplog.messages == [f"{path}: columns that may not be read are left out: 'tools'"]
    path = write("s.jsonl", [{"messages": TURNS, "system": "Be brief."}])
    with pytest.raises(DataError, match="'system' is not read"):
        load_rows(config.Data(source=path), WRITE, only=("messages",))


def test_content_keys_ignore_answers(write):
    path = write("r.jsonl", [{"instruction": "i", "output": "1"}, {"instruction": "i", "output": "2"}])
    first, second = content_keys(load(path, WRITE)[0])
    assert first == second
