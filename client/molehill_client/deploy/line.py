"""The line between the thin ClientApp and the trainer: one request and one answer per connection, over a Unix socket.

A frame is its length (4 bytes, little endian) and JSON. The socket lies in a folder that only its owner may enter.
"""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from molehill.errors import DeployError, MolehillError

_LENGTH = struct.Struct("<I")
_LIMIT = 16 * 2**20  # bytes of a frame
_AGAIN = 0.2  # seconds between two tries
_SEND = 10.0  # seconds that who asked may take to send its request, or to take the answer

Answer = Callable[["Request"], str]


class Request(NamedTuple):
    """What is asked.

    Attributes:
        kind: ``query.hello``, ``query.keys``, ``query.shares``, ``query.agree``, ``query.unmask``, ``train``,
            ``train.baseline`` or ``evaluate`` of the server; ``status`` or ``score`` of this machine.
        text: JSON of the plan, question or introduction; for ``score`` a file of rows, or nothing.
    """

    kind: str
    text: str = ""


def ask(path: str | Path, request: Request, patience: float = 0.0) -> str:
    """Send a request and wait for the answer, however long the work takes.

    Args:
        path: The trainer's socket.
        request: What is asked.
        patience: Seconds to wait for a trainer that is just being started.

    Raises:
        DeployError: The trainer is not there, or ends before it answers.
        MolehillError: What the trainer says.
    """
    with socket.socket(socket.AF_UNIX) as line:
        try:
            _connect(line, str(path), time.monotonic() + patience)
            _send(line, json.dumps(request._asdict()).encode())
            answer = json.loads(_receive(line))
        except (OSError, EOFError) as error:
            raise DeployError(
                f"the trainer does not answer ({error or type(error).__name__})",
                where=str(path),
                mend="See its log; `molehill client join` starts it again.",
            ) from None
    if "error" in answer:
        raise MolehillError(answer["error"])
    return str(answer["answer"])


def _connect(line: socket.socket, path: str, end: float) -> None:
    while True:
        try:
            line.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end:
                raise
            time.sleep(_AGAIN)
        else:
            return


def serve(listener: socket.socket, work: Answer, at_once: Answer) -> None:
    """Answer requests until the listener is closed.

    Args:
        listener: The socket.
        work: Answers the server's requests, one after another, in the calling thread: torch keeps threads per thread.
        at_once: Answers ``status``, while work goes on.
    """
    waiting: queue.SimpleQueue[tuple[socket.socket, Request] | None] = queue.SimpleQueue()

    def accept() -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                waiting.put(None)
                return
            line.settimeout(_SEND)
            try:
                request = Request(**json.loads(_receive(line)))
            except (OSError, EOFError, ValueError, TypeError):
                line.close()  # whoever it was is gone, or is none of ours
                continue
            if request.kind == "status":
                _answer(line, request, at_once)
            else:
                waiting.put((line, request))

    threading.Thread(target=accept, daemon=True).start()
    while (task := waiting.get()) is not None:
        _answer(*task, work)


def _answer(line: socket.socket, request: Request, answer: Answer) -> None:
    with line:
        try:
            reply = {"answer": answer(request)}
        except MolehillError as error:
            reply = {"error": str(error)}
        try:
            _send(line, json.dumps(reply).encode())
        except OSError:
            return  # the node gave up; the server hears of it from Flower


def _send(line: socket.socket, frame: bytes) -> None:
    line.sendall(_LENGTH.pack(len(frame)) + frame)


def _receive(line: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
    if length > _LIMIT:
        raise EOFError(f"a frame of {length} bytes")
    return _exactly(line, length)


def _exactly(line: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = line.recv(min(size - len(parts), 2**16))
        if not part:
            raise EOFError("the connection ended")
        parts += part
    return bytes(parts)
