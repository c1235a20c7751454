"""Who is let in at the door, and for how long."""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import flwr
import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

import molehill
from molehill import loopback
from molehill.errors import ConfigError, DeployError, IdentityError
from molehill.gateway import Gateway, listen, serving
from molehill.pki import Authority, Door, install, request
from molehill_client.deploy.join import _Member, require_clock
from molehill_client.deploy.post import Post
from molehill_client.deploy.trainer import Introduction, Trainer
from molehill_server.deploy import door
from molehill_server.deploy.up import _Supervisor


@pytest.fixture
def people(tmp_path):
    """An authority, a server and a client."""
    authority = Authority.create(tmp_path / "ca")

    def identity(name, hosts=()):
        folder = tmp_path / name
        _, bundle = authority.sign(request(folder, name, hosts=hosts), server=bool(hosts))
        return install(bundle, folder)

    return SimpleNamespace(authority=authority, server=identity("server", ("localhost",)), client=identity("client"))


def test_a_trainer_begins_beside_a_damaged_introduction(people, tmp_path):
    whole = Introduction(config="", exchange_port=1, version=molehill.__version__).model_dump_json().encode()
    facts = {"server": "localhost", "data": "rows", "test": None, "passphrase_file": None, "socket": "s"}
    post = Post(name="client", identity=str(tmp_path / "client"), state=str(tmp_path), **facts)
    for kept, known in ((whole, True), (b"\xff" + whole[1:], False), (whole[:9], False)):
        (tmp_path / "introduction.json").write_bytes(kept)
        assert (Trainer(post)._met is not None) == known


def test_the_door_knows_the_revoked_and_a_damaged_list_lets_nobody_in(people, tmp_path):
    path = tmp_path / "revoked.json"
    keeper = Door(path)
    assert keeper.admit(people.client.certificate) == "client"
    people.authority.revoke("client")
    path.write_bytes((tmp_path / "ca" / "revoked.json").read_bytes())
    with pytest.raises(IdentityError, match="this certificate was revoked"):
        keeper.admit(people.client.certificate)
    assert keeper.admit(people.server.certificate) == "server"
    path.write_text("[")
    for _ in range(2):
        with pytest.raises(ConfigError, match="the list of revoked certificates is gone or damaged"):
            keeper.admit(people.server.certificate)
        path.unlink(missing_ok=True)


def test_a_connection_is_cut_when_its_owner_is_revoked(people, tmp_path, monkeypatch):
    monkeypatch.setattr(door, "_AGAIN", 0.05)
    refused, path = [], tmp_path / "s"

    async def echo(reader, writer):
        while data := await reader.read(100):
            writer.write(data.upper())
            await writer.drain()
        writer.close()

    async def run():
        target = await asyncio.start_unix_server(echo, path)
        admit = lambda shown: refused[0] if refused else ""  # noqa: E731 - it is that short
        opened = await door.open_door(("127.0.0.1", 0), path, people.server.tls(server=True), admit)
        address = opened.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(*address, ssl=people.client.tls(), server_hostname="localhost")
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"HELLO"
        refused.append("revoked")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        for each in (writer, opened, target):
            each.close()
            await each.wait_closed()
        await asyncio.sleep(0.2)  # the far ends close too

    asyncio.run(run())


def test_a_machine_that_is_refused_once_a_second_is_one_line(people, tmp_path, caplog):
    async def run():
        opened = await door.open_door(
            ("127.0.0.1", 0), tmp_path / "s", people.server.tls(server=True), lambda _: "it was revoked"
        )
        address = opened.sockets[0].getsockname()
        for _ in range(5):
            reader, writer = await asyncio.open_connection(
                *address, ssl=people.client.tls(), server_hostname="localhost"
            )
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            await writer.wait_closed()
        opened.close()
        await opened.wait_closed()
        await asyncio.sleep(0.1)

    asyncio.run(run())
    assert caplog.messages == ["refused a machine at 127.0.0.1: it was revoked"]


def test_a_door_that_cannot_judge_lets_nobody_in_and_closes(people, tmp_path):
    def admit(shown):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def run():
        opened = await door.open_door(("127.0.0.1", 0), tmp_path / "s", people.server.tls(server=True), admit)
        address = opened.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(*address, ssl=people.client.tls(), server_hostname="localhost")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        for each in (writer, opened):
            each.close()
            await each.wait_closed()
        await asyncio.sleep(0.1)

    asyncio.run(run())


def test_nobody_is_known_whose_entry_is_not_in_the_audit_log(people):
    """Else the next connection would be let in, and no entry would say so."""
    noted, full = [], [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def append(event, **fields):
        if full:
            raise full.pop()
        noted.append(event)

    supervisor = object.__new__(_Supervisor)
    vars(supervisor).update(_asked=threading.Lock(), _known={}, _audit=SimpleNamespace(append=append))
    supervisor._refusal = lambda certificate, known: ""
    shown = people.client.certificate.x509.public_bytes(Encoding.DER)
    with pytest.raises(OSError, match="No space left"):
        supervisor._admit(shown)
    assert [supervisor._admit(shown), supervisor._admit(shown), noted] == ["", "", ["admitted"]]


def test_a_node_hears_503_while_the_coordinator_is_away(people, tmp_path):
    async def run():
        away = Gateway("https://127.0.0.1:9", people.client.tls())
        pair = loopback.renew(tmp_path)
        trust = ssl.create_default_context(cafile=str(pair.cert))
        with listen() as listener:
            async with serving(away, listener, pair), httpx.AsyncClient(verify=trust) as node:
                at = f"https://127.0.0.1:{listener.getsockname()[1]}"
                assert (await node.post(f"{at}/v1/fleet/pull-messages", content=b"x")).status_code == 503
                assert (await node.post(f"{at}/v1/control/list-runs", content=b"x")).status_code == 404
                assert (await node.get(f"{at}/v1/fleet/pull-messages")).status_code == 404
                assert (await node.post(f"{at}/v1/fleet/pull-messages", content=bytes(2**24 + 1))).status_code == 413
                await node.aclose()
                await asyncio.sleep(0.2)

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [-3000, -130, 130, 3000])
def test_a_wrong_clock_is_found(seconds):
    now = datetime.now(UTC).replace(microsecond=0)
    way = "ahead of" if seconds > 0 else "behind"
    with pytest.raises(DeployError, match=f"this machine's clock is {abs(seconds)} s {way} the coordinator's"):
        require_clock(format_datetime(now - timedelta(seconds=seconds), usegmt=True), now)
    require_clock(format_datetime(now - timedelta(seconds=seconds / 100), usegmt=True), now)


def test_flower_still_says_what_tells_a_twin_from_an_outage():
    """The words are those of the pinned version; `client join` waits for them."""
    limit = _Member._twin(SimpleNamespace(_note=SimpleNamespace(name="lab-1")))
    sources = Path(flwr.__file__).parent.rglob("*.py")
    assert any(limit.said in path.read_text(encoding="utf-8") for path in sources)
    assert limit.what == "another machine takes part as lab-1"
