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
from dataclasses import dataclass
from pathlib import Path

from molehill.errors import DeployError

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


@dataclass(frozen=True)
class Limit:
    """When starting a child again does not help.

    Attributes:
        ends: So many ends are too many,
        within: in so many seconds.
        said: Only ends count before which the child said this.
        what: What it means, and
        mend: what to do; empty for what the child said last.
    """

    ends: int = 5
    within: float = 60.0
    said: str = ""
    what: str = ""
    mend: str = ""


@contextlib.asynccontextmanager
async def child(
    name: str,
    command: Sequence[str],
    logs: Path,
    variables: Mapping[str, str],
    *,
    pause: float = 1.0,
    limit: Limit | None = None,
) -> AsyncIterator[asyncio.Task[None]]:
    """Run a child, and start it again when it ends.

    Args:
        name: Names its log.
        command: What to run.
        logs: Folder of the log.
        variables: Its environment, see `environment`.
        pause: Seconds before it is started again.
        limit: When to give up.

    Yields:
        A task that ends only when starting again does not help, with `DeployError`.
    """
    task = asyncio.create_task(_keep(name, command, logs / f"{name}.log", variables, pause, limit or Limit()))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, DeployError):
            await task


async def _keep(
    name: str, command: Sequence[str], log: Path, variables: Mapping[str, str], pause: float, limit: Limit
) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    ends: list[float] = []
    while True:
        with log.open("ab") as out:
            before = out.tell()
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
        said = _since(log, before)
        last = next((line.strip() for line in reversed(said.split("\n")) if line.strip()), "it said nothing")
        if limit.said in said:
            now = time.monotonic()
            ends = [at for at in ends if now - at < limit.within] + [now]
            if len(ends) >= limit.ends:
                what = limit.what or f"{name} ended {len(ends)} times, last with code {code}: {last}"
                raise DeployError(what, where=str(log), mend=limit.mend)
        _log.warning("%s ended with code %d and is started again; see %s", name, code, log)
        await asyncio.sleep(pause)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a child and what it has started."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await process.wait()
                return


def _since(log: Path, offset: int) -> str:
    """What was written to a log from an offset on; the end of it, if that is long."""
    with log.open("rb") as file:
        file.seek(max(offset, file.seek(0, os.SEEK_END) - 2**16))
        return file.read().decode(errors="replace")
