"""Names of classes: which occur in the rows, and what is wrong with one."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molehill.characters import alike
from molehill.errors import DataError
from molehill.rowfiles.values import label_of
from molehill.words import counted

_NOTHING = {
    *("nan", "na", "n/a", "#n/a", "<na>", "nat", "nil", "none", "null", "undefined", "-", "--", "?", ".", "#value!"),
    *("#ref!", "#div/0!", "#name?"),
}  # as `alike` writes them


def derive(values: Iterable[tuple[Any, str]], source: str) -> tuple[str, ...]:
    """Labels that occur, sorted: by value when all are whole numbers, else as text.

    Args:
        values: Every label as it was read, and where.
        source: What was read, for errors that concern all rows.

    Raises:
        DataError: A label has the wrong type or is a word for nothing, two are nearly equal, some are truth and others
            not, or there are fewer than two.
    """
    pairs = list(values)
    truth = [isinstance(value, bool) for value, _ in pairs]
    if any(truth) and not all(truth):
        what = "this label is true or false and those of other rows are not"
        raise DataError(what, where=pairs[truth.index(True)][1], mend="Write all labels alike, or list task.labels.")
    found: dict[str, list[str]] = {}  # places, by label
    for value, where in pairs:
        found.setdefault(label_of(value, where), []).append(where)
    if len(found) < 2:
        what = f"every row has the label {next(iter(found))!r}" if found else "no row has a label"
        raise DataError(what, where=source, mend="Give rows of two classes.")
    _require_apart(found)
    return in_order(set(found))


def known(value: Any, labels: Sequence[str], where: str) -> str:
    """A label as it was read, as text.

    Args:
        value: The label.
        labels: Those that there are.
        where: Its row.

    Raises:
        DataError: It is none of them.
    """
    label = label_of(value, where)
    if label not in labels:
        folded = {known.casefold(): known for known in labels}
        near = difflib.get_close_matches(label.casefold().strip(), folded, n=1)
        hint = f"Did you mean {folded[near[0]]!r}? " if near else ""
        what = f"label {label!r:.60} is not in task.labels ({', '.join(labels)})"
        raise DataError(what, where=where, mend=f"{hint}Mend the row, or add the label to task.labels.")
    return label


def in_order(names: set[str]) -> tuple[str, ...]:
    """Sorted: by value when all are whole numbers, else as text."""
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


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
