"""An exchange to test: the coordinator's folder, servers over it, nodes that reach them, and a wire that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest

from molehill.pki import Identity
from molehill.wire.connect import connect
from molehill.wire.exchange import Exchange, Place
from molehill.wire.message import digest
from molehill.wire.objects import ObjectExchange
from molehill.wire.remote import CHUNK, GrpcExchange, Patience
from molehill_protos.v1 import exchange_pb2 as pb
from molehill_protos.v1.exchange_pb2_grpc import AdapterExchangeStub
from molehill_server.exchange.grants import Grant, Grants
from molehill_server.exchange.serve import serve
from molehill_server.exchange.traffic import Limits

NOW = Place("run", 3)
QUICK = Patience(stalled=2.0, pause=0.02)
SECOND = Patience(stalled=0.5, pause=0.02)


@dataclass
class House:
    """A coordinator's folder and what serves it: a thread of this process, or a process of its own."""

    folder: Path
    identities: dict[str, Path]
    port: int = 0
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    process: subprocess.Popen | None = None
    store: str = ""  # the URL of an object store

    @property
    def grants(self) -> Grants:
        return Grants(self.folder / "grants")

    @property
    def blobs(self) -> Exchange:
        return connect(f"fsspec:{self.store}" if self.store else f"folder:{self.folder / 'blobs'}")

    def give(self, node="lab-1", **changes) -> None:
        self.grants.give(node, Grant(**{"run": "run", "round": 3, "write": True, "max_bytes": 2**30} | changes))

    def start(self, **limits) -> None:
        """Serve in a thread."""
        listening, loop = threading.Event(), asyncio.new_event_loop()

        def ready(port: int) -> None:
            self.port = port
            listening.set()

        limits = Limits(**{"reserve": 0, "idle": 20.0} | limits)
        address = f"127.0.0.1:{self.port}"
        task = loop.create_task(
            serve(
                self.folder,
                Identity.load(self.identities["server"]),
                address,
                limits,
                ready=ready,
                blobs=ObjectExchange(self.store) if self.store else None,
            )
        )

        def run() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        assert listening.wait(10)
        self._open.callback(thread.join, 10)
        self._open.callback(loop.call_soon_threadsafe, task.cancel)

    def spawn(self, *options: str) -> None:
        """Serve in a process."""
        command = [sys.executable, "-m", "molehill_server.exchange", "--folder", str(self.folder)]
        command += ["--identity", str(self.identities["server"]), "--listen", f"127.0.0.1:{self.port}"]
        with (self.folder.parent / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--reserve", "0", *(["--blobs", self.store] if self.store else []), *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._open.callback(self.end, self.process)
        line = self.process.stdout.readline()
        self.port = int(re.search(r":(\d+)\.", line)[1])

    def kill(self) -> None:
        """kill -9."""
        self.end(self.process)

    @staticmethod
    def end(process: subprocess.Popen, how=signal.SIGKILL) -> int:
        if process.poll() is None:
            os.kill(process.pid, how)
        process.stdout.close()
        return process.wait(10)

    def peak(self) -> float:
        """Peak resident memory of the process, in MiB (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    def log(self) -> str:
        return (self.folder.parent / "server.log").read_text()

    def node(self, name="lab-1", *, port=None, patience=QUICK, cache=None, identity=None) -> GrpcExchange:
        if not isinstance(identity, Identity):
            identity = Identity.load(identity or self.identities[name])
        exchange = GrpcExchange(f"127.0.0.1:{port or self.port}", identity, cache, patience=patience)
        return self._open.enter_context(exchange)

    def stub(self, name="lab-1", *, key=True) -> AdapterExchangeStub:
        """The bare protocol, for what `GrpcExchange` would never send."""
        identity = Identity.load(self.identities[name])
        own = (identity.key_pem(), identity.certificate.pem) if key else (None, None)
        ca = identity.authority.pem
        channel = grpc.secure_channel(f"127.0.0.1:{self.port}", grpc.ssl_channel_credentials(ca, *own))
        self._open.callback(channel.close)
        self.channel = channel
        return AdapterExchangeStub(channel)

    def files(self, part: str) -> list[str]:
        """All files under a folder of the exchange."""
        return sorted(path.name for path in (self.folder / part).rglob("*") if path.is_file())

    def close(self) -> None:
        self._open.close()


class Wire:
    """A TCP proxy that writes down what passes, and can cut it, hold it up and slow it down."""

    def __init__(self, port: int) -> None:
        self.seen: dict[str, bytearray] = {"up": bytearray(), "down": bytearray()}
        self.delay = 0.0  # seconds from one end to the other
        self.rate = float("inf")  # bytes per second each way, of one connection
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                passing = queue.Queue(16)  # what the line holds: the sender has to wait for the rest
                for run, end in ((self._take, source), (self._give, sink)):
                    self._threads.append(threading.Thread(target=run, args=(end, passing, way)))
                    self._threads[-1].start()

    def _take(self, source, passing, way) -> None:
        data = b"..."
        while data:
            try:
                data = source.recv(2**14)
            except OSError:
                data = b""
            self.seen[way] += data
            passing.put((time.monotonic() + self.delay, data))
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RDWR)

    def _give(self, sink, passing, way) -> None:
        due, data = passing.get()
        while data:
            time.sleep(max(0.0, due - time.monotonic()) + len(data) / self.rate)
            with contextlib.suppress(OSError):  # what comes after a cut is lost
                sink.sendall(data)
            due, data = passing.get()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Reset every connection."""
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for each in self._sockets:
            each.close()


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that neither compress nor repeat."""
    return np.random.default_rng(seed).bytes(size)


def wait_for(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def put(blob, *, offset=0, length=None, name=None, run="run", number=3, size=CHUNK):
    """The messages of an upload."""
    name = name or digest(blob)
    length = len(blob) if length is None else length
    yield pb.PutChunk(header=pb.PutHeader(run=run, round=number, digest=name, length=length, offset=offset))
    for start in range(offset, len(blob), size):
        yield pb.PutChunk(data=blob[start : start + size])


def refusal(call, *arguments, **options):
    """Status and words of an answer that must be a refusal."""
    try:
        result = call(*arguments, timeout=20, **options)
        pytest.fail(f"answered {list(result) if hasattr(result, '__next__') else result}")
    except grpc.RpcError as error:
        return error.code().name, error.details()


def slowly(blob, go_on, started=None):
    """An upload that stops after its first chunk until told to go on."""
    messages = put(blob, size=1000)
    yield next(messages)
    yield next(messages)
    if started is not None:
        started.set()
    go_on.wait(20)
    yield from messages
