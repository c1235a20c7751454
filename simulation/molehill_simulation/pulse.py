"""How far clients are with what they do, told while they do it to whoever waits; nothing of it is written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from molehill_client.trainer import Observer

Parts = Mapping[str, float]  # of its work that every client has done, by client
Listener = Callable[[Parts], None]

_PAUSE = 0.25  # seconds between two reports

_listeners: list[Listener] = []
_parts: dict[str, float] = {}  # of the clients of this process that are at work


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` a few times a second how far the clients of this process are, while the context is open."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def begin() -> None:
    """Others begin to work; those before have answered."""
    _parts.clear()


def of(client: str) -> Observer:
    """What a client calls after each of its steps."""
    told = 0.0

    def observe(step: int, steps: int) -> None:
        nonlocal told
        _parts[client] = step / steps
        now = time.monotonic()
        if now - told >= _PAUSE:
            told = now
            for listener in _listeners:
                listener(dict(_parts))

    return observe
