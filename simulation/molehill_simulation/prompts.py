"""What rows ask: a text, a question with what it is about, or a conversation up to its last answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from molehill.config import Data
from molehill.decoding.interfaces import Example
from molehill.errors import DataError
from molehill.rowfiles.readings import asked
from molehill.tasks.batches import IGNORE
from molehill.tasks.kind import make_task
from molehill.tasks.schema import load_rows
from molehill_simulation.source import Source


class Encoder(Protocol):
    """What makes ids of a prompt."""

    def encode(self, prompt: str, *, about: str = "", raw: bool = False) -> list[int]:
        """Ids of an instruction, or of a text as it is."""
        ...

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, where: str = "") -> list[int]:
        """Ids of a conversation."""
        ...


def prompt_of(encoder: Encoder, row: Mapping[str, Any], where: str, *, raw: bool) -> tuple[str, list[int]]:
    """The text that a row asks, and its ids.

    Args:
        encoder: Of a model that writes text.
        row: With columns that training reads; an answer may be there or not.
        where: Its place.
        raw: Take a text as it is.

    Raises:
        AnswerError: It has no tokens, or the chat template refuses it.
        DataError: It has none of these, or something that a prompt cannot show.
    """
    form = asked(row, where)
    if "text" in form:
        return form["text"], encoder.encode(form["text"], raw=raw)
    tools = form["tools"]
    if "messages" not in form:
        text, about = form["instruction"], form["input"]
        both = f"{text}\n\n{about}".strip()
        if tools is not None:
            return both, encoder.encode_messages([{"role": "user", "content": both}], tools, where)
        return both, encoder.encode(text, about=about)
    said = list(form["messages"])
    while said and said[-1]["role"] == "assistant":
        said.pop()
    if not said:
        raise DataError("nothing is asked", where=where, mend="End the messages with one of the user.")
    return said[-1]["content"], encoder.encode_messages(said, tools, where)


def examples_of(source: Source, file: Path) -> list[Example]:
    """Rows with labels or answers, as strategies learn from them.

    Args:
        source: The run or adapter, whose task says what rows hold.
        file: The rows.

    Raises:
        DataError: The file cannot be read, or a row does not fit.
    """
    rows, task = load_rows(Data(source=str(file)), source.task)
    made, found = make_task(task, source.tokenizer), []
    for i, (where, row) in enumerate(rows.records()):
        encoded = list(made.encode(rows.take([i])))
        if not encoded:
            raise DataError("no token of the answer fits", where=where, mend="Shorten the row.")
        ids, labels = encoded[0].input_ids, encoded[0].labels
        columns = {name: str(value) for name, value in row.items() if isinstance(value, str | int | float | bool)}
        if isinstance(labels, int):
            found.append(Example(tuple(ids), (labels,), columns))
            continue
        if not isinstance(labels, list):
            what = f"strategies learn from classes and answers, and this is a {source.task.kind}"
            raise DataError(what, where=where, mend="Use another strategy.")
        if IGNORE not in labels:  # a text, which answers nothing and does not end here
            found.append(Example(tuple(ids[: len(ids) - (ids[-1] == source.tokenizer.eos_token_id)]), (), columns))
            continue
        end = max(n for n, label in enumerate(labels) if label != IGNORE) + 1  # the last answer of a conversation
        begin = next((n + 1 for n in reversed(range(end)) if labels[n] == IGNORE), 0)
        found.append(Example(tuple(ids[:begin]), tuple(labels[begin:end]), columns))
    return found
