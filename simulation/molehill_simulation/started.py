"""A first configuration for rows that somebody has: commented, and one that `molehill check` takes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from molehill import config
from molehill.errors import DataError
from molehill.rowfiles import preferences, readings
from molehill.rowfiles.readings import whole
from molehill.rowfiles.values import BETWEEN, label_of, names_of, number_of
from molehill.tasks.kind import kind_of
from molehill.tasks.rows import Rows
from molehill.tasks.schema import load_rows
from molehill.tasks.sources import read_rows
from molehill.words import counted
from molehill_simulation.data import deal

_TEXT = ("text", "sentence", "review", "content", "body", "comment")
_LABEL = ("label", "labels", "class", "category", "sentiment", "target", "stars", "score", "similarity_score")
_PAIRS = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")),
    *(("question1", "question2"), ("text1", "text2"), ("text_a", "text_b")),
)
_ASKED = {"instruction": ("instruction", "prompt", "question", "query"), "output": ("output", "response", "answer")}
_TAGGED = {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "pos_tags")}
_OWNERS = ("owner", "client", "site", "hospital", "user", "domain", "shop", "author", "source")
_MOST = 50  # classes, and owners; what has more values is text


@dataclass(frozen=True)
class Answers:
    """What a first configuration has to know.

    Attributes:
        source: The rows.
        kind: What is learnt.
        columns: Columns of the rows, ours to theirs, where the names differ.
        owners: Column by whose values rows belong to owners; empty to deal them at random.
        clients: How many owners.
        base: The base model.
        name: Of the run.
    """

    source: str
    kind: str
    columns: dict[str, str]
    owners: str
    clients: int
    base: str
    name: str


def guess(source: str, kind: str | None = None) -> tuple[Answers, list[str]]:
    """What rows look like.

    Args:
        source: As of ``data.source``.
        kind: What is to be learnt, where that is known.

    Returns:
        The likely answers, and sentences that say what they rest on.

    Raises:
        ConfigError: There is no such kind.
        DataError: The rows cannot be read, or have nothing to learn from.
    """
    if kind is not None:
        kind_of(kind)  # or an error names those that there are
    rows = read_rows(source)
    names, why = list(rows.columns), []
    text, label, shapes = _first(_TEXT, names), _first(_LABEL, names), whole(names)
    pair = _pair(names) if label else []
    text = pair[0] if pair else text
    if kind is None:
        pairs = {*preferences.COLUMNS[1:]} <= {*names}
        kind = "preference" if pairs else _of_labels(rows, label) if text and label and not shapes else "causal-lm"
        kind = "token-classification" if len(_among(_TAGGED, names)) == len(_TAGGED) and not shapes else kind
    columns: dict[str, str] = {}
    if "text" in kind_of(kind).required:
        ours = kind_of(kind).required[-1]
        if not text or not label:
            lacks = "text" if not text else ours
            raise DataError(
                f"none of the columns looks like a {lacks}", where=source,
                mend=f"There are {', '.join(names)}. Rename one, or write data.columns yourself.",
            )  # fmt: skip
        read = {"text": text, **({"text_pair": pair[1]} if pair else {}), ours: label}
        columns = {ours: theirs for ours, theirs in read.items() if ours != theirs}
        why += _labels(rows, kind, label, [*read.values()])
    else:
        columns, said = _of_words(names) if kind_of(kind).spans else _written(names, kind, text)
        why += [f"{len(rows)} {said[0]}", *said[1:]] if said else []
        if not said:
            like, called = "questions and answers, or like a text", "instruction and output, messages, or text"
            if kind_of(kind).spans:
                like, called = "words and their tags", "tokens and tags"
            raise DataError(
                f"none of the columns looks like {like}", where=source,
                mend=f"There are {', '.join(names)}. Name them {called}.",
            )  # fmt: skip
    owners, clients = _owners(
        rows, {text, label, *pair, *_among(_ASKED, names).values(), *readings.COLUMNS, *preferences.COLUMNS}
    )
    if owners:
        why.append(f"{clients} owners, the values of the column {owners!r}")
    else:
        why.append("no column looks like owners: rows are dealt at random")
    base = "sentence-transformers/all-MiniLM-L6-v2" if kind_of(kind).head else "HuggingFaceTB/SmolLM2-135M"
    return Answers(source, kind, columns, owners, clients, base, _name(source)), why


def _of_labels(rows: Rows, label: str) -> str:
    """What labels look like: lists of names, numbers with a fraction, or classes."""
    values = [value for value in rows[label] if value is not None]
    if any(isinstance(value, list) or (label.casefold() == "labels" and BETWEEN in str(value)) for value in values):
        return "multi-label"
    numbers = [_number(value) for value in values]
    broken = any(number is not None and not number.is_integer() for number in numbers)
    return "regression" if broken and None not in numbers else "classification"


def _number(value: Any) -> float | None:
    try:
        return number_of(value, "")
    except DataError:
        return None


def _labels(rows: Rows, kind: str, label: str, read: Sequence[str]) -> list[str]:
    """What the labels of rows are, in sentences."""
    predicts, there = kind_of(kind).predicts, list(zip(rows[label], rows.where, strict=True))
    if predicts == "number":
        numbers = [number_of(value, where) for value, where in there]
        return [f"{len(rows)} rows with numbers from {min(numbers):g} to {max(numbers):g}, from {_columns(read)}"]
    if predicts == "flags":
        names = {name for value, where in there for name in names_of(value, where)}
        return [f"{len(rows)} rows with any of {counted(len(names), 'label')}, from {_columns(read)}"]
    classes = {label_of(value, where) for value, where in there}
    said = [f"{len(rows)} rows of {len(classes)} classes, from {_columns(read)}"]
    if len(classes) > _MOST:
        said.insert(0, f"{label!r} has {len(classes)} different values, which is many for classes")
    return said


def workable(said: Answers, *, fixed: bool = False) -> tuple[Answers, list[str]]:
    """Answers by which every owner has rows to train on and rows held out.

    Args:
        said: The answers.
        fixed: Owners and their number are somebody's wish, so no others will do.

    Returns:
        These answers, or others with fewer owners, dealt at random; and sentences that say so.

    Raises:
        DataError: The rows do not fit the task, or cannot be dealt so.
    """
    run = config.parse(tomllib.loads(written(said)))
    rows, _ = load_rows(run.data, run.task)
    fewer = [] if fixed else [replace(said, owners="", clients=count) for count in range(said.clients, 0, -1)]
    problem: DataError | None = None
    for tried in (said, *fewer):
        data = config.parse(tomllib.loads(written(tried))).data
        try:
            deal(data, rows, run.run.seed)
        except DataError as error:
            problem = problem or error
            continue
        if problem is None:
            return tried, []
        return tried, [f"{problem.what}, so rows are dealt at random to {counted(tried.clients, 'owner')}"]
    assert problem is not None  # or one of them would have been returned
    raise problem


def _written(names: Sequence[str], kind: str, text: str) -> tuple[dict[str, str], list[str]]:
    """Columns that a language model learns from, ours to theirs where the names differ, and what they are in words.

    The first sentence begins after the number of the rows; there are none where nothing looks like it.
    """
    if kind_of(kind).predicts == "pair":
        two = preferences.COLUMNS[1:]
        return {}, [f"questions with a better and a worse answer, from {_columns(two)}"] if {*two} <= {*names} else []
    shapes, asked = whole(names), _among(_ASKED, names)
    if shapes:
        said = [f"rows of questions with answers, from {_columns(shapes[0].columns)}"]
        if len(shapes) == 1:
            return {}, said
        said.append(f"they could be read from {_columns(shapes[1].columns)} as well: data.columns says which")
        return {name: name for name in shapes[0].columns}, said
    if len(asked) == len(_ASKED):
        columns = {ours: theirs for ours, theirs in asked.items() if ours != theirs}
        return columns, [f"questions with answers, from {_columns(asked.values())}"]
    if text and not asked:
        columns = {"text": text} if text != "text" else {}
        return columns, [f"texts, to be learnt as they are, from {_columns([text])}"]
    return {}, []


def _of_words(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The same of words with tags."""
    tagged = _among(_TAGGED, names)
    if len(tagged) < len(_TAGGED):
        return {}, []
    columns = {ours: theirs for ours, theirs in tagged.items() if ours != theirs}
    return columns, [f"rows of words with a tag each, from {_columns(tagged.values())}"]


def _among(wanted: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, str]:
    return {ours: found for ours, near in wanted.items() if (found := _first(near, names))}


# As in the demo, see docs/reference/results.md.
_LEANING = """\
alpha = 64.0                       # how strong an expert is: alpha / rank
scorer = "leaning"                 # what a token says, and what its owner leans on
init = "alike"                     # experts are one until owners lean
"""
_RATES = """\
router_lr = 3e-4
head_lr = 8e-3
schedule = "linear"
"""


def written(said: Answers) -> str:
    """The configuration as TOML with comments.

    Raises:
        ConfigError: It would be none that can be run.
    """
    classes = kind_of(said.kind).head is not None
    partition = f'{{ name = "by_column", column = {_toml(said.owners)} }}' if said.owners else '"iid"'
    columns = ", ".join(f"{ours} = {_toml(theirs)}" for ours, theirs in said.columns.items())
    shape, rates = (_LEANING, _RATES) if classes else ("", "")
    assign = 'assign = "clusters"                # who leans on which experts, after two rounds\n' if classes else ""
    convex = 'head = "convex"                    # and the head that is best for its rows, found after the rounds\n'
    head = "" if not classes else convex if kind_of(said.kind).convex else 'head = "anchored"\n'
    lines = f"""\
# Look at what this comes to: molehill check FILE      Run it: molehill simulate FILE --out runs/{said.name}
# Every key: docs/reference/config.md; what can be named: molehill methods

[run]
name = {_toml(said.name)}
rounds = 8                         # how often experts are merged

[base]
model = {_toml(said.base)}  # any Hugging Face model of this kind, or a folder

[task]
kind = {_toml(said.kind)}
max_length = {64 if classes else 512}{" " * (19 if classes else 18)}# tokens; `molehill check` says what is cut

[data]
source = {_toml(said.source)}
{f"columns = {{ {columns} }}  # your names of the columns" + chr(10) if columns else ""}\
clients = {said.clients}
partition = {partition}  # whose rows are whose

[molora]
targets = "all-linear"             # the linears that get experts
experts = 4
rank = 8
scope = "layer"                    # one router for all linears of a layer
{shape}selector = {'"dense"' if classes else '{ name = "top_k", k = 2 }'}

[personal]
gate = "anchored"                  # every owner's own gate is what all share and a residual of its own
{head}\

[train]
steps = {12 if classes else 20}                         # of every owner in every round
batch_size = {16 if classes else 4}
lr = {"2e-3" if classes else "5e-4"}
{rates}\

[federation]
preset = "fedit"                   # how experts are merged: molehill methods federation
{assign}\

[wire]
up = "int8"                        # bits of what leaves an owner
"""
    config.parse(tomllib.loads(lines))
    return lines


def _owners(rows: Rows, taken: set[str]) -> tuple[str, int]:
    """A column that says whose rows are whose, and how many they are."""
    name = _first(_OWNERS, [each for each in rows.columns if each not in taken])
    if not name or any(value is None for value in rows[name]):
        return "", 4
    values = {str(value) for value in rows[name]}
    return (name, len(values)) if 1 < len(values) <= _MOST else ("", 4)


def _columns(names: Iterable[str]) -> str:
    found = [*names]
    return f"the column{'s' * (len(found) > 1)} {' and '.join(map(repr, found))}"


def _first(wanted: Sequence[str], there: Sequence[str]) -> str:
    plain = {name.casefold().strip(): name for name in there}
    return next((plain[name] for name in wanted if name in plain), "")


def _pair(names: Sequence[str]) -> list[str]:
    """Two columns that look like the texts of pairs; none where there are none."""
    found = ([_first([name], names) for name in pair] for pair in _PAIRS)
    return next((pair for pair in found if all(pair)), [])


def _name(source: str) -> str:
    stem = source.replace("\\", "/").rstrip("/").rpartition("/")[2].partition(".")[0]
    return "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "-" for char in stem) or "run"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings are JSON's
