"""Child processes that are started again when they end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from molehill.errors import DeployError

_FAILURES, _WITHIN = 5, 60.0  # so many ends in so many seconds are a reason to give up
_MARK = "MOLEHILL_STATE"  # in the environment of every child: the folder it works in
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


def environment(state: Path) -> dict[str, str]:
    """What children of a deployment get: no telemetry, no downloads, and Flower's files in our folder.

    Args:
        state: The folder that they work in.
    """
    return {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(state / "flower"),
        "PYTHONUNBUFFERED": "1",
        _MARK: str(state),
    }


def reap(state: Path) -> None:
    """Kill what was left behind in a folder by a supervisor that was killed; only Linux can tell."""
    mark = f"{_MARK}={state}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                _log.warning("process %s was left behind and is killed", folder.name)
                os.kill(int(folder.name), signal.SIGKILL)


def _die_with_parent() -> None:
    """Between fork and exec: a child whose supervisor is killed gets SIGTERM."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A port on loopback that nobody uses."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


@contextlib.asynccontextmanager
async def child(
    name: str, command: Sequence[str], logs: Path, variables: Mapping[str, str], *, pause: float = 1.0
) -> AsyncIterator[asyncio.Task[None]]:
    """Run a child, and start it again when it ends.

    Args:
        name: Names its log.
        command: What to run.
        logs: Folder of the log.
        variables: Its environment, see `environment`.
        pause: Seconds before it is started again; more after every further end.

    Yields:
        A task that ends only when starting again does not help, with `DeployError`.
    """
    task = asyncio.create_task(_keep(name, command, logs / f"{name}.log", variables, pause))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, DeployError):
            await task


async def _keep(name: str, command: Sequence[str], log: Path, variables: Mapping[str, str], pause: float) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    ends: list[float] = []
    while True:
        with log.open("ab") as out:
            # A group of its own: Ctrl-C in the terminal is for us, and what the child starts ends with it.
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=variables,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        try:
            code = await process.wait()
        finally:
            await _end(process)
        now = time.monotonic()
        ends = [at for at in ends if now - at < _WITHIN] + [now]
        if len(ends) >= _FAILURES:
            raise DeployError(
                f"{name} ended {_FAILURES} times within a minute, last with code {code}: {_last_line(log)}",
                where=str(log),
            )
        _log.warning("%s ended with code %d and is started again", name, code)
        await asyncio.sleep(pause * len(ends))


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a child and what it has started."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await process.wait()
                return


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
