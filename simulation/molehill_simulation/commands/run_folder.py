"""The folder of a run on the command line: whether it can be used, and how to go on with it after Ctrl-C."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from molehill.errors import ConfigError, ResumeError
from molehill.locks import LOCK
from molehill.terminal import INTERRUPTED, print_json, say


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
