"""From the address of an exchange to the exchange."""

from __future__ import annotations

import threading
from pathlib import Path

from molehill.errors import ConfigError
from molehill.wire.exchange import Exchange
from molehill.wire.local import FolderExchange, MemoryExchange
from molehill.wire.objects import ObjectExchange

_memories: dict[str, MemoryExchange] = {}
_lock = threading.Lock()


def connect(address: str) -> Exchange:
    """Open the exchange at an address.

    Args:
        address: ``memory:NAME`` (the same object for everybody in this process), ``folder:PATH`` or ``fsspec:URL``
            (`molehill.wire.objects`); for the exchange of a coordinator see `molehill.wire.remote`.

    Raises:
        ConfigError: No such kind of exchange, no name, path or URL, or what it needs is not installed.
    """
    kind, _, rest = address.partition(":")
    if rest and kind == "memory":
        with _lock:
            return _memories.setdefault(rest, MemoryExchange())
    if rest and kind == "folder":
        return FolderExchange(Path(rest))
    if rest and kind == "fsspec":
        return ObjectExchange(rest)
    raise ConfigError(f"unknown exchange {address!r}", mend="Use memory:NAME, folder:PATH or fsspec:URL.")
