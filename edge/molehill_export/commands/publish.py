"""``molehill publish``: a bundle becomes part of a repository that devices trust."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from molehill.errors import ConfigError
from molehill.extras import needs
from molehill.terminal import Json, on_disk, print_json
from molehill_export.commands.keys import OnlinePassphrase, Passphrase, opened

EXTRA = "export"


def publish(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="A bundle's folder or .molehill archive; none, and no --expert, to sign all anew.", show_default=False
        ),
    ] = None,
    *,
    repo: Annotated[Path, typer.Option(metavar="DIR", help="What a web server serves.", show_default=False)],
    keys: Annotated[Path, typer.Option(metavar="DIR", help="From molehill keys init.", show_default=False)],
    expert: Annotated[
        list[Path] | None,
        typer.Option(
            "--expert",
            metavar="FILE",
            help="An expert file that devices may add to a bundle; may be repeated.",
            show_default=False,
        ),
    ] = None,
    fits: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ID",
            help="The bundle that the experts are for.",
            show_default="the one that is published, or the only one with their base",
        ),
    ] = None,
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
    """Put a bundle, and experts for one, into a repository of static files, signed for devices that know its root.

    Files that the repository has are not copied again. A version of a bundle is published once: the next must be
    higher. Experts count their versions themselves.
    """
    with on_disk(as_json):
        if refresh and (bundle is not None or expert):
            raise ConfigError("--refresh publishes no bundle and no expert", mend="Leave one of the two out.")
        if fits is not None and not expert:
            raise ConfigError("--for is about experts", mend="Name a file with --expert.")
        if bundle is not None and bundle.suffix == ".safetensors":
            raise ConfigError("this is no bundle", where=str(bundle), mend="An expert file is published with --expert.")
        with needs(EXTRA):
            from molehill_export.metadata import Lifetimes
            from molehill_export.repository import Repository

        signers = opened(keys, passphrase_file, online_passphrase_file)
        repository = Repository(repo, signers, Lifetimes(targets_days, snapshot_days, timestamp_days))
        done = repository.refresh() if refresh else repository.publish(bundle, expert or (), fits)
        if as_json:
            document: dict[str, Any] = {
                "bundle": {"id": done.id, "version": done.version} if done.id else None,
                "changed": done.changed,
                "experts": [
                    {"id": offer.id, "bundle": offer.bundle, "version": offer.version, "changed": new}
                    for offer, new in done.experts
                ],
                "experts_of_another_layout": list(done.left),
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
            typer.echo(f"{repo}: bundle {done.id} version {done.version} is there already")
        for offer, new in done.experts:
            state = f"{offer.length / 1e6:.1f} MB" if new else "is there already"
            typer.echo(f"{repo}: expert {offer.id} version {offer.version} for bundle {offer.bundle}, {state}")
        if done.left:
            names = ", ".join(done.left)
            typer.echo(f"published for another layout of this bundle, so publish them again: experts {names}")
        ends = ", ".join(f"{name} {end:%Y-%m-%d}" for name, end in done.ends.items())
        typer.echo(f"signatures last until: {ends}")
