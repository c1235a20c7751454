"""The run folder, before a run begins."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import Any, TextIO

from molehill.config import Config, load
from molehill.errors import DeployError, ResumeError

_CLAIM = 5.0  # seconds: who looks whether the folder is claimed holds it for a moment


def write_config(config: Config, out: Path) -> Path:
    """Write the resolved configuration into the run folder, once; both apps read it from there.

    Returns:
        The absolute path of the file.

    Raises:
        ResumeError: The folder holds a run with another configuration.
    """
    path = out.resolve() / "config.toml"
    if path.exists():
        differ = _differences(load(path).substance, config.substance)
        if differ:
            raise ResumeError(
                f"the run was started with another configuration, {', '.join(differ[:5])} differ",
                where=str(out),
                mend="Resume with the configuration it was started with, or start a new run in another folder.",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(".config.toml.new")
    scratch.write_text(config.to_toml(), encoding="utf-8")
    return scratch.replace(path)


def claim(out: Path) -> TextIO:
    """Take a run folder for this process, until the file that is returned is closed or the process ends.

    Raises:
        DeployError: Another process works in it.
    """
    file = (out / "lock").open("w")
    end = time.monotonic() + _CLAIM
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            file.close()
            raise DeployError("another process works in this run folder", where=str(out), mend="Let it end.") from None
        return file


def claimed(out: Path) -> bool:
    """Whether a process works in a run folder."""
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _differences(before: Any, now: Any, at: str = "") -> list[str]:
    """Dotted keys under which two nested configurations differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [at]
    keys = sorted({*before, *now})
    return [path for key in keys for path in _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)]
