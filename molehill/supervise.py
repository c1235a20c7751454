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
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molehill import surroundings
from molehill.errors import DeployError

_MARK = "MOLEHILL_STATE"  # in the environment of every child: the folder it works in
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


def environment(state: Path, *, outside: bool = True) -> dict[str, str]:
    """What children of a deployment get: no telemetry, no downloads, and Flower's files in our folder.

    Args:
        state: The folder that they work in.
        outside: See `surroundings.variables`.
    """
    return {
        **surroundings.variables(outside=outside),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(state / "flower"),
        "PYTHONUNBUFFERED": "1",
        _MARK: str(state),
    }


def reap(state: Path) -> None:
    """Kill what was left behind in a folder by a supervisor that was killed; only Linux can tell."""
    for number in _working(state):
        _log.warning("process %d was left behind and is killed", number)
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)


def works(state: Path, command: str) -> bool | None:
    """Whether a process of a folder runs a command; None where the system cannot tell."""
    if not Path("/proc/self/environ").exists():
        return None
    return any(command in _words(number) for number in _working(state))


def complaint(state: Path, command: str) -> str:
    """What a command of a folder that ends at once says last; asked for its help only, since its output is lost."""
    try:
        done = subprocess.run(  # noqa: S603 - a command of ours, without a shell
            [command, "--help"], env=environment(state), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return _last(done.stderr or done.stdout) if done.returncode else "it said nothing"


def _working(state: Path) -> Iterator[int]:
    mark = f"{_MARK}={state}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                yield int(folder.name)


def _words(number: int) -> set[str]:
    """File names of what a process was called with."""
    with contextlib.suppress(OSError):
        said = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
        return {Path(word).name for word in said.split("\0")}
    return set()


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
        ends: So many ends in a row are too many,
        young: when each came within so many seconds of the start.
        pause: Seconds before it is started again.
        said: Only ends count before which the child said this.
        meanwhile: What it means, and
        what: what it means when there were too many, and
        mend: what to do; empty for what the child said last.
    """

    ends: int = 3
    young: float = 60.0
    pause: float = 1.0
    said: str = ""
    meanwhile: str = ""
    what: str = ""
    mend: str = ""


_NEVER = Limit(ends=sys.maxsize)


@contextlib.asynccontextmanager
async def child(
    name: str,
    command: Sequence[str],
    logs: Path,
    variables: Mapping[str, str],
    limits: Sequence[Limit] = (Limit(),),
) -> AsyncIterator[asyncio.Task[None]]:
    """Run a child, and start it again when it ends.

    Args:
        name: Names its log.
        command: What to run.
        logs: Folder of the log.
        variables: Its environment, see `environment`.
        limits: When to give up; of several the first that fits what was said.

    Yields:
        A task that ends only when starting again does not help, with `DeployError`.
    """
    task = asyncio.create_task(_keep(name, command, logs / f"{name}.log", variables, limits))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, DeployError):
            await task


async def _keep(
    name: str, command: Sequence[str], log: Path, variables: Mapping[str, str], limits: Sequence[Limit]
) -> None:
    ends: Counter[Limit] = Counter()
    while True:
        began = time.monotonic()
        process, before = await _start(name, command, log, variables)
        try:
            code = await process.wait()
        finally:
            await _end(process)
        said = _since(log, before)
        last = _last(said)
        limit = next(limit for limit in (*limits, _NEVER) if limit.said in said)
        # One that lived longer, or ended for another reason, was well meanwhile.
        ends = Counter({limit: ends[limit] + 1 if time.monotonic() - began < limit.young else 1})
        if ends[limit] >= limit.ends:
            what = limit.what or f"{name} ended {limit.ends} times, last with code {code}: {last}"
            raise DeployError(what, where=str(log), mend=limit.mend)
        what = limit.meanwhile or f"{name} ended with code {code} ({last}) and is started again; see {log}"
        _log.warning("%s", what)
        await asyncio.sleep(limit.pause)


async def _start(
    name: str, command: Sequence[str], log: Path, variables: Mapping[str, str]
) -> tuple[asyncio.subprocess.Process, int]:
    """Start a child; also how long its log was.

    Raises:
        DeployError: The system refuses it.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
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
            return process, before
    except OSError as error:
        raise DeployError(
            f"{name} cannot be started: {error.strerror}",
            where=str(error.filename or command[0]),
            mend="Mend it, then start again.",
        ) from None


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a child and what it has started."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await process.wait()
                return


def _last(said: str) -> str:
    return next((line.strip() for line in reversed(said.split("\n")) if line.strip()), "it said nothing")


def _since(log: Path, offset: int) -> str:
    """What was written to a log from an offset on; the end of it, if that is long, and nothing, if it is gone."""
    try:
        with log.open("rb") as file:
            file.seek(max(offset, file.seek(0, os.SEEK_END) - 2**16))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
