"""Join a federation: tunnel, trainer and SuperNode of one lab machine, watched."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from molehill import tunnel
from molehill.errors import DeployError
from molehill.supervise import child, free_port

LOOPBACK = "127.0.0.1"
# A node that died keeps its lease for up to 60 s, and Flower refuses it until then.
_LEASE = 15.0  # seconds between two tries


@dataclass(frozen=True)
class Membership:
    """Who joins what, with which data.

    Attributes:
        host: The coordinator.
        port: Its door for nodes.
        name: Name in this machine's certificate.
        identity: Identity folder.
        data: This owner's rows.
        test: Its held-out rows; None holds out a part of ``data``.
        state: Folder for what must survive a restart.
    """

    host: str
    port: int
    name: str
    identity: Path
    data: Path
    test: Path | None
    state: Path


def join(member: Membership, ready: Callable[[], None]) -> None:
    """Take part until stopped by SIGTERM or SIGINT.

    Args:
        member: Who joins what.
        ready: Called once the coordinator has let us in.

    Raises:
        DeployError: The coordinator cannot be reached or refuses us, or a child ends again and again.
    """
    member.state.mkdir(parents=True, exist_ok=True)
    member.state.chmod(0o700)
    asyncio.run(_join(member, ready))


async def _join(member: Membership, ready: Callable[[], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    context = mutual(member.identity)
    await _knock(member, context)
    async with contextlib.AsyncExitStack() as stack:
        entry = await tunnel.entry((LOOPBACK, 0), (member.host, member.port), context)
        stack.callback(entry.close)
        port = entry.sockets[0].getsockname()[1]
        logs = member.state / "logs"
        watched = [
            await stack.enter_async_context(child("trainer", _trainer(member), logs, _environment(member))),
            await stack.enter_async_context(
                child("supernode", _supernode(member, port), logs, _environment(member), pause=_LEASE)
            ),
        ]
        ready()
        done, _ = await asyncio.wait([asyncio.create_task(stop.wait()), *watched], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


def mutual(identity: Path) -> ssl.SSLContext:
    """TLS with our certificate, to servers that the CA knows."""
    context = ssl.create_default_context(cafile=identity / "ca.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    return context


async def _knock(member: Membership, context: ssl.SSLContext) -> None:
    """Find out now, with a clear word, whether the coordinator lets us in."""
    where = f"{member.host}:{member.port}"
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(member.host, member.port, ssl=context)
    except (OSError, TimeoutError) as error:
        raise DeployError(
            f"the coordinator cannot be reached: {tunnel.reason(error)}",
            where=where,
            mend="Check host, port, firewall and certificates: molehill pki show DIR.",
        ) from None
    try:
        async with asyncio.timeout(3):
            ended = not await reader.read(1)
    except TimeoutError:
        ended = False  # it waits for us to speak, so we are in
    except OSError as error:
        raise DeployError(f"the coordinator refuses our certificate: {tunnel.reason(error)}", where=where) from None
    finally:
        writer.close()
    if ended:
        raise DeployError(
            "the coordinator refuses this machine",
            where=where,
            mend="Its certificate may be revoked; the coordinator's log names the reason.",
        )


def _trainer(member: Membership) -> list[str]:
    words = [sys.executable, "-m", "molehill_client.deploy.trainer", "--socket", member.state / "trainer.sock"]
    words += ["--name", member.name, "--server", member.host, "--data", member.data.resolve()]
    words += ["--identity", member.identity.resolve(), "--state", member.state]
    if member.test is not None:
        words += ["--test", member.test.resolve()]
    return [str(word) for word in words]


def _supernode(member: Membership, port: int) -> list[str]:
    key = member.state / "node.key"
    private = load_pem_private_key((member.identity / "key.pem").read_bytes(), None)
    key.touch(0o600)
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    words = [Path(sys.executable).parent / "flower-supernode", "--superlink", f"{LOOPBACK}:{port}"]
    words += ["--root-certificates", member.identity / "ca.pem", "--auth-supernode-private-key", key]
    words += ["--node-config", f'trainer="{(member.state / "trainer.sock").resolve()}"']
    words += ["--host", LOOPBACK, "--port", free_port()]
    return [str(word) for word in words]


def _environment(member: Membership) -> dict[str, str]:
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    off = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_HOME": str(member.state / "flower")}
    return {**os.environ, **quiet, **off}
