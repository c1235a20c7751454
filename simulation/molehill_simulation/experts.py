"""Experts in words: what their kind calls them, how many, how large."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from molehill import registry
from molehill.errors import ConfigError
from molehill.words import plural

Some = tuple[str, Iterable[int], Iterable[int]]  # what they are, how many by site, and their ranks


def planned(kind: str, routed: int, always: int, rank: int, allocation: str = "") -> str:
    """The experts of a configuration, before an allocation has seen the sites.

    Args:
        kind: Their kind; one that is not installed here is no error.
        routed: How many are routed.
        always: How many are always on.
        rank: Of each.
        allocation: What deals them to the sites; empty where every site gets as many.
    """
    try:
        method = registry.get("expert", kind)
        noun, size = (registry.declared(method, name) for name in ("noun", "size"))
    except ConfigError:
        noun, size = "expert", "rank"
    some = [("routed", [routed], [rank]), ("always-on", [always] if always else [], [rank])]
    text = in_words(noun, size, some, lone=routed == 1 and not always)
    return f"{text} before {allocation}" if allocation else text


def in_words(noun: str, size: str, some: Sequence[Some], *, lone: bool) -> str:
    """Experts such as ``2 to 6 routed LoRAs of rank 8 and 1 always-on of rank 16``.

    Args:
        noun: What one is called.
        size: What its rank is called; empty where it has none.
        some: The experts; those of which there are none are left out.
        lone: There is one at every site, and no router.
    """
    said: list[str] = []
    for what, counts, ranks in some:
        number = spread(counts)
        if number:
            called = "" if said else f" {noun if number == '1' else plural(noun)}"
            text = f"one {noun}" if lone else f"{number} {what}{called}"
            said.append(f"{text} of {size} {spread(ranks)}" if size else text)
    return " and ".join(said)


def spread(values: Iterable[int]) -> str:
    """The least and the largest, such as ``2 to 6``; empty for none."""
    found = sorted(set(values))
    return f"{found[0]} to {found[-1]}" if len(found) > 1 else "".join(map(str, found))
