"""Flower's node, which takes no app bundle but ours: ``python -m molehill_client.deploy.node flower-supernode ...``.

Flower runs whatever bundle a coordinator sends along with a run. Its own check of bundles wants a licence service; this
one, in its place, compares with the bundle that is built here. The names it replaces are those of the pinned version.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

from molehill import bundle

_TRUSTED = {"this machine": ""}  # there must be someone for Flower to check at all


def takes_only(own: bytes) -> dict[str, Callable[..., Any]]:
    """What stands in for functions of `flwr.supernode.start_client_internal`.

    Args:
        own: The one bundle that may run.
    """
    pull = start_client_internal._pull_and_store_message  # noqa: SLF001 - there is no public way in

    def pull_checked(*, get_fab: Callable[..., Fab], **given: Any) -> int | None:
        def licensed(*words: Any) -> Fab:
            fab = get_fab(*words)
            return Fab(fab.hash_str, fab.content, {"valid_license": "not asked for"})

        return pull(**{**given, "get_fab": licensed, "trusted_entities": _TRUSTED})

    def verify(fab: Fab, _: dict[str, str]) -> bool:
        return bundle.same(fab.content, own)

    return {"_pull_and_store_message": pull_checked, "_verify_fab": verify}


def build() -> bytes:
    """The bundle, as this machine's Flower builds it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / bundle.NAME).write_text(bundle.TEXT, encoding="utf-8")
        return build_fab_from_disk(Path(folder))


def main() -> None:
    """Run the node with the options behind its name."""
    vars(start_client_internal).update(takes_only(build()))
    sys.argv = sys.argv[1:]
    flower_supernode()


if __name__ == "__main__":
    main()
