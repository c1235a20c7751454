"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import TextIO

from molehill.errors import DeployError

_NAME = "lock"
_PATIENCE = 5.0  # seconds: who asks whether a folder is held locks it for a moment
_AGAIN = 0.05  # seconds between two tries


def hold(folder: Path, what: str, mend: str, name: str = _NAME) -> TextIO:
    """Take a folder for this process, until the file that is returned is closed or the process ends.

    Args:
        folder: The folder.
        what: What it means that another process has it.
        mend: What to do then.
        name: Which of the folder's locks.

    Raises:
        DeployError: Another process has it, and has it still after a few seconds.
    """
    file = (folder / name).open("w")
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(_AGAIN)
                continue
            file.close()
            raise DeployError(what, where=str(folder), mend=mend) from None
        return file


def held(folder: Path) -> bool:
    """Whether a process holds a folder."""
    try:
        with (folder / _NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
