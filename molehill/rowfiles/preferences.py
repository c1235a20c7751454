"""Rows with two answers to one question, in the shapes that people have.

``chosen`` and ``rejected`` are texts or lists of messages; ``prompt`` is a text or a list of messages, and may be left
out where both answers are whole conversations: what they begin with together is the prompt then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molehill.errors import DataError
from molehill.rowfiles.messages import as_list, messages_of
from molehill.rowfiles.readings import PROMPTED, TOOLS, form_of

PROMPT, CHOSEN, REJECTED = COLUMNS = ("prompt", "chosen", "rejected")


def pair_of(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen and the rejected answer to a question, each with it in the form of `readings.form_of`.

    Args:
        row: Its columns.
        where: Place of the row.

    Raises:
        DataError: Something is missing, of the wrong type, empty or unknown; both answers are the same, or they answer
            different questions.
    """
    prompt, chosen, rejected = parts_of(row, where)
    pair = tuple(
        form_of({PROMPT: prompt, "completion": answer, TOOLS: row.get(TOOLS)}, PROMPTED, where, name=name)
        for name, answer in ((CHOSEN, chosen), (REJECTED, rejected))
    )
    if pair[0] == pair[1]:
        what = f"{CHOSEN!r} and {REJECTED!r} are the same, so the row prefers nothing"
        raise DataError(what, where=where, mend="Remove the row.")
    return pair[0], pair[1]


def parts_of(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """The prompt of a row and what answers it: texts, or lists of messages.

    Args:
        row: Its columns.
        where: Place of the row.

    Raises:
        DataError: The prompt is missing, or the answers do not answer it.
    """
    prompt, chosen, rejected = (as_list(row.get(name), name, where) for name in COLUMNS)
    if isinstance(chosen, list) is not isinstance(rejected, list):
        what = f"of {CHOSEN!r} and {REJECTED!r} one is a text and the other a list of messages"
        raise DataError(what, where=where, mend="Write both alike.")
    if isinstance(chosen, list):
        return _apart(prompt, chosen, rejected, where)
    if prompt is None or prompt in ("", []):
        raise DataError(f"the row has no {PROMPT!r}", where=where, mend="Fill it in, or remove the row.")
    return prompt, chosen, rejected


def _apart(prompt: Any, chosen: list[Any], rejected: list[Any], where: str) -> tuple[Any, list[Any], list[Any]]:
    """What is asked, and what follows, of conversations that may begin with the prompt."""
    ours, theirs = messages_of(chosen, CHOSEN, where), messages_of(rejected, REJECTED, where)
    if ours[0]["role"] == "assistant" and theirs[0]["role"] == "assistant":
        if prompt is None or prompt in ("", []):
            what = f"the row has no {PROMPT!r}, and both answers begin with one"
            raise DataError(what, where=where, mend="Fill it in, or write whole conversations.")
        return prompt, chosen, rejected
    common = 0
    while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
        common += 1
    before = ours[:common]
    while before and before[-1]["role"] == "assistant":
        before.pop()
    asked = prompt if isinstance(prompt, list) else None
    said = prompt if isinstance(prompt, str) else None
    fits = asked is None or messages_of(asked, PROMPT, where) == before
    fits = fits and (said is None or said == "" or (bool(before) and before[-1]["content"] == said))
    if not before or not fits:
        what = f"{CHOSEN!r} and {REJECTED!r} do not begin with one and the same {PROMPT!r}"
        raise DataError(what, where=where, mend="Write one prompt, and two answers to it.")
    return chosen[: len(before)], chosen[len(before) :], rejected[len(before) :]
