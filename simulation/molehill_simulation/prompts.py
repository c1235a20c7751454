"""What rows ask: a text, an instruction with what it is about, or a conversation up to its last answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from molehill.config import Data
from molehill.decoding.interfaces import Example
from molehill.errors import DataError
from molehill.rowfiles.values import text_of
from molehill.tasks.batches import IGNORE
from molehill.tasks.schema import load_rows
from molehill.tasks.task import make_task
from molehill_simulation.source import Source


class Encoder(Protocol):
    """What makes ids of a prompt."""

    def encode(self, prompt: str, *, about: str = "", raw: bool = False) -> list[int]:
        """Ids of an instruction, or of a text as it is."""
        ...

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation."""
        ...


def prompt_of(encoder: Encoder, row: Mapping[str, Any], where: str, *, raw: bool) -> tuple[str, list[int]]:
    """The text that a row asks, and its ids.

    Args:
        encoder: Of a model that writes text.
        row: With ``text``, ``instruction`` (and ``input``) or ``messages``.
        where: Its place.
        raw: Take a text as it is.

    Raises:
        AnswerError: It has no tokens, or the chat template refuses it.
        DataError: It has none of these.
    """
    if row.get("messages"):
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise DataError("'messages' must be a list of messages", where=where)
        said = [
            {"role": str(turn.get("role")), "content": text_of(turn.get("content"), "content", where)} for turn in turns
        ]
        while said and said[-1]["role"] == "assistant":
            said.pop()
        if not said:
            raise DataError("nothing is asked", where=where, mend="End the messages with one of the user.")
        return said[-1]["content"], encoder.encode_messages(said)
    if row.get("instruction"):
        text, about = text_of(row["instruction"], "instruction", where), str(row.get("input") or "")
        return f"{text}\n\n{about}".strip(), encoder.encode(text, about=about)
    if "text" in row:
        text = text_of(row["text"], "text", where)
        return text, encoder.encode(text, raw=raw)
    mend = f"Columns there: {', '.join(row)}."
    raise DataError("the row has neither 'text', 'instruction' nor 'messages'", where=where, mend=mend)


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
        end = max(n for n, label in enumerate(labels) if label != IGNORE) + 1  # the last answer of a conversation
        begin = next((n + 1 for n in reversed(range(end)) if labels[n] == IGNORE), 0)
        found.append(Example(tuple(ids[:begin]), tuple(labels[begin:end]), columns))
    return found
