"""Numbers and names as people read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TypeVar

T = TypeVar("T")


def clean(value: object, limit: int = 300) -> str:
    """Text that is safe to print: names and reasons come from clients, and a terminal obeys control characters.

    Args:
        value: Anything.
        limit: Longest result in characters.

    Returns:
        One line without control characters, cut at ``limit``.
    """
    text = "".join(char if char.isprintable() else " " for char in str(value)[: 4 * limit])
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names as people count: ``client-2`` before ``client-10``."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, text first
    return [(int(part[:4000]), part) if at % 2 else (0, part) for at, part in enumerate(parts)]


def by_name(table: Mapping[str, T]) -> list[tuple[str, T]]:
    """The entries of a table in that order."""
    return sorted(table.items(), key=lambda item: natural(item[0]))


def megabytes(count: float) -> str:
    """Bytes in units of 10^6 bytes, for example ``1.24 MB``."""
    return f"{count / 1e6:.2f} MB"


def storage(count: float) -> str:
    """Bytes of memory, no finer than they are known, for example ``12.4 kB``, ``310 MB`` or ``2.4 GB``."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    if count < 1e7:
        return megabytes(count)
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def moment(seconds: float) -> str:
    """A time of day such as ``2026-11-30 19:12``, in UTC.

    Args:
        seconds: Since 1970.

    Raises:
        ValueError: No calendar has it.
    """
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"
    except (OverflowError, OSError):
        raise ValueError(f"{seconds} is no time") from None


def duration(seconds: float) -> str:
    """A time such as ``41 s`` or ``3 min 05 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 or whole == seconds else f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
