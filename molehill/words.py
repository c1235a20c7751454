"""Words and figures of sentences for people. Standard library only: devices import it (docs/adr/0006)."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun, for example ``1 round`` or ``2 rounds``."""
    return f"{number} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Several of a noun, for example ``rounds`` or ``biases``."""
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def figure(value: float | None) -> str:
    """A share with three decimals, or a dash for one that was not measured."""
    return "-" if value is None else f"{value:.3f}"


def short_figure(value: float | None) -> str:
    """The same in four characters, such as ``.712``."""
    if value is None:
        return "   -"
    return f"{value:.2f}" if abs(value) >= 0.9995 else f"{value:.3f}".replace("0.", ".", 1)


def nats(value: float | None) -> str:
    """A loss with three decimals, or a dash for one that was not measured."""
    return amount(value) if value is None or value >= 1000 else f"{value:.3f}"


def amount(value: float | None) -> str:
    """A perplexity in at most seven characters, or a dash for one that was not measured."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"
