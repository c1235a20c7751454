"""Words of sentences for people. Standard library only: devices import it (docs/adr/0006)."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun, for example ``1 round`` or ``2 rounds``."""
    return f"{number} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Several of a noun, for example ``rounds`` or ``biases``."""
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"
