"""Geometry of the report's charts, in percent of the plot: the template draws, the page's own text labels the axes.

Axis labels are HTML beside the drawing, so they keep their size when a chart is stretched to a narrow screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis.

    Attributes:
        at: Percent of the axis, from the left or from the bottom.
        label: What stands there.
    """

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: What it shows.
        style: CSS class.
        points: ``(x, y)`` in percent, y downwards as in SVG.
    """

    name: str
    style: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Bar:
    """One upright bar.

    Attributes:
        title: What it shows, with its value.
        style: CSS class.
        x: Left edge in percent.
        width: Width in percent.
        height: Height in percent.
    """

    title: str
    style: str
    x: float
    width: float
    height: float


@dataclass(frozen=True)
class Whisker:
    """A value with its interval, on a line of its own.

    Attributes:
        name: Whose it is.
        at: Where the value is, in percent from the left.
        low: Where the interval begins.
        high: Where it ends.
        sign: 1 or -1 when all of it is above or below 0; else 0.
        text: Both, written.
    """

    name: str
    at: float
    low: float
    high: float
    sign: int
    text: str


@dataclass(frozen=True)
class Whiskers:
    """Values around 0, one below the other.

    Attributes:
        zero: Where 0 is, in percent from the left.
        x: Ticks of the axis.
        lines: The values.
    """

    zero: float
    x: tuple[Tick, ...]
    lines: tuple[Whisker, ...]


@dataclass(frozen=True)
class Plot:
    """A chart over rounds.

    Attributes:
        x: Ticks of the horizontal axis.
        y: Ticks of the vertical axis.
        lines: Curves, the last one on top.
        bars: Bars.
    """

    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()


def nice_step(span: float, parts: int = 4) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that covers ``span`` in at most ``parts`` steps."""
    raw = span / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next((power * m for m in (1, 2, 2.5, 5) if power * m >= raw * (1 - 1e-9)), power * 10)


def _y_ticks(low: float, high: float, label: Callable[[float], str]) -> tuple[float, float, tuple[Tick, ...]]:
    step = nice_step(high - low if high > low else abs(high) or 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = tuple(Tick(100 * (i - first) / (last - first), label(i * step)) for i in range(first, last + 1))
    return first * step, last * step, ticks


def _x_ticks(rounds: Sequence[int], place: Callable[[int], float], most: int = 8) -> tuple[Tick, ...]:
    stride = math.ceil(len(rounds) / most)
    return tuple(Tick(place(i), str(rounds[i])) for i in range(0, len(rounds), stride))


def line_plot(
    rounds: Sequence[int], curves: Mapping[str, Mapping[int, float]], styles: Mapping[str, str]
) -> Plot | None:
    """Curves over rounds.

    Args:
        rounds: Round numbers in order.
        curves: Value by round, by name; values that are not finite are left out.
        styles: CSS class of every curve.

    Returns:
        The plot; None when there is no finite value.
    """
    finite = {name: {r: v for r, v in curve.items() if math.isfinite(v)} for name, curve in curves.items()}
    values = [value for curve in finite.values() for value in curve.values()]
    if not values:
        return None
    low, high, ticks = _y_ticks(min(values), max(values), lambda value: f"{value:.3g}")

    def place(index: int) -> float:
        return 50.0 if len(rounds) == 1 else 100 * index / (len(rounds) - 1)

    at = {number: place(index) for index, number in enumerate(rounds)}
    lines = tuple(
        Line(name, styles[name], tuple((at[r], 100 * (high - curve[r]) / (high - low)) for r in rounds if r in curve))
        for name, curve in finite.items()
    )
    return Plot(_x_ticks(rounds, place), ticks, lines=lines)


def bar_plot(
    rounds: Sequence[int], series: Mapping[str, Sequence[float]], label: Callable[[float], str]
) -> Plot | None:
    """Bars in groups, one group per round.

    Args:
        rounds: Round numbers in order.
        series: Values by round, by name; the name is the CSS class as well.
        label: Writes a value.

    Returns:
        The plot; None when there are no rounds.
    """
    if not rounds:
        return None
    _, high, ticks = _y_ticks(0.0, max(max(values) for values in series.values()), label)
    group = 100 / len(rounds)
    width = group * 0.7 / len(series)
    bars = tuple(
        Bar(
            f"round {number}, {name}: {label(values[index])}",
            name,
            group * (index + 0.15) + width * place,
            width,
            100 * values[index] / high,
        )
        for place, (name, values) in enumerate(series.items())
        for index, number in enumerate(rounds)
    )
    return Plot(_x_ticks(rounds, lambda index: group * (index + 0.5)), ticks, bars=bars)


def whisker_plot(lines: Sequence[tuple[str, float, tuple[float, float], int, str]]) -> Whiskers:
    """Values with their intervals on one axis, on which 0 is.

    Args:
        lines: Of each value its name, it, the ends of its interval, its sign and how it is written; at least one.
    """
    ends = [end for _, value, interval, _, _ in lines for end in (value, *interval)]
    low, high, ticks = _y_ticks(min(0.0, *ends), max(0.0, *ends), lambda value: f"{value:+.3g}" if value else "0")

    def place(value: float) -> float:
        return 100 * (value - low) / (high - low)

    return Whiskers(
        place(0.0),
        ticks,
        tuple(
            Whisker(name, place(value), place(first), place(last), sign, text)
            for name, value, (first, last), sign, text in lines
        ),
    )
