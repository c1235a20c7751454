"""``molehill publish``: a bundle becomes part of a repository that devices trust."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from molehill.commands.common import Json, on_disk, print_json
from molehill.commands.keys import OnlinePassphrase, Passphrase, opened
from molehill.errors import ConfigError
from molehill.extras import needs


def publish(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="A bundle's folder or .molehill archive; none to sign all anew.", show_default=False),
    ] = None,
    *,
    repo: Annotated[Path, typer.Option(metavar="DIR", help="What a web server serves.", show_default=False)],
    keys: Annotated[Path, typer.Option(metavar="DIR", help="From molehill keys init.", show_default=False)],
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Sign snapshot and timestamp only, with the keys kept online.")
    ] = False,
    targets_days: Annotated[int, typer.Option(min=1, max=3650, help="How long lists of bundles and files last.")] = 90,
    snapshot_days: Annotated[int, typer.Option(min=1, max=365, help="How long the snapshot lasts.")] = 7,
    timestamp_days: Annotated[
        int, typer.Option(min=1, max=365, help="How long the timestamp lasts: refresh at least as often.")
    ] = 1,
    passphrase_file: Passphrase = None,
    online_passphrase_file: OnlinePassphrase = None,
    as_json: Json = False,
) -> None:
    """Put a bundle into a repository of static files, signed for devices that know its root.

    Files that the repository has are not copied again. A version is published once: the next must be higher.
    """
    with on_disk(as_json):
        if refresh and bundle is not None:
            raise ConfigError("--refresh publishes no bundle", mend="Leave one of the two out.")
        with needs("export"):
            from molehill_export.repository import Lifetimes, Repository

        signers = opened(keys, passphrase_file, online_passphrase_file)
        repository = Repository(repo, signers, Lifetimes(targets_days, snapshot_days, timestamp_days))
        done = repository.refresh() if refresh else repository.publish(bundle)
        if as_json:
            document: dict[str, Any] = {
                "bundle": {"id": done.id, "version": done.version} if done.id else None,
                "changed": done.changed,
                "new_files": done.new_files,
                "new_bytes": done.new_bytes,
                "metadata": {
                    name: {"version": version, "expires": done.ends[name].isoformat()}
                    for name, version in done.versions.items()
                },
            }
            print_json(document)
            return
        if done.changed:
            size = f"{done.new_files} new files, {done.new_bytes / 1e6:.1f} MB"
            typer.echo(f"{repo}: bundle {done.id} version {done.version}, {size}")
        elif done.id:
            typer.echo(f"{repo}: bundle {done.id} version {done.version} is there already; nothing to do")
        ends = ", ".join(f"{name} {end:%Y-%m-%d}" for name, end in done.ends.items())
        typer.echo(f"signatures last until: {ends}")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(publish)
