"""What all commands share: how they answer, and how a mistake ends."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from molehill import logs
from molehill.errors import MolehillError

_log = logging.getLogger(__name__)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]


@contextlib.contextmanager
def explained(as_json: bool = False) -> Iterator[None]:
    """Turn a mistake of the user into one paragraph (or a JSON envelope) and its exit code."""
    try:
        yield
    except MolehillError as error:
        details = {"what": error.what, "where": error.where, "mend": error.mend}
        envelope = {"kind": type(error).__name__, "code": error.exit_code, **details}
        if as_json:
            print_json({"error": envelope})
        elif logs.structured():
            _log.error("%s", error, extra=logs.fields(**envelope))
        else:
            say(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(error.exit_code) from None


def say(text: Text) -> None:
    """Print one paragraph on standard error, wrapped on a terminal and on one line elsewhere."""
    if logs.structured():
        _log.info("%s", text.plain)
        return
    console = Console(stderr=True)
    console.print(text, soft_wrap=not console.is_terminal)


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
