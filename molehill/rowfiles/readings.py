"""What the columns of rows mean to a causal language model, and a row in one form.

There are four shapes of questions with answers, and plain text. Which one is meant follows from the columns that are
there, or from those that somebody names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from molehill.errors import DataError
from molehill.rowfiles.messages import Message, as_list, messages_of, tools_of, until_answer
from molehill.rowfiles.values import text_of

TOOLS = "tools"


@dataclass(frozen=True)
class Reading:
    """One shape of rows.

    Attributes:
        columns: Columns it needs: what is asked, and what is answered.
        more: Columns it reads where they are.
    """

    columns: tuple[str, ...]
    more: tuple[str, ...] = (TOOLS,)

    def __str__(self) -> str:
        return " and ".join(map(repr, self.columns))


PROMPTED = Reading(("prompt", "completion"))
_ANSWERED = (
    Reading(("messages",)),
    Reading(("conversations",)),
    PROMPTED,
    Reading(("instruction", "output"), ("input", TOOLS)),
)
_TEXT = Reading(("text",), ())
_ALL = (*_ANSWERED, _TEXT)
COLUMNS = tuple(dict.fromkeys(name for each in _ALL for name in (*each.columns, *each.more)))


def reading_of(columns: Collection[str], named: Collection[str], source: str) -> Reading:
    """How rows are meant.

    Text is what else is learnt: beside questions with answers, such a column is theirs once more.

    Args:
        columns: Those that are there.
        named: Of them, those that somebody has named, which decide.
        source: Of the rows, for errors.

    Returns:
        The reading; a column that it needs may be missing where only one could be meant.

    Raises:
        DataError: The columns have several meanings, or none.
    """
    chosen = [each for each in _ALL if {*each.columns, *each.more} - {TOOLS} & {*named}]
    if len(chosen) > 1:
        what = f"data.columns names columns of two shapes: {chosen[0]}, and {chosen[1]}"
        raise DataError(what, where=source, mend="Name those of one.")
    if chosen:
        return chosen[0]
    found, parts = _found(columns)
    if len(found) > 1:
        what = f"the rows can be read by {found[0]}, or by {found[1]}"
        first = ", ".join(f'{name} = "{name}"' for name in found[0].columns)
        mend = f"Name what is meant, as in data.columns = {{ {first} }}, or remove the others."
        raise DataError(what, where=source, mend=mend)
    if found:
        return found[0]
    if "text" in columns and parts:
        there, missing = _halves(parts[0], columns)
        what = f"{there!r} without {missing!r} asks for an answer, and 'text' could be learnt as it is"
        answer = f'Name the answer, as in data.columns = {{ {missing} = "text" }}'
        mend = f'{answer}, or the text: data.columns = {{ text = "text" }}.'
        raise DataError(what, where=source, mend=mend)
    if "text" in columns:
        return _TEXT
    if parts:
        return parts[0]
    shapes = "; ".join(map(str, _ALL))
    mend = f"Columns there: {', '.join(columns)}. Map yours with data.columns."
    raise DataError(f"none of these is among the columns: {shapes}", where=source, mend=mend)


def settled(columns: Collection[str]) -> Reading:
    """How checked rows are meant: as `reading_of`, for columns that have one meaning.

    Args:
        columns: Those that are there.
    """
    found, parts = _found(columns)
    return next(iter((*found, *((_TEXT,) if "text" in columns else ()), *parts)), _TEXT)


def others(columns: Collection[str], reading: Reading) -> set[str]:
    """Columns of answers in other shapes, which `settled` must not find.

    Args:
        columns: Those that are there.
        reading: What is meant.
    """
    return {each.columns[-1] for each in whole(columns) if each != reading} - {*reading.columns}


def form_of(
    row: Mapping[str, Any], reading: Reading, where: str, *, answered: bool = True, name: str = ""
) -> dict[str, Any]:
    """A row in one form: ``messages``, or ``instruction``, ``input`` and ``output`` (both with ``tools``), or ``text``.

    Of a prompt and its completion only the completion is learnt, so answers in the prompt have the weight 0.

    Args:
        row: Its columns.
        reading: How they are meant.
        where: Place of the row.
        answered: Whether it must have an answer; without, ``output`` may be empty, and messages may end with any.
        name: What the column of the answer is called, where it is not called as in ``reading``.

    Raises:
        DataError: Something is missing, of the wrong type, empty or unknown.
    """
    if reading == _TEXT:
        return {"text": text_of(row.get("text"), "text", where)}
    tools = tools_of(row.get(TOOLS), where)
    if len(reading.columns) == 1:
        turns = messages_of(row.get(reading.columns[0]), reading.columns[0], where)
        return {"messages": until_answer(turns, where) if answered else turns, TOOLS: tools}
    question, answer = (row.get(name) for name in reading.columns)
    asks, says = reading.columns[0], name or reading.columns[1]
    if asks == "prompt" and any(isinstance(as_list(row.get(each), each, where), list) for each in reading.columns):
        turns = _prompted(question, where) + _completed(answer, says, where, answered=answered)
        return {"messages": until_answer(turns, where) if answered else turns, TOOLS: tools}
    about = row.get("input") if "input" in reading.more else None
    nothing = not answered and answer in {None, ""}
    return {
        "instruction": text_of(question, asks, where),
        "input": "" if about is None or about == "" else text_of(about, "input", where),
        "output": "" if nothing else text_of(answer, says, where),
        TOOLS: tools,
    }


def asked(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row that asks something, with or without an answer, in the form of `form_of`.

    Args:
        row: Its columns.
        where: Place of the row.

    Raises:
        DataError: It asks nothing, or it is not clear what.
    """
    there = [name for name, value in row.items() if value is not None and value not in ("", [])]
    found, parts = _found(there)
    found = found or [each for each in parts if each.columns[0] in there]
    if len(found) > 1:
        what = f"the row can be read by {found[0]}, or by {found[1]}"
        raise DataError(what, where=where, mend="Leave the columns of one.")
    if not found and "text" not in row:
        what = f"the row has none of {', '.join(repr(each.columns[0]) for each in _ALL)}"
        raise DataError(what, where=where, mend=f"Columns there: {', '.join(row)}.")
    return form_of(row, found[0] if found else _TEXT, where, answered=False)


def whole(columns: Collection[str]) -> list[Reading]:
    """Shapes of questions with answers of which all columns are there.

    Args:
        columns: Those that are there.
    """
    return [each for each in _ANSWERED if {*each.columns} <= {*columns}]


def _found(columns: Collection[str]) -> tuple[list[Reading], list[Reading]]:
    """Shapes with answers of which all columns are there, and those of which some are."""
    all_there = whole(columns)
    return all_there, [each for each in _ANSWERED if each not in all_there and {*each.columns} & {*columns}]


def _halves(reading: Reading, columns: Collection[str]) -> tuple[str, str]:
    there, missing = ([name for name in reading.columns if (name in columns) is side] for side in (True, False))
    return there[0], missing[0]


def _prompted(value: Any, where: str) -> list[Message]:
    value = as_list(value, "prompt", where)
    if not isinstance(value, list):
        return [{"role": "user", "content": text_of(value, "prompt", where)}]
    turns = messages_of(value, "prompt", where)
    if any(turn.get("weight") for turn in turns):
        what = "an answer in 'prompt' has the weight 1, but only the completion is learnt"
        raise DataError(what, where=where, mend="Write the whole conversation as 'messages'.")
    return [turn | ({"weight": 0} if turn["role"] == "assistant" else {}) for turn in turns]


def _completed(value: Any, name: str, where: str, *, answered: bool) -> list[Message]:
    value = as_list(value, name, where)
    if isinstance(value, list):
        return messages_of(value, name, where)
    if not answered and value in {None, ""}:
        return []
    return [{"role": "assistant", "content": text_of(value, name, where)}]
