"""What an installation without an extra lacks, said in words."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution, requires

from molehill.errors import ConfigError

DISTRIBUTION = "molehill"
# A line of the metadata: the name, and the extra it belongs to; no other marker is in use.
_LINE = re.compile(r"(?P<name>[\w.-]+)[^;]*(?:;\s*extra\s*==\s*['\"](?P<extra>[\w.-]+)['\"])?")
_GATHERED = {"demo", "dev"}  # for working on this project: never what a user lacks
_NAMES = {"grpc": "grpcio", "grpc-health": "grpcio-health-checking", "google": "protobuf"}  # modules named otherwise


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Say which extra brings a module that cannot be imported.

    Args:
        extra: The extra that the modules imported inside belong to.

    Raises:
        ConfigError: A third-party module cannot be imported; our own modules are there, so their errors pass.
    """
    try:
        yield
    except ImportError as error:
        name = error.name or "a module"
        if name.partition(".")[0].startswith(DISTRIBUTION):
            raise
        brings = bringing(name, extra)
        wanted = f"{DISTRIBUTION}[{brings}]" if brings else DISTRIBUTION
        raise ConfigError(f"cannot import {name} ({error})", mend=f"Run: pip install '{wanted}'") from None


def bringing(module: str, preferred: str) -> str:
    """The extra that brings a module.

    Args:
        module: Full name of a third-party module.
        preferred: Is taken when it brings the module, and when no extra says that it does.

    Returns:
        Its name, of several that of the smallest; empty when every installation brings the module.
    """
    top = module.partition(".")[0].replace("_", "-").lower()
    name = _NAMES.get(top, top)
    found = [extra for extra, names in _brought().items() if name in names]
    if preferred in found or not found:
        return preferred
    return "" if "" in found else min(found, key=lambda extra: (len(_brought()[extra]), extra))


@functools.cache
def lacking(extra: str) -> tuple[str, ...]:
    """The distributions that an extra brings and that are not installed, sorted."""
    return tuple(name for name in sorted(_brought().get(extra, ())) if not _installed(name))


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


@functools.cache
def _brought() -> Mapping[str, set[str]]:
    """The names of the distributions that each extra brings; those of every installation under an empty name."""
    brought: dict[str, set[str]] = {}
    lines: list[str] = []
    with suppress(PackageNotFoundError):  # run from a folder, and installed nowhere
        lines += requires(DISTRIBUTION) or ()
    for line in lines:
        found = _LINE.fullmatch(line)
        if found and found["extra"] not in _GATHERED:
            brought.setdefault(found["extra"] or "", set()).add(found["name"].lower().replace("_", "-"))
    return brought
