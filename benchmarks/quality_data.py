"""The data of the quality study, written from `sample:reviews` by stated rules.

Every task is a file of rows with a column that says whose they are. Sentences of one document, and rows that differ in
case or punctuation alone, are never of both sides: Molehill sees to that.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from molehill.tasks.rows import GROUP
from molehill.tasks.samples import read_sample

Row = dict[str, Any]
CLASSES = ("negative", "neutral", "positive")
FIRM = ("weak", "clear", "strong")


def _sample() -> Iterator[Row]:
    rows = read_sample("sample:reviews")
    for text, label, rating, domain, group in zip(
        rows["text"], rows["label"], rows["rating"], rows["domain"], rows.columns[GROUP], strict=True
    ):
        yield {"text": text, "label": label, "rating": rating, "domain": domain, "group": group}


def _share(text: str, of: int) -> int:
    """A number below ``of`` that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % of


def reviews() -> Iterator[Row]:
    """Feature shift: four kinds of text, two owners each."""
    for row in _sample():
        yield row | {"owner": f"{row['domain']}-{1 + _share(str(row['group']), 2)}"}


def skew() -> Iterator[Row]:
    """Label skew: all kinds of text mixed; the configuration deals them by a Dirichlet distribution over labels."""
    yield from _sample()


def disagreement() -> Iterator[Row]:
    """Six owners with all kinds of text, and three opinions on what the three labels mean, two owners each.

    ``polarity``: the rating's sign, neutral within 0.5 of 0. ``strict``: negative from -0.1 down, positive from 1.6 up.
    ``strength``: how strong the feeling is, whichever it is: below 0.6, below 1.7, or more. All use the labels 0, 1, 2.
    """
    opinions: dict[str, Callable[[float], int]] = {
        "polarity": lambda rating: bisect_right((-0.4999, 0.4999), rating),
        "strict": lambda rating: bisect_right((-0.1, 1.6), rating),
        "strength": lambda rating: bisect_right((0.6, 1.7), abs(rating)),
    }
    for row in _sample():
        number = _share(str(row["group"]), 6)
        opinion = list(opinions)[number % 3]
        label = f"class {opinions[opinion](float(row['rating']))}"
        yield row | {"owner": f"{opinion}-{1 + number // 3}", "label": label}


def apart() -> Iterator[Row]:
    """Half of the documents, which no row of `answers` is from: the base is trained on them."""
    yield from (row for row in _sample() if _share(f"apart {row['group']}", 2))


def answers() -> Iterator[Row]:
    """The owners of `reviews` with instructions that a language model answers: how strong a feeling, and which.

    Of the documents that `apart` leaves.
    """
    for row in reviews():
        if _share(f"apart {row['group']}", 2):
            continue
        firm = FIRM[bisect_right((0.6, 1.7), abs(float(row["rating"])))]
        yield {
            "instruction": row["text"],
            "output": f"{firm} {row['label']}",
            **{name: row[name] for name in ("owner", "group", "domain")},
        }


def write(rows: Iterator[Row], path: Path) -> Path:
    """Write rows as JSON lines, unless they are there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        scratch.rename(path)
    return path
