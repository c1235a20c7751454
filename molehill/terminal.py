"""What all commands share: how they answer, and how a mistake of the user ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from molehill import files, logs
from molehill.characters import harmless, recovered
from molehill.errors import DeployError, IdentityError, MolehillError

if TYPE_CHECKING:
    from rich.table import Table  # not for commands that print none

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LINE = 100  # letters of a text that stands for itself
_UNBOUND = 100_000  # characters: more than any row has
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]
State = Annotated[
    Path, typer.Option("--state", envvar="MOLEHILL_STATE_DIR", help="Folder for what must survive a restart.")
]


@contextlib.contextmanager
def explained(as_json: bool = False) -> Iterator[None]:
    """Turn a mistake of the user, or what the system refuses, into one paragraph (or JSON) and its exit code."""
    try:
        yield
    except MolehillError as error:
        _tell(error, as_json)
        raise typer.Exit(error.exit_code) from None
    except BrokenPipeError:
        raise  # whoever read the output has gone: nobody to tell
    except OSError as error:
        refused = _refused(error)
        _tell(refused, as_json)
        raise typer.Exit(refused.exit_code) from None


def _refused(error: OSError) -> DeployError:
    what = f"the system refuses it: {error.strerror or error}"
    mend = files.cure(error, "Mend that, then try again.")
    return DeployError(what, where=str(error.filename or ""), mend=mend)


def _tell(error: MolehillError, as_json: bool) -> None:
    envelope = {"kind": type(error).__name__, "code": error.exit_code, "what": error.what, "where": error.where}
    envelope["mend"] = error.mend
    with contextlib.suppress(OSError):  # standard output may be what the system refuses
        if as_json:
            print_json({"error": envelope})
            return
    if logs.structured():
        _log.error("%s", error, extra=logs.fields(**envelope))
    else:
        say(Text.assemble(("error: ", "bold red"), harmless(str(error), lines=True)))


@contextlib.contextmanager
def on_disk(as_json: bool = False) -> Iterator[None]:
    """As `explained`, for commands that keep keys: a folder that cannot be used is a mistake like any other."""
    with explained(as_json):
        try:
            yield
        except OSError as error:
            where = str(error.filename or "")
            what = f"cannot read or write there: {error.strerror}"
            raise IdentityError(what, where=where, mend=files.cure(error)) from None


def say(text: Text, **facts: Any) -> None:
    """Print one paragraph on standard error, wrapped on a terminal and on one line elsewhere.

    Args:
        text: The paragraph.
        facts: What it says, by name, for programs that read logs.
    """
    if logs.structured():
        _log.info("%s", text.plain, extra=logs.fields(**facts))
        return
    console = Console(stderr=True)
    console.print(text, soft_wrap=not console.is_terminal)


def show_table(*parts: Table | Text) -> None:
    """Print tables, and text among them, on standard output.

    They are as wide as the terminal, or as the environment has it (``COLUMNS``); without either as wide as their rows.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBOUND
        for part in parts:
            if not isinstance(part, Text):
                part.expand = False
    for part in parts:
        console.print(part)


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    sys.stdout.flush()


def tracked(items: Iterable[T], what: str, total: int, *, quiet: bool) -> Iterable[T]:
    """Items as they are gone through, with a bar meanwhile where standard error is a terminal.

    Args:
        items: What is gone through.
        what: What is done.
        total: How many there are.
        quiet: Show no bar.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return items
    from rich.progress import track  # noqa: PLC0415  (not for commands that show none)

    return track(items, what, total, console=console, transient=True)


def learning(quiet: bool) -> Callable[[Sequence[T]], Iterable[T]]:
    """What shows how far a strategy is that learns from rows, see `molehill.decoding.interfaces.Learns.learn`."""
    return lambda rows: tracked(rows, "Learning from rows", len(rows), quiet=quiet)


def typed_lines(people: bool) -> Iterator[str]:
    """Lines of standard input that are not empty; people get a prompt, and may edit them."""
    if people:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401, PLC0415  (it edits what is typed)
    while True:
        try:
            line = recovered(input("> " if people else "").strip())
        except EOFError:
            break
        if line:
            yield line
    if people:
        typer.echo("")


def show_piece(piece: str) -> None:
    """Print part of an answer as it comes."""
    sys.stdout.write(harmless(piece, lines=True))
    sys.stdout.flush()


def one_line(text: str) -> str:
    """A text as one line, of at most 100 letters."""
    line = harmless(" ".join(text.split()))
    return line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"


def show_shares(routers: Mapping[str, Mapping[str, float]]) -> None:
    """A table of routers and the shares of their experts.

    Args:
        routers: Shares by expert, by router.
    """
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  (not for commands that print none)
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD)
    table.add_column("router", overflow="fold")
    experts = list(dict.fromkeys(name for shares in routers.values() for name in shares))
    for name in experts:
        table.add_column(Text(harmless(name)), justify="right")
    for router, shares in routers.items():
        table.add_row(Text(harmless(router)), *(f"{shares[name]:.1%}" if name in shares else "" for name in experts))
    show_table(table)
