"""What all commands share: how they answer, and how a mistake of the user ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from molehill import files, logs
from molehill.characters import harmless
from molehill.errors import DeployError, IdentityError, MolehillError

if TYPE_CHECKING:
    from rich.table import Table  # not for commands that print none

_log = logging.getLogger(__name__)

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
