"""``molehill edge site``: a static page that runs a bundle in a browser."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO
from urllib.parse import quote

import typer
from rich.text import Text

from molehill.errors import ConfigError, DeployError
from molehill.extras import needs
from molehill.terminal import Json, explained, print_json, say

if TYPE_CHECKING:
    from molehill_web.site import Written

EXTRA = "edge"
_LOCAL = "127.0.0.1"


def site(
    bundle: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE",
            help="Id of a bundle in the store, or with --repo in that; with --insecure-local, a folder or file.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the page.", show_default=False)],
    repo: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="From molehill publish: the page gets the bundle and its updates there, on the same web server.",
            show_default="the bundle comes with the page",
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --repo: root.json of its owner, which the page pins.", show_default=False
        ),
    ] = None,
    vendor: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Has the archives of the page's libraries, from npm pack.",
            show_default="fetched by npm once, and kept",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--open", help="Serve the page to this machine and open it, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --open; 0 takes a free one.")] = 0,
    insecure_local: Annotated[
        bool,
        typer.Option("--insecure-local", help="Take an unsigned folder or archive. Anybody could have written it."),
    ] = False,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            metavar="DIR",
            envvar="MOLEHILL_STORE",
            help="Where bundles lie on this device.",
            show_default="the user's data folder",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a static page that runs a bundle in any browser, without a network after the first visit.

    It classifies or chats, shows which experts a text used, swaps gates and fits one to texts of the visitor, none of
    which leave the browser. Any web server can serve it.
    """
    with explained(as_json):
        if (repo is None) != (root is None):
            lacks = "--root" if root is None else "--repo"
            raise ConfigError(f"{lacks} is missing", mend="A page that trusts a repository needs --repo and --root.")
        if repo is not None and insecure_local:
            raise ConfigError("a bundle of a repository is signed", mend="Leave out --insecure-local.")
        if show and as_json:
            raise ConfigError("--open and --json together", mend="Leave one of the two out.")
        with needs(EXTRA):
            from molehill_web import site as pages

        if repo is not None and root is not None:
            made = pages.of_repository(bundle, repo, root, out, vendor)
        else:
            made = _of_bundle(bundle, out, vendor, insecure=insecure_local, store=store)
        if as_json:
            _print(made)
            return
        _tell(made)
        if show:
            _serve(made, port)


def _of_bundle(bundle: str, out: Path, vendor: Path | None, *, insecure: bool, store: Path | None) -> Written:
    from molehill_edge.store import Store
    from molehill_edge.trust import InsecureLocal, Trust
    from molehill_web.site import of_bundle

    trust: Trust = InsecureLocal(lambda warning: say(Text(warning, "bold red"))) if insecure else Store(store)
    with trust.admit(bundle) as admitted:
        if names := ", ".join(added.id for added, _ in admitted.experts):
            say(Text(f"The page has the bundle as it was published: without {names}, added on this device."))
        return of_bundle(admitted, out, vendor)


def _print(made: Written) -> None:
    manifest = made.manifest
    print_json(
        {
            "bundle": {"id": manifest.id, "version": manifest.version},
            "page": str(made.folder),
            "serve": str(made.serve),
            "signed": made.signed,
            "files": made.files,
            "bytes": made.bytes,
            "weights": manifest.quantisation.base,
        }
    )


def _tell(made: Written) -> None:
    manifest = made.manifest
    weights = manifest.quantisation.base
    typer.echo(f"{made.folder}: page for bundle {manifest.id} version {manifest.version}, {made.bytes / 1e6:.1f} MB")
    if made.signed:
        typer.echo("It trusts the pinned root, and what a repository shows that this root's keys have signed.")
    else:
        typer.echo("It runs the bundle that it brings: whoever serves the page decides which.")
    if weights == "int4":
        typer.echo("int4 takes several times as long as int8 on a browser's processor: export with int8.")
    if made.shown == (made.serve,):
        typer.echo(f"Serve {made.serve} with any web server; browsers want HTTPS for it, except on this machine.")
    else:
        both = " and ".join(str(folder.relative_to(made.serve)) for folder in made.shown)
        typer.echo(
            f"Serve {both} of {made.serve}, beside each other as they are there and without the rest of it; browsers "
            "want HTTPS, except on this machine."
        )


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files of some folders, and says nothing.

    Args:
        more: Of any handler.
        shown: The folders.
        directory: A folder that has them all.
    """

    def __init__(self, *more: Any, shown: Sequence[Path], directory: str) -> None:
        self._shown = [folder.resolve() for folder in shown]
        super().__init__(*more, directory=directory)

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        """Of what is in the folders; anything else is as if it were not there."""
        path = Path(self.translate_path(self.path))
        if not any(path.is_relative_to(folder) for folder in self._shown):
            self.send_error(http.HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        """Not on this terminal."""


class _Server(http.server.ThreadingHTTPServer):
    """Has nothing to tell of those who go away while they are answered."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what is wrong here, and only that."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _serve(made: Written, port: int) -> None:
    handler = functools.partial(_Handler, shown=made.shown, directory=str(made.serve.resolve()))
    try:
        server = _Server((_LOCAL, port), handler)
    except OSError as error:
        raise DeployError(f"cannot listen: {error.strerror}", where=f"{_LOCAL}:{port}", mend="Choose --port.") from None
    way = made.folder.resolve().relative_to(made.serve.resolve()).as_posix()
    address = f"http://localhost:{server.server_address[1]}/{'' if way == '.' else quote(f'{way}/')}"
    typer.echo(f"{address} until Ctrl-C")
    webbrowser.open(address)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
