"""Checks rows against the task and brings them to one form.

Schemas: ``text, label`` for classification; ``instruction, [input,] output`` or ``messages`` for causal LM.
``group`` (rows that must stay together) and ``task`` (for methods that route by task) are read only from the columns
that ``data.columns`` names for them: a column that merely bears the name may mean anything.
"""

from __future__ import annotations

import difflib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from molehill import config
from molehill.characters import alike
from molehill.errors import DataError
from molehill.rowfiles.values import label_of, text_of
from molehill.tasks.rows import GROUP, TASK, Rows
from molehill.tasks.sources import read_rows
from molehill.words import counted

_log = logging.getLogger(__name__)

# Columns of a task, by the names that Molehill uses.
COLUMNS = {"classification": ("text", "label"), "causal-lm": ("messages", "tools", "instruction", "input", "output")}

# Columns that other programs read beside ours, and where what they hold belongs here.
_UNREAD = {
    "functions": "Describe them in a column 'tools'.",
    "history": "Write the whole conversation as 'messages'.",
    "system": "Make it the first of 'messages', of the role 'system'.",
}
_ROLES = ("system", "user", "assistant", "tool")
_NOTHING = {
    *("nan", "na", "n/a", "#n/a", "<na>", "nat", "nil", "none", "null", "undefined", "-", "--", "?", ".", "#value!"),
    *("#ref!", "#div/0!", "#name?"),
}  # as `alike` writes them


def load_rows(data: config.Data, task: config.Task, *, only: Collection[str] | None = None) -> tuple[Rows, config.Task]:
    """Read and check the rows of a run.

    Args:
        data: Where the rows are.
        task: What they must hold; empty ``labels`` are derived from all rows.
        only: Columns of the source that may be read, by its own names; None for all.

    Returns:
        The rows in one form, and the task with its labels.

    Raises:
        DataError: The source cannot be read, or a row does not fit; names file and line.
    """
    read = read_rows(data.source, split=data.split)
    if task.kind == "causal-lm":
        for name in _UNREAD.keys() - {*data.columns.values(), *map(str, data.partition.params.values())}:
            _require_nothing(read, name)
    if only is not None:
        ours = {data.columns.get(name, name) for name in COLUMNS[task.kind]}
        if withheld := [repr(name) for name in read.columns if name in ours and name not in only]:
            _log.warning("%s: columns that may not be read are left out: %s", data.source, ", ".join(withheld))
        read = read.only(only)
    rows = read.renamed({ours: theirs for ours, theirs in data.columns.items() if ours not in ("group", "task")})
    if "group" in data.columns:
        rows = rows.having(**{GROUP: read[data.columns["group"]]})
    if "task" in data.columns:
        rows = rows.having(**{TASK: _task_ids(read, data.columns["task"])})
    if task.kind == "causal-lm":
        return conform(rows, task), task
    if not task.labels:
        task = task.model_copy(update={"labels": derive_labels(rows)})
    return conform(rows, task), task


def columns_of(data: config.Data, task: config.Task, there: Collection[str] = ()) -> set[str]:
    """Columns of a source that a run reads, by the source's own names.

    Args:
        data: Names columns.
        task: Has columns of its own.
        there: Columns of rows that were read, for those that count only where they are; without them, those that the
            run cannot do without, or names.
    """
    sure = COLUMNS["classification"] if task.kind == "classification" else ()
    ours = {*sure, *(name for name in COLUMNS[task.kind] if name in there)}
    return {*data.columns.values(), *(data.columns.get(name, name) for name in ours)}


def conform(rows: Rows, task: config.Task) -> Rows:
    """Check every row and bring its columns to one form: strings stripped of nothing, labels as strings.

    Args:
        rows: Rows with the schema's column names.
        task: The kind, and for classification the labels allowed.

    Raises:
        DataError: A column or value is missing, has the wrong type, is empty, or is a label not in the list.
    """
    if task.kind == "classification":
        labels = [label_of(value, where) for value, where in zip(rows["label"], rows.where, strict=True)]
        for label, where in zip(labels, rows.where, strict=True):
            if label not in task.labels:
                raise _unknown_label(label, task.labels, where)
        return rows.having(text=_strings(rows, "text"), label=labels)
    if "tools" in rows.columns:
        rows = rows.having(tools=[_tools(v, w) for v, w in zip(rows["tools"], rows.where, strict=True)])
    if "messages" in rows.columns:
        return rows.having(messages=[_messages(v, w) for v, w in zip(rows["messages"], rows.where, strict=True)])
    if "instruction" not in rows.columns and "output" not in rows.columns:
        raise DataError(
            "neither `messages` nor `instruction` and `output` are among the columns",
            where=rows.source,
            mend=f"Columns there: {', '.join(rows.columns)}. Map yours with data.columns.",
        )
    inputs: list[str] = [""] * len(rows)
    if "input" in rows.columns:
        inputs = [v if v == "" else text_of(v, "input", w) for v, w in _filled(rows, "input")]
    return rows.having(instruction=_strings(rows, "instruction"), input=inputs, output=_strings(rows, "output"))


def derive_labels(rows: Rows) -> tuple[str, ...]:
    """Labels that occur, sorted: by value when all are whole numbers, else as text.

    Raises:
        DataError: The column is missing, a label has the wrong type or is a word for nothing, two are nearly equal,
            some are truth and others not, or there are fewer than two.
    """
    truth = [isinstance(value, bool) for value in rows["label"]]
    if any(truth) and not all(truth):
        what = "this label is true or false and those of other rows are not"
        raise DataError(what, where=rows.where[truth.index(True)], mend="Write all labels alike, or list task.labels.")
    found: dict[str, list[str]] = {}  # places, by label
    for value, where in zip(rows["label"], rows.where, strict=True):
        found.setdefault(label_of(value, where), []).append(where)
    if len(found) < 2:
        only = next(iter(found))
        raise DataError(f"every row has the label {only!r}", where=rows.source, mend="Give rows of two classes.")
    _require_apart(found)
    return _in_order(set(found))


def class_counts(rows: Rows, task: config.Task) -> dict[str, int]:
    """Rows of every class in the order of the logits; empty for causal LM.

    Args:
        rows: Checked rows.
        task: With its labels known.
    """
    counts = Counter(rows["label"]) if task.kind == "classification" else Counter[str]()
    return {label: counts[label] for label in task.labels}


def _require_apart(found: Mapping[str, list[str]]) -> None:
    """Refuse classes that are one to people, and words for nothing: each would get a row of the head by accident."""
    same: dict[str, str] = {}
    for label in sorted(found, key=lambda label: (-len(found[label]), label)):
        first = found[label][0]
        if alike(label) in _NOTHING:
            what = f"the label {label!r} of {counted(len(found[label]), 'row')} is a word for nothing"
            raise DataError(what, where=first, mend="Remove these rows, or list it with all classes in task.labels.")
        known = same.setdefault(alike(label), label)
        if known != label:
            look = ascii if unicodedata.normalize("NFC", known) == unicodedata.normalize("NFC", label) else repr
            more, fewer = (counted(len(found[each]), "row") for each in (known, label))
            what = f"the labels {look(known)} ({more}) and {look(label)} ({fewer}, the first here) are nearly equal"
            mend = "Write them alike, or list both with all classes in task.labels."
            raise DataError(what, where=first, mend=mend)


def _require_nothing(rows: Rows, name: str) -> None:
    """Refuse a column that means something in a conversation and that nothing reads."""
    for value, where in zip(rows.columns.get(name, ()), rows.where, strict=False):
        if value:
            mend = f"{_UNREAD[name]} If it means something else, remove the column."
            raise DataError(f"{name!r} is not read", where=where, mend=mend)


def content_keys(rows: Rows) -> list[str]:
    """What a model would see of each row, without answers: rows with equal keys are duplicates."""
    names = [name for name in ("text", "messages", "instruction", "input") if name in rows.columns]
    columns = [rows[name] for name in names]
    return [json.dumps([values[i] for values in columns], sort_keys=True, default=str) for i in range(len(rows))]


def _filled(rows: Rows, name: str) -> list[tuple[Any, str]]:
    return [("" if value is None else value, where) for value, where in zip(rows[name], rows.where, strict=True)]


def _strings(rows: Rows, name: str) -> list[str]:
    return [text_of(value, name, where) for value, where in zip(rows[name], rows.where, strict=True)]


def _unknown_label(label: str, labels: tuple[str, ...], where: str) -> DataError:
    folded = {known.casefold(): known for known in labels}
    near = difflib.get_close_matches(label.casefold().strip(), folded, n=1)
    hint = f"Did you mean {folded[near[0]]!r}? " if near else ""
    what = f"label {label!r:.60} is not in task.labels ({', '.join(labels)})"
    return DataError(what, where=where, mend=f"{hint}Mend the row, or add the label to task.labels.")


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The conversation up to its last answer."""
    mend = 'Write a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
    if not isinstance(value, list) or not value:
        raise DataError("'messages' must be a list of messages", where=where, mend=mend)
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & set(message):
            raise DataError(f"message {number} lacks 'role' or 'content'", where=where, mend=mend)
        turns.append(_message(message, number, where))
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2:
        raise DataError("no message of the role 'assistant' answers another", where=where, mend=mend)
    if not any(turn.get("weight", 1) for turn in turns if turn["role"] == "assistant"):
        raise DataError("every answer has the weight 0", where=where, mend="Remove the row.")
    return turns


def _message(message: Mapping[str, Any], number: int, where: str) -> dict[str, Any]:
    """A message with all that counts in it; a key without a value is as good as none (Parquet has all in every row)."""
    given = {
        key: value
        for key, value in message.items()
        if value is not None and (key in {"role", "content"} or value or not isinstance(value, str | list | dict))
    }
    role = given.get("role")
    if role not in _ROLES:
        what = f"message {number} has the role {role!r:.40}"
        raise DataError(what, where=where, mend=f"Use one of {', '.join(_ROLES)}.")
    unknown = sorted(map(str, given.keys() - _KEYS - {"role", "content"}))
    if unknown:
        mend = f"Remove it; beside role and content there may be {', '.join(sorted(_KEYS))}."
        raise DataError(f"message {number} has {unknown[0]!r}, which nothing reads", where=where, mend=mend)
    found: dict[str, Any] = {"role": role, "content": _content(given, number, where)}
    for key in sorted(given.keys() & _KEYS):
        _KEYS_OF[key](given[key], role, f"{key!r} of message {number}", where)
        found[key] = int(given[key]) if key == "weight" else given[key]
    return found


def _content(given: Mapping[str, Any], number: int, where: str) -> str:
    value = given.get("content")
    if isinstance(value, list):  # OpenAI's parts
        if len(value) != 1 or not isinstance(value[0], Mapping) or value[0].get("type") != "text":
            kinds = ", ".join(str(part.get("type") if isinstance(part, Mapping) else type(part)) for part in value)
            what = f"message {number} consists of parts ({kinds:.80}), where one text is read"
            raise DataError(what, where=where, mend="Write its content as one string.")
        value = value[0].get("text")
    if given.get("tool_calls") and (value is None or value == ""):
        return ""
    if value is None:
        what = f"message {number} has neither content nor tool_calls"
        raise DataError(what, where=where, mend="Fill it in, or remove the row.")
    return text_of(value, f"message {number}", where)


def _tools(value: Any, where: str) -> Any:
    """Descriptions of functions as a list; files often hold it as a string of JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError("'tools' is no JSON", where=where, mend="Write a list of functions.") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError("'tools' must be a list of functions", where=where, mend="Write them as OpenAI does.")
    return value


def _is_weight(value: Any, role: str, name: str, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in {0, 1}:
        raise DataError(f"{name} is {value!r:.40}", where=where, mend="Give 1 to learn an answer, or 0 not to.")
    if value and role != "assistant":
        what = f"{name} is 1, but only answers are learnt"
        raise DataError(what, where=where, mend="Leave it out, or give the role 'assistant'.")


def _is_calls(value: Any, role: str, name: str, where: str) -> None:
    if role != "assistant" and value:
        raise DataError(f"{name} is of the role {role!r}", where=where, mend="Only an assistant calls tools.")
    if not isinstance(value, list) or not all(isinstance(call, Mapping) for call in value):
        raise DataError(f"{name} must be a list of calls", where=where, mend="Write them as OpenAI does.")


def _is_name(value: Any, role: str, name: str, where: str) -> None:
    del role
    text_of(value, name, where)


# What a message may hold beside role and content. The chat template must show it (see `molehill.tasks.chat`).
_KEYS_OF: dict[str, Callable[[Any, str, str, str], None]] = {
    "name": _is_name,
    "reasoning_content": _is_name,
    "thinking": _is_name,
    "tool_call_id": _is_name,
    "tool_calls": _is_calls,
    "weight": _is_weight,
}
_KEYS = frozenset(_KEYS_OF)


def _task_ids(rows: Rows, column: str) -> list[int]:
    """The task of every row: whole numbers as they are, names (and all cells of a CSV file) as their place in order."""
    values = rows[column]
    for value, where in zip(values, rows.where, strict=True):
        named = isinstance(value, str) and value.strip()
        if not named and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            what = f"{column!r} must be a name or a whole number from 0 to be the task, but is {value!r:.40}"
            raise DataError(what, where=where, mend="Fill it in, or leave task out of data.columns.")
    if not any(isinstance(value, str) for value in values):
        return list(values)
    ids = {name: number for number, name in enumerate(_in_order({str(value) for value in values}))}
    return [ids[str(value)] for value in values]


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Sorted: by value when all are whole numbers, else as text."""
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))
