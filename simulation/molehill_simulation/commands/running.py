"""A run on the command line: its folder, what is shown of it, and how to go on with it after Ctrl-C."""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console
from rich.text import Text

from molehill.errors import ConfigError, ResumeError
from molehill.extras import needs
from molehill.locks import LOCK
from molehill.terminal import INTERRUPTED, explained, print_json, say

if TYPE_CHECKING:
    from molehill.config import Config
    from molehill_simulation.summary import Summary
    from molehill_simulation.ui import RunView

EXTRA = "simulation"

Out: TypeAlias = Annotated[
    Path | None, typer.Option("--out", help="Run folder.", show_default="runs/<name of the run>")
]
Overrides: TypeAlias = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated.")
]
Resume: TypeAlias = Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")]


def conduct(
    work: Callable[[Config, Path, RunView], Summary],
    config: Path | None,
    out: Path | None,
    overrides: Sequence[str] | None,
    *,
    resume: bool,
    as_json: bool,
    command: Sequence[str],
    options: Sequence[str],
    default: Path | None = None,
) -> None:
    """Run something in its folder, with progress, summary and the way to go on with it.

    Args:
        work: Takes the configuration, the run folder and who is told what happens, and returns what it came to.
        config: TOML file; None for that of the run folder, with ``resume``, or the default.
        out: Run folder; None for one that bears the name of the run.
        overrides: ``KEY=VALUE``.
        resume: Go on with what is in the folder.
        as_json: Standard output is one JSON document.
        command: What was called.
        options: Its options beside ``--out`` and ``--resume``.
        default: The configuration where neither is given.

    Raises:
        Exit: After Ctrl-C, or with the code of the error that was said.
    """
    folder = out if resume else None  # of a run that there is something of
    with explained(as_json):
        try:
            from molehill.config import load

            if config is None:
                own = out / "config.toml" if resume and out is not None else None
                config = own if own is not None and own.is_file() else default
            if config is None:
                raise ConfigError("there is no configuration", mend="Give a TOML file, or --resume with --out.")
            resolved = load(config, overrides or ())
            claimed = out or Path("runs") / resolved.run.name
            _claim(claimed, resume)
            folder = claimed

            with needs(EXTRA):
                from molehill_simulation.pace import Work
                from molehill_simulation.ui import RunView, show_summary

            console = Console(quiet=as_json)
            # Libraries below print to standard output too; with --json that stream is promised to one document.
            with (
                RunView(console, Work.of(resolved)) as view,
                contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout),
            ):
                summary = work(resolved, folder, view)
        except KeyboardInterrupt:
            _interrupted(folder, command, options, as_json)
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            print_json(summary.model_dump(mode="json", by_alias=True))
        else:
            show_summary(summary, console)
            console.print(Text(f"Report: {folder / 'report.html'}"), soft_wrap=True)


def _interrupted(folder: Path | None, command: Sequence[str], options: Sequence[str], as_json: bool) -> None:
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


def _claim(folder: Path, resume: bool) -> None:
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
