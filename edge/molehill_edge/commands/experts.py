"""``molehill edge experts | add | remove | policy``: experts that a device adds, and who must have signed them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from molehill import files
from molehill.errors import BundleError, ConfigError
from molehill.extras import needs
from molehill.terminal import Json, explained, print_json, show_table
from molehill_edge.commands.bundles import bar, opened_store, quiet
from molehill_edge.commands.opening import EXTRA, StoreFolder

if TYPE_CHECKING:
    from molehill_edge.added import Added
    from molehill_edge.fetch_experts import Choice
    from molehill_edge.store import Store

Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="Id of a bundle in the store.")]


class Policy(StrEnum):
    """Which experts a device takes."""

    signed = "signed"
    any = "any"


def experts(bundle: Bundle, store: StoreFolder = None, as_json: Json = False) -> None:
    """List the experts that a bundle's repository offers for it, and those that were added on this device."""
    with _opened(store, as_json) as held:
        from molehill_edge import fetch_experts

        with quiet():
            found = fetch_experts.choices(held, bundle)
        rows = [_offered(choice) for choice in found]
        known = {choice.offer.id for choice in found}
        rows += [
            {**told(added), "offered": None, "fits": None, "bytes": None}
            for added in held.added(bundle)
            if not added.signed or added.id not in known
        ]
        if as_json:
            print_json({"bundle": bundle, "signed_only": held.signed_experts_only, "experts": rows})
            return
        table = Table(box=SIMPLE_HEAD)
        for column in ("expert", "offered", "MB", "fits", "added", "signed"):
            table.add_column(column, overflow="fold")
        for row in rows:
            offered = "" if row["offered"] is None else f"version {row['offered']}"
            size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
            fits = {None: "", True: "yes", False: "no: published for another layout"}[row["fits"]]
            added = "no" if row["version"] is None else f"version {row['version']}" if row["signed"] else "from a file"
            signed = "yes" if row["signed"] else "NO"
            table.add_row(*(Text(part) for part in (row["id"], offered, size, fits, added, signed)))
        show_table(table)


def add(
    bundle: Bundle,
    expert: Annotated[
        str | None, typer.Argument(metavar="EXPERT", help="Id of an expert of its repository.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="An expert file instead, which nobody has signed; it is copied.", show_default=False
        ),
    ] = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Add an expert to a bundle, from its repository and checked like it, for every opening from now on."""
    with _opened(store, as_json) as held:
        from molehill_edge import fetch_experts

        if (expert is None) == (file is None):
            raise ConfigError("one expert is to be added", mend="Give its id, or a file with --file.")
        if file is not None:
            done = fetch_experts.add_file(held, bundle, file)
        else:
            assert expert is not None
            with quiet(), bar(as_json) as shown:
                done = fetch_experts.add(held, bundle, expert, progress=shown)
        if as_json:
            print_json({"bundle": bundle, **told(done)})
        elif done.signed:
            typer.echo(f"bundle {bundle}: expert {done.id}, version {done.version}, signed, is added")
        else:
            typer.echo(f"bundle {bundle}: expert {done.id} is added; it is NOT SIGNED")


def remove(
    bundle: Bundle,
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="Id of an expert that was added on this device.")],
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Take an expert that was added on this device out of a bundle again."""
    with _opened(store, as_json) as held:
        held.remove_expert(bundle, expert)
        if as_json:
            print_json({"bundle": bundle, "removed": expert})
        else:
            typer.echo(f"bundle {bundle}: expert {expert} is removed")


def policy(
    experts: Annotated[
        Policy | None,
        typer.Option(help="signed: refuse experts that are not signed targets of a repository.", show_default=False),
    ] = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Say, or set for every program that opens this store, which experts this device takes."""
    with _opened(store, as_json) as held:
        if experts is not None:
            held.require_signed_experts(required=experts is Policy.signed)
        strict = held.signed_experts_only
        names = [current.id for current in held.bundles()]
        refused = [added for name in names for added in held.added(name) if strict and not added.signed]
        if as_json:
            print_json({"experts": "signed" if strict else "any", "refused": [told(added) for added in refused]})
            return
        typer.echo(f"experts: {'signed ones only' if strict else 'any, signed or not'}")
        for added in refused:
            mend = f"molehill edge remove {added.bundle} {added.id}"
            typer.echo(f"bundle {added.bundle} does not open any more, since {added.id} is not signed; run: {mend}")


@contextlib.contextmanager
def _opened(folder: Path | None, as_json: bool) -> Iterator[Store]:
    """The store; what the system refuses there is told in one sentence."""
    with explained(as_json), needs(EXTRA):
        held = opened_store(folder)
        try:
            yield held
        except OSError as error:
            what = f"cannot use the store: {error.strerror or error}"
            mend = files.cure(error, "Choose another --store.")
            raise BundleError(what, where=str(error.filename or held.folder), mend=mend) from None


def told(added: Added) -> dict[str, Any]:
    """What programs are told about an added expert."""
    return {"id": added.id, "version": added.version, "signed": added.signed}


def _offered(choice: Choice) -> dict[str, Any]:
    offer = choice.offer
    about = {"offered": offer.version, "fits": choice.fits, "bytes": offer.length}
    return {"id": offer.id, "version": choice.added, "signed": True, **about}
