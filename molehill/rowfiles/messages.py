"""Messages of conversations in the forms that people have, brought to one: OpenAI's ``role`` and ``content``.

Read are OpenAI's messages (contents in parts, the roles ``developer`` and ``function``, calls of functions as they were
written once), and those of ShareGPT, ``from`` and ``value``, with calls and results of tools. What has no place in the
one form is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from molehill.errors import DataError
from molehill.rowfiles.values import require_text, text_of

Message = dict[str, Any]

PLAIN = frozenset({"role", "content", "weight"})  # what every format shows of a message, or what no model sees

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's word before there were tools
}
_CALLS = "tool_calls"
_SPEAKERS = {  # of ShareGPT, with the words of those who write files like it
    **_ROLES,
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), _CALLS),
}
_MEND = 'Write a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


def messages_of(value: Any, name: str, where: str) -> list[Message]:
    """The messages of a conversation, every one with ``role`` and ``content``, and what else counts in it.

    Args:
        value: Of a row: a list, or one as JSON (tables have no lists).
        name: Of its column.
        where: Place of the row.

    Raises:
        DataError: It is no list of messages, or something in it is unknown or has no place.
    """
    value = as_list(value, name, where)
    if not isinstance(value, list) or not value:
        raise DataError(f"{name!r} must be a list of messages", where=where, mend=_MEND)
    turns: list[Message] = []
    for number, message in enumerate(value, start=1):
        given = _filled(message) if isinstance(message, Mapping) else {}
        if {"role", "from"} <= given.keys():
            what = f"message {number} has both 'role' and 'from', so it could be OpenAI's or ShareGPT's"
            raise DataError(what, where=where, mend="Leave one of them in every message.")
        if "from" in given:
            given = _of_sharegpt(given, number, where)
        elif "role" not in given or not {"content", _CALLS, "function_call"} & set(message):
            raise DataError(f"message {number} lacks 'role' or 'content'", where=where, mend=_MEND)
        turns.append(_message(given, number, where))
    return turns


def until_answer(turns: Sequence[Message], where: str) -> list[Message]:
    """A conversation up to its last answer.

    Args:
        turns: As `messages_of` gives them.
        where: Place of the row.

    Raises:
        DataError: No answer follows another message, or none is to be learnt.
    """
    kept = list(turns)
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    if len(kept) < 2:
        raise DataError("no message of the role 'assistant' answers another", where=where, mend=_MEND)
    if not any(turn.get("weight", 1) for turn in kept if turn["role"] == "assistant"):
        raise DataError("every answer has the weight 0", where=where, mend="Remove the row.")
    return kept


def plain(turns: Sequence[Message], where: str) -> list[dict[str, str]]:
    """Messages of a role and a text alone, for what shows no more of them; weights say nothing to a model.

    Args:
        turns: As `messages_of` gives them.
        where: Place of the row.

    Raises:
        DataError: A message has more, or no text; it would be lost.
    """
    for number, turn in enumerate(turns, start=1):
        if more := sorted(turn.keys() - PLAIN):
            what = f"{more[0]!r} of message {number} is not shown to a model here"
            raise DataError(what, where=where, mend="Leave the row out.")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def told_by(turns: Sequence[Message], template: str) -> list[Message]:
    """Turns in roles that a chat template knows: a developer is the system where no word of it names the former.

    Many templates write whatever role they get, which their base has never seen.

    Args:
        turns: With ``role``.
        template: In Jinja; empty for none.
    """
    if "developer" in template:
        return list(turns)
    return [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]


def tools_of(value: Any, where: str) -> list[Any] | None:
    """Descriptions of functions; None for none.

    Args:
        value: Of a row: a list, or one as JSON.
        where: Place of the row.

    Raises:
        DataError: It is no list of functions.
    """
    if isinstance(value, str) and value.strip():
        value = _json(value, "tools", where)
        if value is None:
            raise DataError("'tools' is no JSON", where=where, mend="Write a list of functions.")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError("'tools' must be a list of functions", where=where, mend="Write them as OpenAI does.")
    return value


def as_list(value: Any, name: str, where: str) -> Any:
    """A list that is written as JSON; any other value as it is.

    Args:
        value: Of a row.
        name: Of its column.
        where: Place of the row.

    Raises:
        DataError: A string in the list is no text.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = _json(value, name, where)
    return found if isinstance(found, list) else value


def _json(text: str, name: str, where: str) -> Any:
    """What JSON inside a row says, None where it is none; escapes in it may be of no text, as in a file."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    try:
        require_text(found, name, where)
    except RecursionError:
        raise DataError(f"{name!r} is nested too deep", where=where, mend="Remove the row.") from None
    return found


def _filled(message: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say something: one without a value is as good as none (Parquet has all in every row)."""
    texts = {"role", "content", "from", "value"}
    return {
        key: value
        for key, value in message.items()
        if value is not None and (key in texts or value or not isinstance(value, str | list | dict))
    }


def _of_sharegpt(given: Mapping[str, Any], number: int, where: str) -> dict[str, Any]:
    """A message of ShareGPT as OpenAI would write it."""
    speaker, rest = given["from"], {key: value for key, value in given.items() if key not in {"from", "value"}}
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        what = f"message {number} is from {speaker!r:.40}, whom nothing knows"
        raise DataError(what, where=where, mend=f"Use one of {', '.join(_SPEAKERS)}.")
    if role != _CALLS:
        return {"role": role, "content": given.get("value"), **rest}
    calls = given.get("value")
    if isinstance(calls, str):
        calls = _json(calls, f"value of message {number}", where)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        what = f"message {number} is from {speaker!r}, and its value is no call of a function"
        mend = 'Write {"name": "...", "arguments": {...}}, or a list of such.'
        raise DataError(what, where=where, mend=mend)
    return {"role": "assistant", _CALLS: [{"type": "function", "function": dict(call)} for call in calls], **rest}


def _message(given: dict[str, Any], number: int, where: str) -> Message:
    """A message with all that counts in it."""
    role = _ROLES.get(given["role"]) if isinstance(given["role"], str) else None
    if role is None:
        what = f"message {number} has the role {given['role']!r:.40}"
        raise DataError(what, where=where, mend=f"Use one of {', '.join(_ROLES)}.")
    if "function_call" in given:  # as OpenAI wrote it before there were tools
        call = given.pop("function_call")
        if _CALLS in given or not isinstance(call, Mapping):
            what = f"'function_call' of message {number} must be one call, in place of 'tool_calls'"
            raise DataError(what, where=where, mend="Write 'tool_calls' as OpenAI does.")
        given[_CALLS] = [{"type": "function", "function": dict(call)}]
    unknown = sorted(map(str, given.keys() - _KEYS_OF.keys() - {"role", "content"}))
    if unknown:
        mend = f"Remove it; beside role and content there may be {', '.join(sorted(_KEYS_OF))}."
        raise DataError(f"message {number} has {unknown[0]!r}, which nothing reads", where=where, mend=mend)
    found: Message = {"role": role, "content": _content(given, number, where)}
    for key in sorted(given.keys() & _KEYS_OF.keys()):
        _KEYS_OF[key](given[key], role, f"{key!r} of message {number}", where)
        found[key] = int(given[key]) if key == "weight" else given[key]
    return found


def _content(given: Mapping[str, Any], number: int, where: str) -> str:
    value = given.get("content")
    if isinstance(value, list):
        value = "".join(_part(part, f"part {at} of message {number}", where) for at, part in enumerate(value, start=1))
    if given.get(_CALLS) and (value is None or value == ""):
        return ""
    if value is None:
        what = f"message {number} has neither content nor {_CALLS}"
        raise DataError(what, where=where, mend="Fill it in, or remove the row.")
    return text_of(value, f"message {number}", where)


def _part(part: Any, name: str, where: str) -> str:
    """The text of one of OpenAI's parts of a content; such texts follow each other without anything between them."""
    filled = _filled(part) if isinstance(part, Mapping) else {}
    kind = filled.get("type", type(part).__name__)
    if kind != "text" or not isinstance(filled.get("text"), str):
        what = f"{name} is of the kind {kind!r:.40}, where only text is read"
        raise DataError(what, where=where, mend="Remove the row, or write its content as text.")
    if unknown := sorted(map(str, filled.keys() - {"type", "text"})):
        raise DataError(f"{name} has {unknown[0]!r}, which nothing reads", where=where, mend="Remove it.")
    return str(filled["text"])


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
    for call in value:
        inner = call.get("function")
        if isinstance(inner, Mapping) and isinstance(inner.get("arguments"), str):
            _json(inner["arguments"], f"arguments in {name}", where)  # which a template may write as what it says


def _is_name(value: Any, role: str, name: str, where: str) -> None:
    del role
    text_of(value, name, where)


# What a message may hold beside role and content. The chat template must show it (see `molehill.tasks.chat`).
_KEYS_OF: dict[str, Callable[[Any, str, str, str], None]] = {
    "name": _is_name,
    "reasoning_content": _is_name,
    "thinking": _is_name,
    "tool_call_id": _is_name,
    _CALLS: _is_calls,
    "weight": _is_weight,
}
