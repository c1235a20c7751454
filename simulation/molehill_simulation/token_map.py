"""Where every client's tokens went: its share for each routed expert, against what an even share would be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from molehill_simulation.summary import Event, evaluations_of, rounds_of
from molehill_simulation.text import by_name, natural


@dataclass(frozen=True)
class Cell:
    """One client's share for one expert.

    Attributes:
        share: Of the client's tokens, in [0, 1].
        off: By how much that is more than an even share; negative where it is less.
        deep: Depth of the colour, in [0, 1]: 0 for an even share, 1 for none at all or for the largest of the map.
    """

    share: float
    off: float
    deep: float

    @property
    def points(self) -> str:
        """The deviation in percentage points, such as ``+2.7``."""
        text = f"{100 * self.off:+.1f}"
        return "±0" if text in {"+0.0", "-0.0"} else text.replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class TokenMap:
    """The shares of clients and experts.

    Attributes:
        experts: Routed experts, at least two.
        shared: Experts that are always on.
        even: What each of ``experts`` would get, were tokens dealt alike to all experts of every site.
        rows: Of every client, one cell for each of ``experts``.
        most: The deviation above an even share that has the deepest colour.
        held_out: Whether the tokens are of held-out rows, or of those that were trained on.
    """

    experts: tuple[str, ...]
    shared: tuple[str, ...]
    even: tuple[float, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    most: float
    held_out: bool

    @property
    def alike(self) -> bool:
        """Whether an even share is the same for all experts: all of them are at every site."""
        return max(self.even) - min(self.even) < 1e-9


def token_map(
    events: Sequence[Event], named: Collection[str], sites: Mapping[str, Collection[str]] | None = None
) -> TokenMap | None:
    """The map of a run; None where nothing was routed.

    Args:
        events: Of the run.
        named: Clients that are shown.
        sites: Where each expert is; None where it is not known, and taken to be everywhere.
    """
    tokens = {client: evaluation["tokens"] for client, evaluation in evaluations_of(events).items()}
    held_out = any(tokens.values())
    if not held_out:
        for event in rounds_of(events):
            for client, counts in event["tokens"].items():
                known = tokens.setdefault(client, {})
                tokens[client] = {e: known.get(e, 0) + counts.get(e, 0) for e in {**known, **counts}}
    names = {expert for counts in tokens.values() for expert in counts}
    shared = sorted((name for name in names if name.startswith("shared")), key=natural)
    routed = sorted(names - set(shared), key=natural)
    if len(routed) < 2:
        return None
    even = _even(routed, sites or {})
    shares: list[tuple[str, list[float]]] = []
    for client, counts in by_name(tokens):
        total = sum(counts.get(expert, 0) for expert in routed)
        if total and client in named:
            shares.append((client, [counts.get(expert, 0) / total for expert in routed]))
    # A map of small deviations is pale: the colours go at least as far up as they go down.
    above = [share - part for _, row in shares for share, part in zip(row, even, strict=True)]
    most = max([max(even), *above])
    rows = tuple((client, tuple(_cell(*pair, most) for pair in zip(row, even, strict=True))) for client, row in shares)
    return TokenMap(tuple(routed), tuple(shared), tuple(even), rows, most, held_out)


def _cell(share: float, even: float, most: float) -> Cell:
    off = share - even
    return Cell(share, off, off / most if off > 0 else -off / even)


def _even(routed: Sequence[str], sites: Mapping[str, Collection[str]]) -> list[float]:
    """The share of each expert, were tokens dealt alike at every site; sites see as many tokens each."""
    places = {site for expert in routed for site in sites.get(expert, ())}
    if not places:
        return [1 / len(routed)] * len(routed)
    beside = {site: sum(site in sites.get(expert, ()) for expert in routed) for site in places}
    even = [sum(1 / beside[site] for site in sites.get(expert, ())) / len(places) for expert in routed]
    return even if all(even) else [1 / len(routed)] * len(routed)
