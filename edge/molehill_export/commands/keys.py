"""``molehill keys``: who may publish bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from molehill.errors import IdentityError
from molehill.extras import needs
from molehill.terminal import Json, on_disk, print_json

if TYPE_CHECKING:
    from molehill_export.keys import Keys

EXTRA = "export"

app = typer.Typer(
    help="""Keys that sign a repository of bundles.

    1. molehill keys init keys --passphrase-file FILE  (once, on a machine of the person in charge)

    2. molehill publish BUNDLE --repo DIR --keys keys --passphrase-file FILE  (for every new version)

    3. carry keys/root.json to devices by a way that you trust: molehill edge pull URL --root root.json

    A machine that keeps a repository alive (molehill publish --refresh) needs keys/online and keys/N.root.json.""",
    no_args_is_help=True,
)

Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="File whose first line is the keys' passphrase, readable by you only.",
        show_default=False,
    ),
]
OnlinePassphrase = Annotated[
    Path | None,
    typer.Option(
        "--online-passphrase-file",
        metavar="FILE",
        help="The same for the keys that are kept online (snapshot, timestamp), if they have one of their own.",
        show_default=False,
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain-online", help="Leave keys that are kept online in the clear, for a machine alone.")
]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How long the root metadata lasts.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the keys.")]


def opened(folder: Path, passphrase_file: Path | None, online_passphrase_file: Path | None) -> Keys:
    """The keys of a folder."""
    from molehill import pki

    with needs(EXTRA):
        from molehill_export.keys import Keys

    return Keys(folder, pki.read_passphrase(passphrase_file), pki.read_passphrase(online_passphrase_file))


@app.command()
def init(
    folder: Folder,
    threshold: Annotated[int, typer.Option(min=1, max=2, help="How many of the two root keys must sign.")] = 2,
    days: Days = 365,
    passphrase_file: Passphrase = None,
    online_passphrase_file: OnlinePassphrase = None,
    plain_online: Plain = False,
    as_json: Json = False,
) -> None:
    """Make the keys of a repository; move DIR/offline off the network, and keep a copy of it."""
    with on_disk(as_json):
        from molehill import pki

        with needs(EXTRA):
            from molehill_export.keys import Keys

        passphrase = pki.read_passphrase(passphrase_file)
        if passphrase is None:
            mend = "Write a passphrase to a file, run chmod 600 on it, and give it: --passphrase-file FILE."
            raise IdentityError("keys for bundles are kept encrypted", mend=mend)
        online = pki.read_passphrase(online_passphrase_file)
        _show(Keys.create(folder, passphrase, online, plain=plain_online, threshold=threshold, days=days), as_json)


@app.command()
def rotate(
    folder: Folder,
    role: Annotated[Literal["root", "targets", "snapshot", "timestamp"], typer.Argument(help="Whose key.")],
    days: Days = 365,
    passphrase_file: Passphrase = None,
    online_passphrase_file: OnlinePassphrase = None,
    plain_online: Plain = False,
    as_json: Json = False,
) -> None:
    """Replace a key, and have the root keys say so; for root the older of the two. Then publish.

    Devices accept the new key with the next publication. The old one moves to DIR/retired: destroy it.
    """
    with on_disk(as_json):
        keys = opened(folder, passphrase_file, online_passphrase_file)
        keys.rotate(role, plain=plain_online, days=days)
        _show(keys, as_json)


@app.command()
def renew(
    folder: Folder,
    days: Days = 365,
    passphrase_file: Passphrase = None,
    as_json: Json = False,
) -> None:
    """Have the root metadata last longer, with the same keys. Then publish."""
    with on_disk(as_json):
        keys = opened(folder, passphrase_file, None)
        keys.renew(days=days)
        _show(keys, as_json)


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """List the keys: role, id, whether they lie here, and how long the root metadata last."""
    with on_disk(as_json):
        _show(opened(folder, None, None), as_json)


def _show(keys: Keys, as_json: bool) -> None:
    root = keys.roots()[-1].signed
    rows: list[dict[str, Any]] = [
        {"role": name, "key": keyid, "here": keys.key_path(name, keyid).is_file(), "threshold": role.threshold}
        for name, role in sorted(root.roles.items())
        for keyid in role.keyids
    ]
    path = keys.folder / "root.json"
    if as_json:
        print_json({"root": str(path), "version": root.version, "expires": root.expires.isoformat(), "keys": rows})
        return
    typer.echo(f"{path}: version {root.version}, until {root.expires:%Y-%m-%d}; devices need a copy of it")
    for row in rows:
        typer.echo(f"{row['role']:9}  {row['key'][:12]}  {'here' if row['here'] else 'elsewhere'}")
