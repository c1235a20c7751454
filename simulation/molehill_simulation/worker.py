"""A process that calls a ClientApp for messages from its standard input: ``python -m molehill_simulation.worker``.

Input and output are frames: the number of parts, then each with its length before it, all numbers 4 bytes, little
endian. The first frame says what to import, the second what to do: a process may wait for its job while others prepare
it. Every further one is a group of messages in Flower's own encoding; it is answered by the delays of the replies
(JSON) and the replies, empty where there is none, or, when this machine fails, by the error (JSON) and an empty part;
before that come frames of one part, which say how far the clients are (JSON). The end of the input ends the process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import struct
import sys
from collections.abc import Sequence
from typing import IO, NamedTuple

from molehill.config import load
from molehill.errors import MolehillError
from molehill.tasks import kernels
from molehill_simulation import pulse
from molehill_simulation.flower import RunConfig, pack, set_identity, unpack
from molehill_simulation.scenario import ScenarioApp
from molehill_simulation.stage import Stage

_NUMBER = struct.Struct("<I")


class Program(NamedTuple):
    """What a worker imports, which takes seconds.

    Attributes:
        app: The ClientApp, as ``module:name``.
        path: Where to look for modules.
    """

    app: str
    path: list[str]


class Job(NamedTuple):
    """What a worker has to know.

    Attributes:
        nodes: Number of clients.
        run_config: Run configuration of the clients.
        run_id: Number of the run.
        measured: What the machine was measured to be good at, so that all processes of a run compute alike.
    """

    nodes: int
    run_config: RunConfig
    run_id: int
    measured: dict[str, dict[str, float]]


def write_frame(stream: IO[bytes], parts: Sequence[bytes]) -> None:
    """Write one frame."""
    stream.write(_NUMBER.pack(len(parts)))
    for part in parts:
        stream.write(_NUMBER.pack(len(part)))
        stream.write(part)
    stream.flush()


def read_frame(stream: IO[bytes]) -> list[bytes] | None:
    """Read one frame; None at the end of the stream.

    Raises:
        EOFError: The stream ends within a frame.
    """
    head = stream.read(_NUMBER.size)
    return [_read(stream, _number(_read(stream, _NUMBER.size))) for _ in range(_number(head))] if head else None


def _read(stream: IO[bytes], size: int) -> bytes:
    part = stream.read(size)
    if len(part) < size:
        raise EOFError
    return part


def _number(field: bytes) -> int:
    return int.from_bytes(field, "little")


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer frames until there are no more."""
    first = read_frame(requests)
    if first is None:
        return
    program = Program(**json.loads(first[0]))
    sys.path[:] = program.path
    module, _, name = program.app.partition(":")
    app = getattr(importlib.import_module(module), name)

    second = read_frame(requests)
    if second is None:
        return
    job = Job(**json.loads(second[0]))
    kernels.learn(job.measured)
    set_identity(job.run_id)
    stage = Stage(app, job.nodes, job.run_config, job.run_id)
    stage.client_app = ScenarioApp(app, load(str(job.run_config["config"])), stage.late)
    with pulse.listening(lambda done: write_frame(replies, [json.dumps(done).encode()])):
        while (parts := read_frame(requests)) is not None:
            write_frame(replies, _answer(stage, parts))


def _answer(stage: Stage, parts: Sequence[bytes]) -> list[bytes]:
    try:
        answers = stage.perform([unpack(part) for part in parts])
    except MolehillError as error:
        return [json.dumps(error.as_dict()).encode(), b""]
    delays = json.dumps([answer.delay for answer in answers]).encode()
    return [delays, *(b"" if reply is None else pack(reply) for reply, _ in answers)]


def main() -> None:
    """Serve on the standard streams; whatever else is printed goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent decides
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
