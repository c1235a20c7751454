"""The line between the thin ClientApp and the trainer: one request and one answer per connection, over a Unix socket.

A frame is its length (4 bytes, little endian) and JSON. The socket lies in a folder that only its owner may enter.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from molehill.errors import DeployError, MolehillError

_LENGTH = struct.Struct("<I")
_LIMIT = 16 * 2**20  # bytes of a frame


class Request(NamedTuple):
    """What the server asks.

    Attributes:
        kind: ``query.hello``, ``train``, ``train.baseline``, ``evaluate``, or ``status`` of this machine.
        text: JSON of the plan or of the introduction.
    """

    kind: str
    text: str = ""


def ask(path: str | Path, request: Request) -> str:
    """Send a request and wait for the answer, however long the work takes.

    Raises:
        DeployError: The trainer is not there, or ends before it answers.
        MolehillError: What the trainer says.
    """
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(str(path))
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


def serve(listener: socket.socket, answer: Callable[[Request], str]) -> None:
    """Answer requests one after another until the listener is closed."""
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        with line:
            try:
                request = Request(**json.loads(_receive(line)))
            except (OSError, EOFError, ValueError, TypeError):
                continue  # whoever it was is gone, or is none of ours
            try:
                reply = {"answer": answer(request)}
            except MolehillError as error:
                reply = {"error": str(error)}
            except Exception as error:  # noqa: BLE001 - the server must hear of it, and the next round may go well
                reply = {"error": f"{type(error).__name__}: {error}"}
            try:
                _send(line, json.dumps(reply).encode())
            except OSError:
                continue  # the node gave up; the server hears of it from Flower


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
