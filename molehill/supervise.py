"""Child processes that are started again when they end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from molehill.errors import DeployError

_FAILURES, _WITHIN = 5, 60.0  # so many ends in so many seconds are a reason to give up

_log = logging.getLogger(__name__)


def free_port() -> int:
    """A port on loopback that nobody uses."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


@contextlib.asynccontextmanager
async def child(
    name: str, command: Sequence[str], logs: Path, environment: Mapping[str, str], *, pause: float = 1.0
) -> AsyncIterator[asyncio.Task[None]]:
    """Run a child, and start it again when it ends.

    Args:
        name: Names its log.
        command: What to run.
        logs: Folder of the log.
        environment: Its environment.
        pause: Seconds before it is started again; more after every further end.

    Yields:
        A task that ends only when starting again does not help, with `DeployError`.
    """
    task = asyncio.create_task(_keep(name, command, logs / f"{name}.log", environment, pause))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, DeployError):
            await task


async def _keep(name: str, command: Sequence[str], log: Path, environment: Mapping[str, str], pause: float) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    ends: list[float] = []
    while True:
        with log.open("ab") as out:
            # A group of its own: Ctrl-C in the terminal is for us, and what the child starts ends with it.
            process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
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
