"""Join a federation: tunnel, trainer and SuperNode of one lab machine, watched."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from molehill import address, files, locks, loopback
from molehill.errors import DataError, DeployError, IdentityError, MolehillError
from molehill.gateway import Gateway, listen, serving
from molehill.loopback import LOOPBACK
from molehill.pki import Identity, read_passphrase, require_lasting
from molehill.supervise import Limit, child, environment, free_port, reap
from molehill.surroundings import require_commands, short_folder
from molehill_client import policy
from molehill_client.deploy.door import Refused, knock, require_clock
from molehill_client.deploy.line import Request, ask
from molehill_client.deploy.post import Post

_LEASE = 15.0  # seconds between two tries: a node that died keeps its lease for up to 60 s, and is refused until then
_LOOK = 5.0  # seconds between two looks at the trainer
_KNOCK = 30.0  # seconds between two looks at whether we are still let in
_SLOW = 45.0  # seconds after which we say that Flower's node is not in yet
_ASKS = "/v1/fleet/pull-messages"  # what a node calls again and again once it has been let in

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Membership:
    """Who joins what, with which data.

    Attributes:
        host: The coordinator.
        port: Its door for nodes.
        identity: Identity folder.
        data: This owner's rows.
        state: Folder for what must survive a restart.
        test: Its held-out rows; None holds out a part of ``data``.
        name: What the certificate must say; None takes whatever it says.
        passphrase_file: Its first line opens the identity's key.
        exchange: ``HOST:PORT`` of the exchange; None is the coordinator's host, and the port that it says.
        base: Folder of the base model on this machine.
        device: Overrides ``base.device``.
        gpu_memory: Part of the GPU's memory that may be used.
        keyring: Whether the key of the personal state lies in the operating system's keyring.
        policy: The owner's policy; None allows what a run's configuration says.
    """

    host: str
    port: int
    identity: Path
    data: Path
    state: Path
    test: Path | None = None
    name: str | None = None
    passphrase_file: Path | None = None
    exchange: str | None = None
    base: Path | None = None
    device: str | None = None
    gpu_memory: float = 1.0
    keyring: bool = False
    policy: Path | None = None


@dataclass(frozen=True)
class Joined:
    """What a machine that takes part says about itself, in ``joined.json`` of its folder.

    Attributes:
        pid: Its process.
        name: Name in its certificate.
        server: ``HOST:PORT``.
        runtime: Folder of its sockets and keys; gone when it ends.
    """

    pid: int
    name: str
    server: str
    runtime: str

    @property
    def socket(self) -> Path:
        """Where the trainer answers."""
        return Path(self.runtime) / "trainer.sock"


def joined(state: Path) -> Joined | None:
    """The machine that takes part with this folder; None when there is none."""
    return _noted(state) if locks.held(state) else None


def require_joined(state: Path) -> Joined:
    """The machine that takes part with this folder.

    Raises:
        DeployError: None does.
    """
    found = joined(state)
    if found is None:
        raise DeployError("this machine takes part in nothing", where=str(state), mend="Run: molehill client join")
    return found


def status(state: Path) -> dict[str, Any]:
    """What the machine is doing.

    Raises:
        DeployError: It takes part in nothing.
    """
    found = require_joined(state)
    try:
        said: dict[str, Any] = json.loads(ask(found.socket, Request("status")))
    except DeployError:
        log = state / "logs" / "trainer.log"
        said = {"name": found.name, "doing": f"starting its trainer, see {log}", "since": time.time()}
    return {"server": found.server, **said}


def forget(state: Path, run: str | None) -> list[str]:
    """Remove what this machine keeps of a run, or of all runs: personal gates and heads, and the last delta.

    Returns:
        Names of the runs that were there.

    Raises:
        DeployError: The machine takes part now, or knows no such run.
    """
    if joined(state) is not None:
        mend = "End `molehill client join` first."
        raise DeployError("this machine takes part in a federation", where=str(state), mend=mend)
    known = sorted(path.name for path in (state / "runs").glob("*"))
    if run is not None and run not in known:
        raise DeployError(f"there is no run {run!r}", where=str(state), mend=f"Known: {', '.join(known) or 'none'}.")
    gone = known if run is None else [run]
    for name in gone:
        shutil.rmtree(state / "runs" / name)
    for name in ("outbox", "cache"):
        shutil.rmtree(state / name, ignore_errors=True)
    (state / "introduction.json").unlink(missing_ok=True)
    return gone


def join(
    member: Membership, ready: Callable[[str], None], tell: Callable[..., None], warn: Callable[[str], None]
) -> None:
    """Take part until stopped by SIGTERM or SIGINT.

    Args:
        member: Who joins what.
        ready: Called with our name once the coordinator has let us in.
        tell: Told what happens while we take part, with facts by name, and
        warn: what goes wrong.

    Raises:
        DataError: There is no such file, or the same rows are to be trained on and held out.
        ConfigError: The policy cannot be used.
        IdentityError: The identity cannot be used.
        DeployError: The coordinator cannot be reached or refuses us, or a child ends again and again.
    """
    for path in (member.data, member.test):
        if path is not None and not path.exists():
            raise DataError("there is no such file", where=str(path))
    if member.test is not None and member.test.samefile(member.data):
        what = "the rows to hold out are those to train on"
        raise DataError(what, where=str(member.test), mend="Give a file with others, also where a folder has both.")
    if member.policy is not None:
        policy.read(member.policy)
    require_lasting(member.passphrase_file)
    identity = Identity.load(member.identity, passphrase=read_passphrase(member.passphrase_file))
    if member.name is not None and member.name != identity.name:
        raise IdentityError(
            f"the certificate is {identity.name}'s, not {member.name}'s",
            where=str(member.identity),
            mend="Leave --name out, or use the identity of that name.",
        )
    files.require_name(identity.name, IdentityError)
    require_commands("flower-superexec", "flwr-clientapp")
    member.state.mkdir(parents=True, exist_ok=True)
    member.state.chmod(0o700)
    mend = "End it first, or give another folder with --state."
    with (
        files.private(),
        locks.hold(member.state, "`molehill client join` runs already", mend),
        _runtime(member.state) as runtime,
    ):
        reap(member.state.resolve())
        note = Joined(os.getpid(), identity.name, address.join(member.host, member.port), str(runtime))
        files.write(member.state / "joined.json", json.dumps(asdict(note)).encode())
        asyncio.run(_Member(member, identity, note, tell, warn).run(ready))


@contextlib.contextmanager
def _runtime(state: Path) -> Iterator[Path]:
    """A folder in memory for the socket, whose path must be short, and for the key in the form that Flower takes."""
    before = _noted(state)
    if before is not None:
        shutil.rmtree(before.runtime, ignore_errors=True)  # of one that was killed
    try:
        with short_folder() as folder:
            yield folder
    finally:
        (state / "joined.json").unlink(missing_ok=True)


def _noted(state: Path) -> Joined | None:
    try:
        return Joined(**files.parse_json((state / "joined.json").read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


class _Member:
    def __init__(
        self,
        member: Membership,
        identity: Identity,
        note: Joined,
        tell: Callable[..., None],
        warn: Callable[[str], None],
    ) -> None:
        self._member, self._identity, self._note, self._tell, self._warn = member, identity, note, tell, warn
        self._tls = identity.tls()
        self._loopback = loopback.renew(Path(note.runtime))
        self._state = member.state.resolve()
        self._inside = asyncio.Event()  # set once Flower's node has been let in, and asks for work

    async def run(self, ready: Callable[[str], None]) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await asyncio.to_thread(self._knock)
        async with contextlib.AsyncExitStack() as stack:
            listener = stack.enter_context(listen())
            port = listener.getsockname()[1]
            gateway = Gateway(f"https://{self._note.server}", self._tls, heard=self._heard)
            await stack.enter_async_context(serving(gateway, listener, self._loopback))
            logs = self._state / "logs"
            trainer, node = self._trainer(), self._supernode(port)
            alone = environment(self._state, outside=False)
            children = [
                child("trainer", trainer, logs, environment(self._state)),
                child("supernode", node, logs, alone, (self._twin(), Limit())),
            ]
            watched = [await stack.enter_async_context(each) for each in children]
            for watch in (self._watch_trainer(), self._watch_door()):
                watched.append(asyncio.create_task(watch))
                stack.callback(watched[-1].cancel)
            waiting = asyncio.create_task(stop.wait())
            stack.callback(waiting.cancel)
            entered = asyncio.create_task(self._enter(ready))
            stack.callback(entered.cancel)
            done, _ = await asyncio.wait([waiting, *watched], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def _heard(self, path: str, status: int) -> None:
        if path == _ASKS and status == http.HTTPStatus.OK:
            self._inside.set()

    async def _enter(self, ready: Callable[[str], None]) -> None:
        """Say when we take part, and that it takes long."""
        try:
            async with asyncio.timeout(_SLOW):
                await self._inside.wait()
        except TimeoutError:
            self._tell(f"Flower's node is not in yet; see {self._state / 'logs' / 'supernode.log'}")
            await self._inside.wait()
        ready(self._identity.name)

    async def _watch_trainer(self) -> None:
        """Say what the trainer agreed to, how long rows are, what it does and cannot do: nobody looks into its log."""
        said, seen = None, set[str]()
        told: dict[str, str | None] = {}
        while True:
            await asyncio.sleep(_LOOK)
            try:
                found = json.loads(await asyncio.to_thread(ask, self._note.socket, Request("status")))
            except MolehillError:
                continue  # it is being started
            error, limit = found.get("error"), found.get("limit")
            lines = {line["id"]: line for line in found.get("lines", ())}
            for line in (lines[each] for each in lines if each not in seen):
                self._tell(line["text"], **line["facts"])
            seen = set(lines)
            if limit is not None and time.time() - found["since"] > limit:
                self._warn(f"{found['doing']} has taken more than {limit:.0f} s; the trainer is started again")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found["pid"], signal.SIGKILL)
            if error and error != said:
                self._warn(error)
            said = error
            for fact in ("agreed", "lengths"):
                if found.get(fact) and found[fact] != told.get(fact):
                    self._tell(found[fact])
                    told[fact] = found[fact]

    async def _watch_door(self) -> None:
        """End when the coordinator no longer lets us in; wait when it is away."""
        away = False
        while True:
            await asyncio.sleep(_KNOCK)
            try:
                await asyncio.to_thread(self._knock)
            except Refused:
                raise
            except DeployError as error:
                if not away:
                    self._warn(f"{error} Waiting for it.")
                away = True
            else:
                if away:
                    self._tell("the coordinator is back")
                away = False

    def _knock(self) -> None:
        """Find out, with a clear word, whether the coordinator lets us in, and whether clocks agree.

        Raises:
            DeployError: They do not (Flower takes nothing that was signed minutes ago, and does not say so), or it
                cannot be reached or refuses us.
        """
        require_clock(knock(self._member.host, self._member.port, self._tls), datetime.now(UTC))

    def _twin(self) -> Limit:
        """Flower lets a key in once; one that died within the last minute counts."""
        return Limit(
            ends=6,
            pause=_LEASE,
            said="Failed to activate SuperNode",
            meanwhile=f"the coordinator still holds the place of an earlier process of {self._note.name}; it gives it "
            "back after up to a minute, and until then this one tries again",
            what=f"another machine takes part as {self._note.name}",
            mend="Every machine needs an identity of its own: molehill pki request",
        )

    def _trainer(self) -> list[str]:
        member = self._member
        return Post(
            name=self._identity.name,
            server=member.host,
            data=str(member.data.resolve()),
            test=_resolved(member.test),
            identity=str(member.identity.resolve()),
            passphrase_file=_resolved(member.passphrase_file),
            state=str(self._state),
            socket=str(self._note.socket),
            exchange=member.exchange,
            base=_resolved(member.base),
            device=member.device,
            gpu_memory=member.gpu_memory,
            keyring=member.keyring,
            policy=_resolved(member.policy),
        ).command()

    def _supernode(self, port: int) -> list[str]:
        key = self._identity.openssh_private_key(Path(self._note.runtime) / "node.key")
        words: list[object] = [sys.executable, "-m", "molehill_client.deploy.node", "flower-supernode"]
        words += ["--superlink", f"{LOOPBACK}:{port}"]
        words += ["--root-certificates", self._loopback.cert, "--auth-supernode-private-key", key]
        words += ["--node-config", f'trainer="{self._note.socket}"', "--host", LOOPBACK, "--port", free_port()]
        return [str(word) for word in words]


def _resolved(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())
