"""``molehill edge pull | update | list``: signed bundles on a device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from molehill.errors import MolehillError
from molehill.extras import needs
from molehill.terminal import Json, explained, print_json, show_table
from molehill_edge.commands.opening import EXTRA, StoreFolder

if TYPE_CHECKING:
    from molehill_edge.fetch import Pulled
    from molehill_edge.store import Current, Store

Id = Annotated[str | None, typer.Option("--id", metavar="ID", help="Which bundle.", show_default=False)]


def pull(
    url: Annotated[str, typer.Argument(metavar="URL", help="The repository's address.")],
    bundle: Id = None,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="root.json of its owner, needed the first time; nothing else is trusted.",
            show_default=False,
        ),
    ] = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Get the newest version of a bundle from a repository, check it, and use it from now on.

    What was downloaded before is not downloaded again. When anything is refused, the bundle in use stays.
    """
    with explained(as_json), needs(EXTRA):
        from molehill_edge import fetch

        pinned = None if root is None else fetch.read_root(root)
        with quiet(), bar(as_json) as shown:
            done = fetch.pull(opened_store(store), url, bundle=bundle, root=pinned, progress=shown)
        if as_json:
            print_json(_row(done))
        else:
            typer.echo(_told(done))


def update(bundle: Id = None, store: StoreFolder = None, as_json: Json = False) -> None:
    """Get the newest version of every bundle of this device, or of one, from where it came from."""
    with explained(as_json), needs(EXTRA):
        from molehill_edge import fetch

        held = opened_store(store)
        names = [bundle] if bundle is not None else [current.id for current in held.bundles()]
        rows, failed = [], []
        for name in names:
            try:
                with quiet(), bar(as_json) as shown:
                    done = fetch.update(held, name, progress=shown)
            except MolehillError as error:  # the others are updated all the same
                failed.append(error)
                rows.append({"id": name, "error": str(error)})
                continue
            rows.append(_row(done))
            if not as_json:
                typer.echo(_told(done))
        if failed and not as_json:
            for other in failed[1:]:
                typer.echo(f"error: {other}", err=True)
        if failed and (not as_json or len(names) == 1):
            raise failed[0]
        if as_json:
            print_json(rows)
        elif not names:
            typer.echo(f"{held.folder}: no bundles; get one with: molehill edge pull URL --root root.json")
    if failed:
        raise typer.Exit(failed[0].exit_code)


def list_bundles(store: StoreFolder = None, as_json: Json = False) -> None:
    """List the bundles of this device."""
    with explained(as_json), needs(EXTRA):
        held = opened_store(store)
        urls = {known.name: known.url for known in held.repositories()}
        rows = [_described(held, current, urls.get(current.repository, "")) for current in held.bundles()]
        if as_json:
            print_json(rows)
            return
        table = Table(box=SIMPLE_HEAD)
        for column in ("id", "version", "MB", "task", "expires", "from", "added"):
            table.add_column(column, overflow="fold")
        for row in rows:
            size, ends = f"{row['bytes'] / 1e6:.1f}", (row["expires"] or "never")[:10]
            added = ", ".join(f"{each['id']}{'' if each['signed'] else ' (NOT SIGNED)'}" for each in row["added"])
            parts = (row["id"], row["version"], size, row["task"], ends, row["from"], added)
            table.add_row(*(Text(str(part)) for part in parts))
        show_table(table)


def opened_store(folder: Path | None) -> Store:
    """The store of the option, or the usual one."""
    from molehill_edge.store import Store

    return Store(folder)


def _row(done: Pulled) -> dict[str, Any]:
    return {
        "id": done.id,
        "version": done.version,
        "before": done.before,
        "downloaded_files": done.files,
        "downloaded_bytes": done.bytes,
        "experts": [{"id": name, "version": version} for name, version in done.experts],
        "experts_set_aside": [{"id": gone.id, "why": gone.why} for gone in done.set_aside],
    }


def _told(done: Pulled) -> str:
    size = f"{done.files} files, {done.bytes / 1e6:.1f} MB downloaded"
    came = "" if done.before is None else f", before: {done.before}"
    first = f"version {done.version} is in use now{came}; {size}"
    if done.before == done.version:
        state = "is the newest" if not done.files else f"was mended: {size}"
        first = f"version {done.version} {state}"
    lines = [first, *(f"expert {name}: version {version} is in use now" for name, version in done.experts)]
    lines += [f"expert {gone.id} IS NOT IN USE ANY MORE: {gone.why}" for gone in done.set_aside]
    return "\n".join(f"bundle {done.id}: {line}" for line in lines)


def _described(store: Store, current: Current, url: str) -> dict[str, Any]:
    manifest = store.manifest(current)
    ends = datetime.fromtimestamp(manifest.expires, UTC).isoformat() if manifest.expires else None
    return {
        "id": current.id,
        "version": current.version,
        "bytes": sum(file.length for file in manifest.files),
        "task": manifest.task.kind,
        "base": manifest.base.id,
        "expires": ends,
        "from": url,
        "added": [{"id": added.id, "signed": added.signed} for added in store.added(current.id)],
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what urllib3 logs about connections that it tries again: what comes of it is told in one sentence."""
    logger = logging.getLogger("urllib3")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Bar:
    """A progress bar that comes with the first bytes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("download", visible=False)

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total, visible=True)


@contextlib.contextmanager
def bar(as_json: bool) -> Iterator[_Bar]:
    """Progress on standard error, where somebody looks."""
    console = Console(stderr=True, quiet=as_json)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        yield _Bar(progress)
