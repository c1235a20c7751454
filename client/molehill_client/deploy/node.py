"""Flower's node, which takes no app bundle but ours: ``python -m molehill_client.deploy.node flower-supernode ...``.

Flower runs whatever bundle a coordinator sends along with a run. Its own check of bundles wants a licence service; this
one, in its place, compares with the bundle that is built here. The names it replaces are those of the pinned version.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

from molehill import bundle

_SOON = 1.0  # seconds between two looks for messages while a run goes on
_BUSY = 60.0  # seconds after the last message for which it does
_TRUSTED = {"this machine": ""}  # there must be someone for Flower to check at all


class Pace:
    """Stands in for ``time``: Flower looks for messages every three seconds, and here oftener while a run goes on."""

    def __init__(self) -> None:
        self._until = 0.0

    def met(self) -> None:
        """There was a message, so there will be more."""
        self._until = time.monotonic() + _BUSY

    def sleep(self, seconds: float) -> None:
        """Sleep; shorter, when there was a message a moment ago."""
        time.sleep(min(seconds, _SOON) if time.monotonic() < self._until else seconds)


def takes_only(own: bytes, pace: Pace) -> dict[str, Any]:
    """What stands in for functions of `flwr.supernode.start_client_internal`.

    Args:
        own: The one bundle that may run.
        pace: Told about every message.
    """
    push = start_client_internal._push_messages  # noqa: SLF001 - there is no public way in
    pull = start_client_internal._pull_and_store_message  # noqa: SLF001 - there is no public way in

    def pull_checked(*, get_fab: Callable[..., Fab], **given: Any) -> int | None:
        def licensed(*words: Any) -> Fab:
            fab = get_fab(*words)
            return Fab(fab.hash_str, fab.content, {"valid_license": "not asked for"})

        run: int | None = pull(**{**given, "get_fab": licensed, "trusted_entities": _TRUSTED})
        return run

    def push_met(**given: Any) -> None:
        push(**given)
        pace.met()

    def verify(fab: Fab, _: dict[str, str]) -> bool:
        return bundle.same(fab.content, own)

    replaced = {"_pull_and_store_message": pull_checked, "_push_messages": push_met, "_verify_fab": verify}
    return {**replaced, "time": pace}


def build() -> bytes:
    """The bundle, as this machine's Flower builds it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / bundle.NAME).write_text(bundle.TEXT, encoding="utf-8")
        return build_fab_from_disk(Path(folder))


def main() -> None:
    """Run the node with the options behind its name."""
    vars(start_client_internal).update(takes_only(build(), Pace()))
    sys.argv = sys.argv[1:]
    flower_supernode()


if __name__ == "__main__":
    main()
