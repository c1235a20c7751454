"""Rows that a strategy learns from, read on the device; they stay there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molehill.decoding.interfaces import Example
from molehill.decoding.prompts import Message, Prompts
from molehill.errors import DataError
from molehill.rowfiles import pairs
from molehill.rowfiles.messages import plain
from molehill.rowfiles.reading import read_any
from molehill.rowfiles.readings import asked
from molehill_edge import classify, generate, tokens
from molehill_edge import manifest as manifests
from molehill_edge.engine import Engine


def read(engine: Engine, file: Path) -> list[Example]:
    """Rows as the bundle sees them.

    Args:
        engine: Of the bundle.
        file: With ``text`` and perhaps ``label`` for a classifier; for a causal LM with columns that training reads,
            with an answer or without. What is too long loses its end.

    Raises:
        BundleError: A text has no tokens, or the tokenizer fails.
        DataError: The file cannot be read, or a row does not fit.
    """
    found = []
    for where, row in read_any(file):
        columns = {name: str(value) for name, value in row.items() if isinstance(value, str | int | float | bool)}
        ids, answer = _classified(engine, row, where) if engine.prompts is None else _written(engine, row, where)
        found.append(Example(tuple(ids), tuple(answer), columns))
    return found


def _classified(engine: Engine, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    task = engine.manifest.task
    (ids,) = classify.encode(engine.tokenizer, [pairs.of_row(row, where)], task.max_length, truncate=True)
    reading, about = manifests.reading(task), manifests.about(task)
    if not reading.several:
        raise DataError(f"strategies learn from classes and answers, and this is for {task.kind}", where=where)
    label = row.get(reading.column)
    return ids, [] if label is None else [reading.target(label, about, where)]


def _written(engine: Engine, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    prompts, task = engine.prompts, engine.manifest.task
    assert prompts is not None
    form = asked(row, where)
    if "text" in form:
        return generate.encode(engine.tokenizer, form["text"], special=True)[: task.max_length], []
    if form["tools"] is not None:
        raise DataError("a bundle does not know tools", where=where, mend="Leave the row out.")
    if "messages" not in form:
        text, about, answer = form["instruction"], form["input"], form["output"].strip()
        if prompts.special:  # Alpaca's format has a place of its own for what it is about
            return _cut(engine, prompts, prompts.single(text, about), answer, [], where)
        turns: list[Message] = [{"role": "user", "content": f"{text}\n\n{about}".strip()}]
        return _cut(engine, prompts, prompts.before_answer(turns), answer, turns, where)
    turns = plain(form["messages"], where)
    answer = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
    if not turns:
        raise DataError("nothing is asked", where=where, mend="Begin the messages with one of the user.")
    return _cut(engine, prompts, prompts.before_answer(turns), answer.strip(), turns, where)


def _cut(
    engine: Engine, prompts: Prompts, before: str, answer: str, turns: list[Message], where: str
) -> tuple[list[int], list[int]]:
    """Ids before an answer, and those of the answer with what ends it, as training learns them."""
    most, generation = engine.manifest.task.max_length, engine.manifest.task.generation
    if not answer:
        return generate.encode(engine.tokenizer, before, special=prompts.special)[:most], []
    whole = prompts.answered(turns, answer) if turns else ""
    if not whole.startswith(before + answer):
        whole = before + answer
    encoded = tokens.encode(engine.tokenizer, whole, special=prompts.special)
    begin, end = len(before), len(before) + len(answer)
    # A token may hold the space before the answer too; special ones that the tokenizer writes are at the empty (0, 0).
    learnt = [i for i, (at, to) in enumerate(encoded.offsets) if to > at and at < end and to > begin]
    if not learnt or learnt[0] >= most:
        raise DataError("no token of the answer fits", where=where, mend="Shorten the row.")
    first, last = learnt[0], learnt[-1] + 1
    said = list(encoded.ids[first:last])
    ending = encoded.ids[last : last + 1]
    if encoded.offsets[last : last + 1] != [(0, 0)] and ending and ending[0] in generation.eos:
        said += ending
    elif (closing := engine.tokenizer.token_to_id(generation.eos_token)) is not None:
        said.append(closing)
    return list(encoded.ids[:first]), said[: most - first]
