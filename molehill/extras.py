"""What an installation without an extra lacks, said in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from molehill.errors import ConfigError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Say which extra brings a module that cannot be imported.

    Args:
        extra: The extra that brings all third-party modules imported inside.

    Raises:
        ConfigError: One of them cannot be imported; our own modules are there, so their errors pass.
    """
    try:
        yield
    except ImportError as error:
        name = error.name or "a module"
        if name.partition(".")[0].startswith("molehill"):
            raise
        mend = f"Run: pip install 'molehill[{extra}]'"
        raise ConfigError(f"cannot import {name} ({error})", mend=mend) from None
