"""What all commands share: how they answer, and how a mistake ends."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from molehill import logs
from molehill.characters import harmless
from molehill.errors import ConfigError, DeployError, IdentityError, MolehillError, ResumeError
from molehill.locks import LOCK

_log = logging.getLogger(__name__)

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]


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
    return DeployError(what, where=str(error.filename or ""), mend="Mend that, then try again.")


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
            raise IdentityError(f"cannot read or write there: {error.strerror}", where=where) from None


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


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    sys.stdout.flush()


def interrupted(folder: Path | None, command: Sequence[str], options: Sequence[str], as_json: bool) -> None:
    """Say how to go on with a run that was stopped, if there is anything of it.

    Args:
        folder: Run folder; None before there was one.
        command: What was called.
        options: Its options beside ``--out`` and ``--resume``.
        as_json: As one JSON document on standard output.
    """
    what, mend = "stopped before the run began", ""
    if folder is not None and (folder / "config.toml").is_file():
        what, mend = "stopped", shlex.join([*command, "--out", str(folder), *options, "--resume"])
    if as_json:
        print_json({"error": {"kind": "Interrupted", "code": INTERRUPTED, "what": what, "mend": mend}})
    else:
        say(Text(f"{what}; resume with: {mend}" if mend else what))


def claim(folder: Path, resume: bool) -> None:
    """Refuse a run folder that holds something else, or nothing to resume, or that cannot be written."""
    try:
        used = folder.exists() and any(path.name != LOCK for path in folder.iterdir())
        _try_to_write(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot use the run folder: {error.strerror}", where=str(folder), mend="Choose another --out."
        ) from None
    if used and not resume:
        mend = "Give --resume to go on with that run, or choose another --out."
        raise ResumeError("the run folder is not empty", where=str(folder), mend=mend)
    if resume and not (folder / "config.toml").is_file():
        mend = "Leave out --resume to start one, or give the --out of a run."
        raise ResumeError("there is no run to resume", where=str(folder), mend=mend)


def _try_to_write(folder: Path) -> None:
    """Make the folder and a file in it, and leave everything as it was."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()
