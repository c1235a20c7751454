"""Worker processes that share the clients' work; see `molehill_simulation.worker` for what they do."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Self

from molehill import surroundings
from molehill.errors import FederationError, from_dict
from molehill_simulation.flower import Message, pack, unpack
from molehill_simulation.pulse import Listener
from molehill_simulation.stage import Answer
from molehill_simulation.worker import Job, Program, read_frame, write_frame

# Large blocks stay with the process instead of going back to the kernel after every step, which then has to clear them
# anew: about a tenth of a training step. glibc reads these when a process starts.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
_LAST_WORDS = 30.0  # seconds for a process that has closed its output to end


class _Worker:
    """One process; it gets a job before it is asked anything."""

    def __init__(self, program: Program, threads: str) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "molehill_simulation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**surroundings.variables(), **MALLOC, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        self._unsaid: list[Program | Job] = [program]
        with contextlib.suppress(OSError):  # whoever asks it is told
            self._say()

    def employ(self, job: Job) -> None:
        """Say what to do."""
        self._unsaid.append(job)

    def _say(self) -> None:
        assert self.process.stdin is not None
        while self._unsaid:
            write_frame(self.process.stdin, [json.dumps(self._unsaid[0]._asdict()).encode()])
            del self._unsaid[0]

    def ask(self, parts: Sequence[bytes], working: Listener) -> list[bytes]:
        """Send a frame and wait for the answer; meanwhile ``working`` is told how far the clients are.

        Raises:
            FederationError: The process has ended.
        """
        requests, replies = self.process.stdin, self.process.stdout
        assert requests is not None
        assert replies is not None
        answer = None
        try:
            self._say()
            write_frame(requests, parts)
            while (answer := read_frame(replies)) is not None and len(answer) == 1:
                working(json.loads(answer[0]))
        except (OSError, EOFError, ValueError):  # a broken pipe, or one that was closed here
            pass
        if answer is None:
            raise self._lost()
        return answer

    def _lost(self) -> FederationError:
        try:
            code = self.process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return FederationError(
            f"a worker process {how}{f': {said[-1]}' if said else ''}",
            where="engine.workers",
            mend="If memory ran out, set engine.workers or engine.together lower. Then go on with --resume.",
        )

    def stop(self) -> None:
        """End the process at once; what its client had not finished is lost."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            with contextlib.suppress(OSError):  # what was still to be sent goes nowhere
                if stream is not None:
                    stream.close()


class Workers:
    """Processes that execute groups of messages, each one group at a time. Use inside ``with``.

    They import what they need at once, and wait for a job; see `employ`. When a process dies, whoever waits for its
    answers is told, and the run ends: it is the machine's failure, and to go on without some clients would change what
    the run measures.

    Args:
        count: Number of processes.
        program: What they import.
        threads: Threads of every matrix product in a process.
    """

    def __init__(self, count: int, program: Program, threads: int) -> None:
        self.ahead = 2 * count
        self._working: Listener = lambda _: None
        self._workers = [_Worker(program, str(threads)) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Self:
        """Nothing; the processes are there already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.process.kill()  # a thread that waits for an answer sees the end of the stream
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.stop()

    def employ(self, job: Job, working: Listener) -> None:
        """Say what they do; once, before the first messages.

        Args:
            job: What it is.
            working: Told how far clients are, in a thread of its own for every process.
        """
        self._working = working
        for worker in self._workers:
            worker.employ(job)

    def submit(self, messages: Sequence[Message]) -> Callable[[], list[Answer]]:
        """Have a group of messages executed; the result waits for the answers and returns them.

        The result raises `FederationError` when the process that has the group dies, and what ended its work.
        """
        return self._threads.submit(self._execute, [pack(message) for message in messages]).result

    def _execute(self, parts: Sequence[bytes]) -> list[Answer]:
        worker = self._idle.get()
        try:
            said, *replies = worker.ask(parts, self._working)
        finally:
            self._idle.put(worker)
        delays = json.loads(said)
        if isinstance(delays, dict):
            raise from_dict(delays)
        return [Answer(unpack(reply) if reply else None, delay) for reply, delay in zip(replies, delays, strict=True)]
