"""The coordinator's processes: SuperLink, superexec and exchange, watched, with one guarded door for nodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography import x509

from molehill import __version__, address, files, locks, loopback
from molehill.errors import DeployError, IdentityError, MolehillError
from molehill.gateway import Gateway, serving
from molehill.logs import Seldom
from molehill.loopback import LOOPBACK
from molehill.pki import Certificate, Door, Identity, read_passphrase, require_lasting
from molehill.supervise import child, environment, free_port, reap
from molehill.surroundings import require_commands, short_folder
from molehill_server.audit import AuditLog
from molehill_server.deploy.control import Control
from molehill_server.deploy.door import open_door
from molehill_server.deploy.guard import Guard
from molehill_server.deploy.members import Members

_START = 90.0  # seconds for a child to listen
_STOP = 30.0  # seconds for everything to end
_STRIKE = 2.0  # seconds between two looks at the list of revoked certificates

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """What a coordinator that is up says about itself, in ``up.json`` of its folder.

    Attributes:
        pid: Its process.
        version: Of Molehill.
        host: The address it listens on.
        port: The door for nodes.
        exchange_port: The exchange.
        superlink: Port of the SuperLink, on loopback.
        blobs: Address at which the server process finds the exchange's blobs.
    """

    pid: int
    version: str
    host: str
    port: int
    exchange_port: int
    superlink: int
    blobs: str


@dataclass(frozen=True)
class House:
    """What a coordinator is started with.

    Attributes:
        identity: Folder of its identity.
        state: Folder for everything that must survive a restart.
        host: Address to listen on.
        port: Door for nodes.
        exchange_port: Port of the exchange.
        passphrase_file: Its first line opens the key.
        revoked: The authority's list of revoked certificates; looked for in the identity's folder when None.
        blobs: URL of an object store (fsspec) that keeps whole blobs; a folder of the state when None.
    """

    identity: Path
    state: Path
    host: str
    port: int
    exchange_port: int
    passphrase_file: Path | None = None
    revoked: Path | None = None
    blobs: str | None = None


def running(state: Path) -> Running | None:
    """The coordinator of a folder; None when none is up."""
    if not locks.held(state):
        return None
    path = state / "up.json"
    try:
        return Running(**files.parse_json(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        what, mend = "the note about the coordinator is damaged", "Start the coordinator again."
        raise DeployError(what, where=str(path), mend=mend) from None


def require_running(state: Path) -> Running:
    """The coordinator of a folder.

    Raises:
        DeployError: None is up.
    """
    found = running(state)
    if found is None:
        raise DeployError("no coordinator is up", where=str(state), mend="Start it: molehill server up")
    return found


def stop(state: Path) -> bool:
    """End the coordinator of a folder and wait until it has ended; False when none was up.

    Raises:
        DeployError: It does not end.
    """
    found = running(state)
    if found is None:
        return False
    os.kill(found.pid, signal.SIGTERM)
    end = time.monotonic() + _STOP
    while running(state) is not None:
        if time.monotonic() > end:
            raise DeployError(f"process {found.pid} does not end", where=str(state), mend=f"Run: kill -9 {found.pid}")
        time.sleep(0.1)
    return True


def up(house: House, ready: Callable[[Running], None]) -> None:
    """Run until stopped by SIGTERM or SIGINT.

    Args:
        house: What it is started with.
        ready: Called once everything listens.

    Raises:
        IdentityError: The identity cannot be used, or is none of a server.
        DeployError: Another coordinator has the folder or a port, or a child ends again and again.
        ResumeError: The folder's audit log was changed.
    """
    require_lasting(house.passphrase_file)
    identity = Identity.load(house.identity, usage="server", passphrase=read_passphrase(house.passphrase_file))
    if house.revoked is not None and not house.revoked.is_file():
        mend = "Copy it there: it is in the authority's folder."
        raise IdentityError("there is no list of revoked certificates", where=str(house.revoked), mend=mend)
    state = house.state.resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    state.chmod(0o700)
    mend = "Stop it first: molehill server stop"
    with files.private(), locks.hold(state, "another coordinator uses this folder", mend=mend):
        (state / "up.json").unlink(missing_ok=True)
        reap(state)
        require_commands("flower-superlink", "flower-superexec", "flwr-serverapp")
        if house.port == house.exchange_port:
            what = f"nodes and adapters cannot both come in at port {house.port}"
            raise DeployError(what, mend="Give another --port or --exchange-port.")
        for each in (house.port, house.exchange_port):
            _require_free(house.host, each)
        asyncio.run(_Supervisor(house, identity, state, ready).run())


def _require_free(host: str, port: int) -> None:
    try:
        for family, *_, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(where)
    except OSError as error:
        mend = "Choose another address or port, or end what uses it."
        raise DeployError(f"cannot listen on {address.join(host, port)}: {error.strerror}", mend=mend) from None


class _Supervisor:
    def __init__(self, house: House, identity: Identity, state: Path, ready: Callable[[Running], None]) -> None:
        self._house, self._identity, self._state, self._ready = house, identity, state, ready
        blobs = f"folder:{exchange_folder(state) / 'blobs'}" if house.blobs is None else f"fsspec:{house.blobs}"
        ports = house.port, house.exchange_port, free_port()
        self._up = Running(os.getpid(), __version__, house.host, *ports, blobs)
        self._revoked = (house.revoked or house.identity / "revoked.json").resolve()
        self._door = Door(self._revoked)
        self._members = Members(state / "members")
        self._guests: dict[str, bytes] = {}  # certificates of those who are inside, by their sockets' names
        self._asked = threading.Lock()
        self._seldom = Seldom()
        self._loopback = loopback.renew(state)
        self._known: dict[str, str] = {}  # by fingerprint, why it was refused last; nothing when it was let in
        self._audit = AuditLog(state / "audit.jsonl")

    async def run(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if not self._revoked.exists():
            _log.info("no certificate is revoked: there is no %s", self._revoked)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback((self._state / "up.json").unlink, missing_ok=True)
            watched = [
                await stack.enter_async_context(child(name, command, self._state / "logs", variables))
                for name, command, variables in self._children()
            ]
            waiting = asyncio.create_task(stop.wait())
            await self._first(waiting, *watched, asyncio.create_task(self._listening()))
            if waiting.done():
                return
            await asyncio.to_thread(self._end_runs)
            inner = await stack.enter_async_context(self._gateway())
            tls = self._identity.tls(server=True)
            where = self._up.host, self._up.port
            door = await open_door(where, inner, tls, self._admit, guests=self._guests)
            stack.callback(door.close)
            striking = asyncio.create_task(self._strike())
            stack.callback(striking.cancel)
            text = json.dumps(asdict(self._up)) + "\n"
            files.write(self._state / "up.json", text.encode())
            self._ready(self._up)
            await self._first(waiting, striking, *watched)

    @staticmethod
    async def _first(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
        """Wait until one of the tasks ends; raises its error."""
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    def _children(self) -> Iterator[tuple[str, list[str], dict[str, str]]]:
        """Names, commands and environments."""
        cert, key = self._loopback
        superlink: list[object] = ["flower-superlink", "--ssl-ca-certfile", cert, "--ssl-certfile", cert]
        superlink += ["--ssl-keyfile", key, "--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        superlink += ["--database", self._state / "flower.db", "--isolation", "process"]
        superlink += ["--host", LOOPBACK, "--port", self._up.superlink]
        superexec: list[object] = ["flower-superexec", "--root-certificates", cert]
        superexec += ["--runtime-api-address", f"{LOOPBACK}:{self._up.superlink}"]
        listen = address.join(self._up.host, self._up.exchange_port)
        exchange: list[object] = [sys.executable, "-m", "molehill_server.exchange", "--listen", listen]
        exchange += ["--identity", self._house.identity.resolve(), "--folder", exchange_folder(self._state)]
        exchange += ["--revoked", self._revoked]
        if self._house.blobs is not None:
            exchange += ["--blobs", self._house.blobs]
        if self._house.passphrase_file is not None:
            exchange += ["--passphrase-file", self._house.passphrase_file.resolve()]
        stored = self._house.blobs is not None  # elsewhere; the server process, a child of superexec, goes there too
        for name, command, outside in (
            ("superlink", superlink, False),
            ("superexec", superexec, stored),
            ("exchange", exchange, stored),
        ):
            yield name, [str(word) for word in command], environment(self._state, outside=outside)

    @contextlib.asynccontextmanager
    async def _gateway(self) -> AsyncIterator[Path]:
        """The gateway, on a Unix socket that only we can reach."""
        verify = ssl.create_default_context(cafile=str(self._loopback.cert))
        with short_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
            path = folder / "gateway.sock"
            listener.bind(str(path))
            gateway = Gateway(f"https://{LOOPBACK}:{self._up.superlink}", verify, Guard(self._guests, self._door.admit))
            async with serving(gateway, listener):
                yield path

    def _end_runs(self) -> None:
        """Tell Flower that server processes of the last start are gone; it would take it a minute to notice."""
        with self._control() as control:
            for run in control.runs().values():
                if run.status != "finished":
                    control.stop(run.number)

    def _control(self) -> Control:
        return Control(f"{LOOPBACK}:{self._up.superlink}", self._loopback.cert)

    async def _strike(self) -> None:
        """Strike off nodes whose certificates are revoked, also those that are not here."""
        while True:
            await asyncio.sleep(_STRIKE)
            try:
                await asyncio.to_thread(self._strike_revoked)
            except Exception as error:  # noqa: BLE001 - whatever Flower or the disk says, it is tried again
                if (more := self._seldom(str(error))) is not None:
                    _log.warning("cannot strike off a node whose certificate is revoked: %s%s", error, more)

    def _strike_revoked(self) -> None:
        for certificate in self._members:
            if self._door.revoked(certificate):
                with self._asked:
                    with self._control() as control:
                        control.strike(certificate)
                    self._audit.append(
                        "struck", client=certificate.x509.subject.rfc4514_string(), serial=certificate.serial
                    )
                    self._members.forget(certificate)

    def _admit(self, shown: bytes) -> str:
        """Why a node is refused; one that is not becomes known to Flower."""
        certificate = Certificate(x509.load_der_x509_certificate(shown), "")
        with self._asked:  # nodes have several connections
            before = self._known.get(certificate.fingerprint)
            refused = self._refusal(certificate, known=before == "")
            if refused != before:
                who = {"client": certificate.x509.subject.rfc4514_string(), "serial": certificate.serial}
                if refused:
                    self._audit.append("refused", **who, reason=refused)
                else:
                    self._audit.append("admitted", **who)
                self._known[certificate.fingerprint] = refused  # only once it is in the audit log
        return refused

    def _refusal(self, certificate: Certificate, *, known: bool) -> str:
        try:
            name = self._door.admit(certificate)
        except MolehillError as error:
            return str(error)
        if not known:
            try:
                with self._control() as control:
                    control.register(certificate)
                self._members.note(certificate)
            except Exception as error:  # noqa: BLE001 - whatever Flower says, the node must try again
                return f"Flower does not take {name}: {error}"
        return ""

    async def _listening(self) -> None:
        """Wait until the children can be reached."""
        end = time.monotonic() + _START
        for host, port in ((LOOPBACK, self._up.superlink), (_reachable(self._up.host), self._up.exchange_port)):
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, port)
                except OSError as error:
                    if time.monotonic() > end:
                        mend = f"See {self._state / 'logs'}."
                        what = f"nothing listens on {address.join(host, port)} ({error})"
                        raise DeployError(what, mend=mend) from None
                    await asyncio.sleep(0.2)
                    continue
                writer.close()
                break


def exchange_folder(state: Path) -> Path:
    """Where the exchange of a coordinator keeps its files."""
    return state / "exchange"


def _reachable(host: str) -> str:
    """The address under which a server that listens on all of them is found here."""
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104 - what is compared, not what is opened
