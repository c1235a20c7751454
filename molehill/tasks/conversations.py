"""Rows of a causal language model, brought to one form: ``instruction, [input,] output`` or ``messages``."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from molehill.errors import DataError
from molehill.rowfiles.values import text_of
from molehill.tasks.rows import Rows

# Columns that other programs read beside ours, and where what they hold belongs here.
_UNREAD = {
    "functions": "Describe them in a column 'tools'.",
    "history": "Write the whole conversation as 'messages'.",
    "system": "Make it the first of 'messages', of the role 'system'.",
}
_ROLES = ("system", "user", "assistant", "tool")


def require_read(rows: Rows, taken: Collection[str]) -> None:
    """Refuse columns that mean something in a conversation and that nothing reads.

    Args:
        rows: With the columns of their source.
        taken: Columns that the configuration names, which are read.

    Raises:
        DataError: One of them is filled in.
    """
    for name in (name for name in _UNREAD if name not in taken):
        for value, where in zip(rows.columns.get(name, ()), rows.where, strict=False):
            if value:
                mend = f"{_UNREAD[name]} If it means something else, remove the column."
                raise DataError(f"{name!r} is not read", where=where, mend=mend)


def conform(rows: Rows) -> Rows:
    """Check every row and bring its columns to one form: strings stripped of nothing.

    Args:
        rows: Rows with the schema's column names.

    Raises:
        DataError: A column or value is missing, has the wrong type or is empty.
    """
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


def _filled(rows: Rows, name: str) -> list[tuple[Any, str]]:
    return [("" if value is None else value, where) for value, where in zip(rows[name], rows.where, strict=True)]


def _strings(rows: Rows, name: str) -> list[str]:
    return [text_of(value, name, where) for value, where in zip(rows[name], rows.where, strict=True)]


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
