"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

from molehill.errors import DeployError

LOCK = "lock"  # the file
_PATIENCE = 5.0  # seconds: who asks whether a folder is held locks it for a moment
_AGAIN = 0.05  # seconds between two tries


def hold(folder: Path, what: str, mend: str, name: str = LOCK, patience: float | None = None) -> TextIO:
    """Take a folder for this process, until the file that is returned is closed or the process ends.

    Args:
        folder: The folder.
        what: What it means that another process has it.
        mend: What to do then.
        name: Which of the folder's locks.
        patience: Seconds to wait for it; None for those in which somebody only looks.

    Raises:
        DeployError: Another process has it, and has it still after that time.
    """
    end = time.monotonic() + (_PATIENCE if patience is None else patience)
    while True:
        file = (folder / name).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if time.monotonic() >= end:
                raise DeployError(what, where=str(folder), mend=mend) from None
            time.sleep(_AGAIN)
            continue
        if _is_there(folder / name, file):
            return file
        file.close()  # who had it removed it, and somebody else may have made a new one


def _is_there(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def held(folder: Path) -> bool:
    """Whether a process holds a folder."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
