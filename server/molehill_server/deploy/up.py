"""The coordinator's processes: SuperLink, superexec and exchange, watched, with one guarded door for nodes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import uvicorn
from cryptography import x509
from cryptography.x509.oid import NameOID

from molehill import __version__, tunnel
from molehill.errors import DeployError
from molehill.supervise import child, free_port
from molehill_server.deploy.control import Control
from molehill_server.deploy.gateway import Gateway

LOOPBACK = "127.0.0.1"
_START = 90.0  # seconds for a child to listen

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """What a coordinator that is up says about itself, in ``up.json`` of its folder.

    Attributes:
        pid: Its process.
        version: Of Molehill.
        host: Where nodes find it.
        port: The door for nodes.
        exchange_port: The exchange.
        superlink: Port of the SuperLink, on loopback.
        identity: Its identity folder.
    """

    pid: int
    version: str
    host: str
    port: int
    exchange_port: int
    superlink: int
    identity: str


def running(state: Path) -> Running | None:
    """The coordinator of a folder; None when none is up."""
    try:
        found = Running(**json.loads((state / "up.json").read_text(encoding="utf-8")))
        os.kill(found.pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return found


def up(identity: Path, state: Path, host: str, port: int, exchange_port: int, ready: Callable[[Running], None]) -> None:
    """Run until stopped by SIGTERM or SIGINT.

    Args:
        identity: Folder with ``key.pem``, ``cert.pem`` and ``ca.pem``.
        state: Folder for everything that must survive a restart.
        host: Address to listen on.
        port: Door for nodes.
        exchange_port: Port of the exchange.
        ready: Called once everything listens.

    Raises:
        DeployError: Another coordinator has the folder or a port, or a child ends again and again.
    """
    state.mkdir(parents=True, exist_ok=True)
    with _locked(state):
        for each in (port, exchange_port):
            _require_free(host, each)
        asyncio.run(_Supervisor(identity.resolve(), state.resolve(), host, port, exchange_port, ready).run())


@contextlib.contextmanager
def _locked(state: Path) -> Iterator[None]:
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeployError(
                "another coordinator uses this folder", where=str(state), mend="Stop it first: molehill server stop."
            ) from None
        yield


def _require_free(host: str, port: int) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise DeployError(
                f"cannot listen on {host}:{port}: {error.strerror}", mend="Choose another port, or end what uses it."
            ) from None


class _Supervisor:
    def __init__(
        self, identity: Path, state: Path, host: str, port: int, exchange_port: int, ready: Callable[[Running], None]
    ) -> None:
        self._identity, self._state, self._ready = identity, state, ready
        superlink = free_port()
        self._up = Running(os.getpid(), __version__, host, port, exchange_port, superlink, str(identity))
        self._ca = identity / "ca.pem"
        self._admitted: set[bytes] = set()

    async def run(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback((self._state / "up.json").unlink, missing_ok=True)
            watched = [
                await stack.enter_async_context(child(name, command, self._state / "logs", self._environment()))
                for name, command in self._children()
            ]
            inner = await stack.enter_async_context(self._gateway())
            door = await tunnel.leave((self._up.host, self._up.port), (LOOPBACK, inner), self._mutual(), self._admit)
            stack.push_async_callback(_shut, door)
            await asyncio.wait_for(self._listening(), _START)
            _write(self._state / "up.json", json.dumps(asdict(self._up)))
            self._ready(self._up)
            waiting = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait([waiting, *watched], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def _children(self) -> list[tuple[str, list[str]]]:
        tools = Path(sys.executable).parent
        tls = ["--ssl-ca-certfile", self._ca, "--ssl-certfile", self._identity / "cert.pem"]
        superlink = [tools / "flower-superlink", *tls, "--ssl-keyfile", self._identity / "key.pem"]
        superlink += ["--enable-supernode-auth", "--database", self._state / "flower.db", "--isolation", "process"]
        superlink += ["--host", LOOPBACK, "--port", self._up.superlink, "--disable-runtime-dependency-installation"]
        address = f"{LOOPBACK}:{self._up.superlink}"
        superexec = [tools / "flower-superexec", "--runtime-api-address", address, "--root-certificates", self._ca]
        exchange = [sys.executable, "-m", "molehill_server.exchange", "--identity", self._identity]
        exchange += ["--folder", self._state / "exchange", "--host", self._up.host, "--port", self._up.exchange_port]
        commands = {"superlink": superlink, "superexec": superexec, "exchange": exchange}
        return [(name, [str(word) for word in command]) for name, command in commands.items()]

    def _environment(self) -> dict[str, str]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
        off = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_HOME": str(self._state / "flower")}
        return {**os.environ, **quiet, **off}

    def _mutual(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self._ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._identity / "cert.pem", self._identity / "key.pem")
        return context

    @contextlib.asynccontextmanager
    async def _gateway(self) -> AsyncIterator[int]:
        verify = ssl.create_default_context(cafile=self._ca)
        app = Gateway(f"https://{LOOPBACK}:{self._up.superlink}", verify)
        listener = socket.create_server((LOOPBACK, 0))
        files = {"ssl_certfile": self._identity / "cert.pem", "ssl_keyfile": self._identity / "key.pem"}
        server = _Uvicorn(uvicorn.Config(app, log_level="warning", **files))
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task

    def _admit(self, certificate: x509.Certificate) -> str:
        """Why a node is refused; one that is not becomes known to Flower."""
        revoked = self._identity / "revoked.json"
        serial = f"{certificate.serial_number:x}"
        if revoked.exists() and serial in json.loads(revoked.read_text(encoding="utf-8")):
            return f"certificate {serial} is revoked"
        print_ = certificate.fingerprint(certificate.signature_hash_algorithm)  # type: ignore[arg-type]
        if print_ not in self._admitted:
            name = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
            control = Control(f"{LOOPBACK}:{self._up.superlink}", self._ca)
            try:
                control.register(name, certificate)
            except Exception as error:  # noqa: BLE001 - whatever Flower says, the node must try again
                return f"Flower does not take {name}: {error}"
            finally:
                control.close()
            self._admitted.add(print_)
        return ""

    async def _listening(self) -> None:
        for port in (self._up.superlink, self._up.exchange_port):
            while True:
                try:
                    _, writer = await asyncio.open_connection(LOOPBACK, port)
                except OSError:
                    await asyncio.sleep(0.2)
                    continue
                writer.close()
                break


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _shut(server: asyncio.Server) -> None:
    server.close()


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
