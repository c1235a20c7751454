"""Entry points: what this distribution declares for itself, and what others plug in.

Ours come first, so that a plug-in takes no name from us. What of ours cannot be imported is an error; a plug-in that
cannot be imported is named and left out, and the rest goes on.
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import EntryPoint, entry_points

from molehill.characters import harmless
from molehill.errors import ConfigError, first_line
from molehill.extras import DISTRIBUTION

_log = logging.getLogger(__name__)

FAILURES = (Exception, SystemExit)  # what the code of others does when it is imported: a script of theirs ends there


@functools.cache  # finding them reads the metadata of all that is installed
def points(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group: ours, then those of plug-ins, sorted by name within a distribution."""
    found = entry_points(group=group)
    return tuple(sorted(found, key=lambda point: (not ours(point), owner(point), point.name)))


def owner(point: EntryPoint) -> str:
    """The distribution that declares an entry point."""
    return point.dist.name if point.dist is not None else "unknown"


def ours(point: EntryPoint) -> bool:
    """Whether this distribution declares it."""
    return owner(point) == DISTRIBUTION


def broken(point: EntryPoint, why: BaseException | str) -> ConfigError:
    """What is said of a plug-in that cannot be used: which distribution, which entry point, and why.

    Args:
        point: What it declares.
        why: What came of importing it, or a clause.

    Returns:
        The error, for whoever asks for it by name.
    """
    reason = why if isinstance(why, str) else f"{type(why).__name__}: {first_line(why)}"
    what = f"{point.group} {point.name!r} ({point.value}) cannot be used: {reason}"
    return ConfigError(what, where=f"plug-in {owner(point)}", mend=f"Mend, update or uninstall {owner(point)}.")


def leave_out(error: ConfigError) -> None:
    """Warn that the rest goes on without a plug-in that is `broken`."""
    _log.warning("left out: %s", harmless(str(error)))
