"""``molehill pki``: who belongs to a federation."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from molehill.errors import IdentityError
from molehill.terminal import Json, on_disk, print_json, show_table

app = typer.Typer(
    help="""Certificates for a federation: an offline authority, and one identity per machine.

    Four steps, and two files that travel; neither is secret:

    1. molehill pki init ca  (once, on a machine of the person in charge)

    2. molehill pki request identity --name lab-1  (on the lab machine; the key never leaves it)

    3. carry identity/request.csr to the authority: molehill pki sign request.csr --ca ca

    4. carry ca/issued/lab-1.pem back: molehill pki install lab-1.pem identity

    The coordinator's machine does the same with --server --host NAME in step 2 and --server in step 3.""",
    no_args_is_help=True,
)

Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="File whose first line is the key's passphrase, readable by you only.",
        show_default=False,
    ),
]
Days = Annotated[int, typer.Option(min=1, max=36500, help="How long it lasts.")]
Ca = Annotated[Path, typer.Option("--ca", metavar="DIR", help="The authority's folder.", show_default=False)]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")],
    name: Annotated[str, typer.Option(help="What it is called in certificates.")] = "molehill",
    days: Days = 3650,
    passphrase_file: Passphrase = None,
) -> None:
    """Make a certificate authority; keep its folder off the network, and a copy of it."""
    with on_disk():
        from molehill import pki

        made = pki.Authority.create(folder, name=name, days=days, passphrase=pki.read_passphrase(passphrase_file))
        typer.echo(f"authority {name} in {folder}, until {pki.stamp(made.certificate.ends)}")
        typer.echo(f"fingerprint {made.certificate.fingerprint}")


@app.command()
def request(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The identity's folder.")],
    name: Annotated[
        str | None, typer.Option(help="The node's name, once in the federation.", show_default=False)
    ] = None,
    server: Annotated[bool, typer.Option("--server", help="For the coordinator's machine; needs --host.")] = False,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME_OR_IP", help="What clients call the server; may be repeated.", show_default=False),
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="A new key beside the old one, which stays in use.")] = False,
    passphrase_file: Passphrase = None,
) -> None:
    """Make a key on this machine, and request.csr to have it certified."""
    with on_disk():
        from molehill import pki

        if server != bool(host) and not renew:
            raise IdentityError("--server and --host go together", mend="Name all hosts that clients use.")
        passphrase = pki.read_passphrase(passphrase_file)
        path = pki.request(folder, name, hosts=host or (), passphrase=passphrase, renew=renew)
        typer.echo(f"{path}: have it signed (molehill pki sign), then run: molehill pki install")


@app.command()
def sign(
    csr: Annotated[Path, typer.Argument(metavar="CSR", help="request.csr of a machine.")],
    ca: Ca,
    days: Days = 365,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the certificate goes.", show_default="DIR/issued/NAME.pem"),
    ] = None,
    server: Annotated[
        bool, typer.Option("--server", help="Let it be a server: your coordinator, and nobody else.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Revoke the certificate that the name has for another key.")
    ] = False,
    passphrase_file: Passphrase = None,
) -> None:
    """Certify a machine; what is written goes back to it."""
    with on_disk():
        from molehill import pki

        authority = pki.Authority(ca, pki.read_passphrase(passphrase_file))
        made, path = authority.sign(csr, days=days, out=out, server=server, replace_living=replace)
        kind = f"server {made.name} ({', '.join(made.hosts)})" if server else f"client {made.name}"
        typer.echo(f"{path}: {kind}, serial {made.serial}, until {pki.stamp(made.ends)}")


@app.command()
def install(
    cert: Annotated[Path, typer.Argument(metavar="CERT", help="What molehill pki sign wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The identity's folder.")],
    fingerprint: Annotated[
        str | None,
        typer.Option(help="The authority's, as molehill pki init printed it; nothing else is accepted."),
    ] = None,
    passphrase_file: Passphrase = None,
) -> None:
    """Put a certificate beside the key it is for; a renewal takes the place of the old one now."""
    with on_disk():
        from molehill import pki

        passphrase = pki.read_passphrase(passphrase_file)
        identity = pki.install(cert, folder, passphrase=passphrase, fingerprint=fingerprint)
        typer.echo(f"{folder}: {identity.name}, until {pki.stamp(identity.certificate.ends)}")
        typer.echo(f"authority {identity.authority.name}, fingerprint {identity.authority.fingerprint}")


@app.command()
def revoke(
    node: Annotated[str, typer.Argument(metavar="NAME|SERIAL", help="All certificates of a name, or one.")],
    ca: Ca,
    passphrase_file: Passphrase = None,
) -> None:
    """Take a certificate back; the coordinator refuses it as soon as it has the new revoked.json."""
    with on_disk():
        from molehill import pki

        gone = pki.Authority(ca, pki.read_passphrase(passphrase_file)).revoke(node)
        for row in gone:
            typer.echo(f"revoked {row.name}, serial {row.serial}")
        if not gone:
            typer.echo("nothing to do: revoked or expired before")
        typer.echo(f"{ca / 'revoked.json'}: copy it to the coordinator")


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An authority's or an identity's folder.")],
    as_json: Json = False,
) -> None:
    """List certificates: name, serial number, expiry, days left, fingerprint."""
    with on_disk(as_json):
        from molehill import pki

        rows: list[dict[str, Any]]
        now = datetime.now(UTC)
        if (folder / "ca.pem").is_file() and (folder / "issued.json").is_file():
            kind = "authority"
            rows = [
                _row(i.name, i.serial, i.server, i.state(now), datetime.fromisoformat(i.ends), i.fingerprint, now)
                for i in pki.Authority(folder).issued()
            ]
        elif (folder / "cert.pem").is_file():
            kind = "identity"
            own = pki.Certificate.load(folder / "cert.pem")
            state = "expired" if now > own.ends else "living"
            rows = [_row(own.name, own.serial, "server" in own.usages, state, own.ends, own.fingerprint, now)]
        else:
            raise IdentityError(
                "neither an authority nor an identity with a certificate",
                where=str(folder),
                mend="Begin with molehill pki init or molehill pki request.",
            )
        if as_json:
            print_json({"kind": kind, "certificates": rows})
            return
        table = Table(box=SIMPLE_HEAD)
        for column in ("name", "state", "ends", "days left", "serial", "fingerprint"):
            table.add_column(column, overflow="fold")
        for row in rows:
            keys = ("name", "state", "ends", "days_left", "serial", "fingerprint")
            table.add_row(*(Text(str(row[key])) for key in keys))
        show_table(table)


def _row(
    name: str, serial: str, server: bool, state: str, ends: datetime, fingerprint: str, now: datetime
) -> dict[str, Any]:
    return {
        "name": name,
        "serial": serial,
        "server": server,
        "state": state,
        "ends": ends.isoformat(),
        "days_left": (ends - now).days,
        "fingerprint": fingerprint,
    }
