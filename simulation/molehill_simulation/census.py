"""What every client of a simulation has: rows, classes, and how long its rows are in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from molehill import config
from molehill.tasks.lengths import Examples, Lengths, together
from molehill.tasks.schema import class_counts
from molehill.words import counted
from molehill_simulation.data import ClientRows
from molehill_simulation.few import spread
from molehill_simulation.text import clean

_COLUMNS = 5  # classes that have a column of their own
_NAMED = 3  # classes that are named where they have none


@dataclass(frozen=True)
class Tokens:
    """How long the rows of a client are, in tokens.

    Attributes:
        median: Of all rows.
        most: What 95% of them do not exceed.
        longest: Of the longest row.
        cut: Rows that lose their end.
        lost: Of these, rows without any token of an answer, which are left out.
        unlearnt: Answers that are read and not learnt.
    """

    median: int
    most: int
    longest: int
    cut: int
    lost: int
    unlearnt: int

    @classmethod
    def of(cls, lengths: Lengths) -> Tokens:
        """Those of some rows, of which there is at least one."""
        median, most, longest = (lengths.quantile(part) for part in (0.5, 0.95, 1.0))
        return cls(median, most, longest, lengths.cut, lengths.lost, lengths.unlearnt)


@dataclass(frozen=True)
class ClientFacts:
    """What a client has.

    Attributes:
        client: Its name.
        rows: It trains on.
        held_out: Rows that it is scored on.
        classes: What there is of every class in rows of both kinds; empty where there are no classes.
        tokens: How long its rows are; None where there is no tokenizer to tell.
    """

    client: str
    rows: int
    held_out: int
    classes: Mapping[str, int]
    tokens: Tokens | None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return asdict(self)


def census(
    owners: Sequence[ClientRows], task: config.Task, examples: Sequence[tuple[Examples, Examples]] | None = None
) -> list[ClientFacts]:
    """What every client has.

    Args:
        owners: The clients' rows.
        task: With its labels known.
        examples: The same encoded, to train on and held out; None where there is no tokenizer.
    """
    found = []
    for number, owner in enumerate(owners):
        both = [class_counts(rows, task) for rows in (owner.train, owner.test)]
        classes = {label: sum(counts[label] for counts in both) for label in both[0]}
        tokens = None
        if examples is not None:
            tokens = Tokens.of(together([part.lengths for part in examples[number]]))
        found.append(ClientFacts(owner.name, len(owner.train), len(owner.test), classes, tokens))
    return found


def lacking(clients: Sequence[ClientFacts]) -> str:
    """Classes of which clients have no row, in words; empty where everybody has all."""
    absent: dict[str, int] = {}
    for client in clients:
        for label, count in client.classes.items():
            if not count:
                absent[label] = absent.get(label, 0) + 1
    ranked = sorted(absent.items(), key=lambda item: -item[1])
    told = [f"{clean(label, 40)} at {counted(number, 'client')}" for label, number in ranked[:_COLUMNS]]
    more = len(ranked) - len(told)
    return ", ".join([*told, *([f"and {counted(more, 'more class')}"] if more else [])])


def census_table(clients: Sequence[ClientFacts]) -> Iterator[Table | Text]:
    """A table of clients, or of very many so many from the fewest rows to the most, and then what it leaves out.

    Args:
        clients: At least one.
    """
    ranked = sorted(clients, key=lambda client: client.rows + client.held_out)
    named = {client.client for client in spread(ranked)}
    shown = [client for client in clients if client.client in named]
    labels = list(clients[0].classes)
    apart = labels if len(labels) <= _COLUMNS else []
    long = all(client.tokens is not None for client in clients)
    cut = [client.tokens for client in clients if client.tokens is not None and client.tokens.cut]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("client", overflow="fold")
    heads = ["rows", "held out", *(clean(label, 20) for label in apart)]
    heads += ["tokens: half", "95%", "longest"] if long else []
    heads += ["cut"] if cut else []
    heads += ["lost"] if any(tokens.lost for tokens in cut) else []
    for head in heads:
        table.add_column(Text(head), justify="right")
    if labels and not apart:
        table.add_column("most of", overflow="fold")
    for client in shown:
        cells = [f"{client.rows}", f"{client.held_out}", *(_share(client, label) for label in apart)]
        if client.tokens is not None:
            tokens = client.tokens
            told = [tokens.median, tokens.most, tokens.longest, tokens.cut, tokens.lost]
            cells += map(str, told[: len(heads) - len(cells)])
        if labels and not apart:
            cells.append(_largest(client))
        table.add_row(Text(clean(client.client, 40)), *(Text(cell) for cell in cells))
    yield table
    if len(shown) < len(clients):
        yield Text(
            f"{len(shown)} of {len(clients):,} clients are shown, at equal distances from the fewest rows to the most; "
            "--json has all",
            style="dim",
        )


def _share(client: ClientFacts, label: str) -> str:
    """Of all that classes are counted of: rows, or what of them has classes."""
    return f"{client.classes[label] / max(1, sum(client.classes.values())):.0%}"


def _largest(client: ClientFacts) -> str:
    """The most frequent classes, and how many more there are."""
    ranked = sorted((label for label, count in client.classes.items() if count), key=lambda one: -client.classes[one])
    told = [f"{clean(label, 20)} {_share(client, label)}" for label in ranked[:_NAMED]]
    more = [f"{len(ranked) - _NAMED} more"] if len(ranked) > _NAMED else []
    return ", ".join([*told, *more])
