"""The parts of a deployment on their own: what a whole one would take minutes to show."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import errno
import inspect
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import flwr
import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.supernode import start_client_internal
from typer.testing import CliRunner

import molehill
from molehill import files, locks, loopback, supervise
from molehill.cli import app as cli
from molehill.errors import ConfigError, DeployError, IdentityError, MessageError, MolehillError, ResumeError
from molehill.gateway import Gateway, listen, serving
from molehill.pki import Authority, Certificate, Door, Identity, install, request
from molehill.tasks.rows import GROUP, Rows
from molehill.wire.exchange import Place
from molehill.wire.local import MemoryExchange
from molehill_client.deploy import node
from molehill_client.deploy.join import _Member, require_clock
from molehill_client.deploy.line import Request, ask, serve
from molehill_client.deploy.outbox import Outbox
from molehill_client.deploy.post import Post
from molehill_client.deploy.trainer import Introduction, Trainer, held_out
from molehill_server.deploy import door
from molehill_server.deploy.office import Job, Office
from molehill_server.deploy.run import _initial, _tail
from molehill_server.deploy.up import Running, _Supervisor

# ---- the office ---------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_stopped_is_told_and_a_coordinator_is_ended_all_the_same(tmp_path):
    """Its SuperLink does not answer; ``stop --run`` has nothing else to do, so it must not end as if it had done it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with contextlib.closing(locks.hold(tmp_path, "", "")) as lock:
            loopback.renew(tmp_path)
            up = Running(child.pid, molehill.__version__, "127.0.0.1", 1, 2, supervise.free_port(), "folder:here")
            files.write(tmp_path / "up.json", json.dumps(asdict(up)).encode())
            Office(tmp_path).note(Job(1, str(tmp_path / "out")))
            stopped = CliRunner().invoke(cli, ["server", "stop", "--run", "--state", str(tmp_path)])
            assert (stopped.exit_code, "Flower does not answer" in stopped.stderr) == (11, True)
            assert child.poll() is None
            threading.Thread(target=lambda: (child.wait(), lock.close())).start()  # as the coordinator would
            ended = CliRunner().invoke(cli, ["server", "stop", "--state", str(tmp_path)])
            assert (ended.exit_code, "the coordinator has ended" in ended.stderr) == (0, True)
    finally:
        child.kill()


# ---- the events of a run -----------------------------------------------------------------------------------------


def test_events_are_told_once_and_whole_also_where_a_run_that_goes_on_has_cut_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    events = _tail(path)
    assert next(events) == []  # there is no such file yet
    old, new = ([json.dumps({"event": "progress", "time": t + n}) + "\n" for n in range(5)] for t in (0, 1000))
    path.write_text(old[0] + old[1] + old[2][:9])
    assert [event["time"] for event in next(events)] == [0, 1]
    path.write_text("".join(old[:3]))
    assert [event["time"] for event in next(events)] == [2]
    path.write_text("".join([old[0], *new]))  # cut after the first one, and longer than before at the next look
    assert [event["time"] for event in next(events)] == [1000, 1001, 1002, 1003, 1004]
    path.write_text(old[0] + "half of one and half of another\n" + old[1])
    assert next(events) == []
    path.write_text(old[0])
    assert next(events) == []
    path.write_text(old[0] + new[0])
    assert [event["time"] for event in next(events)] == [1000]


# ---- the line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def line(tmp_path):
    """A trainer that waits for `go` before it answers; ``line.path`` is its socket."""
    path, go = tmp_path / "s", threading.Event()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def work(asked):
        go.wait(10)
        if asked.kind == "bad":
            raise MessageError("no", where="here", mend="Do better.")
        return f"{asked.kind}:{asked.text}"

    thread = threading.Thread(target=serve, args=(listener, work, lambda asked: "at once"))
    thread.start()
    yield SimpleNamespace(path=path, go=go, listener=listener)
    go.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_request_is_answered_and_an_error_comes_through(line):
    line.go.set()
    assert ask(line.path, Request("train", "é" * 100_000)) == "train:" + "é" * 100_000
    with pytest.raises(MolehillError, match=r"here: no\. Do better\."):
        ask(line.path, Request("bad"))


def test_status_is_answered_while_the_trainer_works(line):
    slow = threading.Thread(target=ask, args=(line.path, Request("train")))
    slow.start()
    assert ask(line.path, Request("status")) == "at once"
    line.go.set()
    slow.join(5)


@pytest.mark.parametrize("said", [b"", b"\xff\xff\xff\xff", b"\x02\0\0\0{]", b'\x07\0\0\0{"a":1}'])
def test_nonsense_does_not_end_the_trainer(line, said):
    line.go.set()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(line.path))
        stranger.sendall(said)
    assert ask(line.path, Request("train", "x")) == "train:x"


def test_a_trainer_that_is_not_there_is_waited_for(tmp_path):
    with pytest.raises(DeployError, match="the trainer does not answer"):
        ask(tmp_path / "none", Request("train"), patience=0.3)


# ---- the outbox --------------------------------------------------------------------------------------------------


def test_a_question_that_comes_twice_is_answered_once_and_its_delta_put_again(tmp_path):
    there = MemoryExchange()
    box, at = Outbox(there, tmp_path), Place("run", 1)
    name = box.put(b"delta", at)
    box.remember("plan", at, name, "reply")
    there.drop(name)  # the coordinator was started anew
    assert Outbox(there, tmp_path).recall("plan") == "reply"
    assert there.get(name) == b"delta"
    assert box.recall("another plan") is None
    box.put(b"next", Place("run", 2))
    assert box.recall("plan") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [box.put(b"next", Place("run", 2))]


def test_a_damaged_outbox_trains_again(tmp_path):
    box = Outbox(MemoryExchange(), tmp_path)
    box.remember("plan", Place("run", 1), box.put(b"delta", Place("run", 1)), "reply")
    for path in tmp_path.iterdir():
        path.write_bytes(b"{")
        assert box.recall("plan") is None


# ---- rows --------------------------------------------------------------------------------------------------------


def table(count, **columns):
    values = {"text": tuple(f"row {i}" for i in range(count)), **columns}
    return Rows(values, tuple(map(str, range(count))), "rows")


def test_a_row_keeps_its_side_when_the_file_grows():
    small, large = table(50), table(400)
    assert [held_out(small, i, 0.25) for i in range(50)] == [held_out(large, i, 0.25) for i in range(50)]
    assert 60 < sum(held_out(large, i, 0.25) for i in range(400)) < 140


def test_rows_of_one_group_are_on_one_side():
    rows = table(200, **{GROUP: tuple(f"author {i % 10}" for i in range(200))})
    for author in range(10):
        assert len({held_out(rows, i, 0.4) for i in range(author, 200, 10)}) == 1


# ---- children ----------------------------------------------------------------------------------------------------


def keep(code, tmp_path, seconds=10.0, **options):
    """Keep a child running until it is given up, or for some seconds."""

    async def run():
        words = [sys.executable, "-c", code]
        variables = supervise.environment(tmp_path)
        async with supervise.child("it", words, tmp_path, variables, **options) as task:
            await asyncio.wait_for(task, seconds)

    asyncio.run(run())


def test_a_child_that_ends_again_and_again_is_given_up_with_its_last_words(tmp_path):
    limits = (supervise.Limit(ends=5, pause=0.0),)
    with pytest.raises(DeployError, match=r"it\.log: it ended 5 times, last with code 3: no luck"):
        keep("print('no luck'); raise SystemExit(3)", tmp_path, limits=limits)


def test_ends_for_another_reason_do_not_count(tmp_path):
    limits = (supervise.Limit(ends=2, pause=0.0, said="twin", what="there are two", mend="Make it one."),)
    with pytest.raises(TimeoutError):
        keep("print('away')", tmp_path, 1.0, limits=limits)
    with pytest.raises(DeployError, match=r"there are two\. Make it one"):
        keep("print('twin')", tmp_path, limits=limits)


def test_a_child_that_lived_is_started_again_however_often_it_ends(tmp_path):
    with pytest.raises(TimeoutError):
        keep("print('well')", tmp_path, 1.0, limits=(supervise.Limit(ends=2, young=0.0, pause=0.0),))


def test_a_child_that_the_system_refuses_is_no_traceback(tmp_path):
    async def start(command, logs):
        async with supervise.child("it", [command], logs, supervise.environment(tmp_path)) as task:
            await task

    with pytest.raises(DeployError, match=r"no-such-command: it cannot be started: No such file or directory"):
        asyncio.run(start("no-such-command", tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(DeployError, match=r"file.*: it cannot be started: "):
        asyncio.run(start("true", tmp_path / "file"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent died")
def test_a_run_that_has_begun_gets_no_new_start(tmp_path):
    """Its machines would take it for another run of the name and give up what they kept."""
    (tmp_path / "checkpoints" / "round-00001").mkdir(parents=True)
    with pytest.raises(ResumeError, match=r"initial\.safetensors: it is gone, and the run has begun from it"):
        _initial(None, tmp_path)


def test_children_end_with_a_supervisor_that_is_killed(tmp_path):
    code = (
        "import asyncio, sys; from pathlib import Path; from molehill import supervise\n"
        f"async def run():\n async with supervise.child('it', ['sleep', '60'], Path({str(tmp_path)!r}),"
        f" supervise.environment(Path({str(tmp_path)!r}))) as t:\n  print('up', flush=True); await t\n"
        "asyncio.run(run())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"up\n"
        until(lambda: marked(tmp_path))  # before it is the program, nothing ties it to its parent
        parent.kill()
    until(lambda: not marked(tmp_path))


def test_what_was_left_behind_is_killed(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        subprocess.Popen(["sleep", "60"], env=supervise.environment(one)) as left,
        subprocess.Popen(["sleep", "60"], env=supervise.environment(two)) as other,
    ):
        until(lambda: marked(one) == [left.pid])
        supervise.reap(one)
        assert left.wait(5) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


def test_it_is_known_what_works_in_a_folder_and_what_a_command_complains_of(tmp_path):
    with subprocess.Popen(["sleep", "60"], env=supervise.environment(tmp_path)) as child:
        until(lambda: supervise.works(tmp_path, "sleep"))
        assert not supervise.works(tmp_path, "leep")
        assert not supervise.works(tmp_path / "other", "sleep")
        child.kill()
    assert "No such file" in supervise.complaint(tmp_path, "no-such-command")
    assert supervise.complaint(tmp_path, "true") == "it said nothing"
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/sh\necho one; echo two >&2; exit 3\n")
    bad.chmod(0o755)
    assert supervise.complaint(tmp_path, str(bad)) == "two"


def marked(folder):
    from lab import left_over

    return [pid for pid in left_over(folder) if b"sleep" in cmdline(pid)]


def cmdline(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123 - it may vanish
        return file.read()
    return b""


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- who is let in -----------------------------------------------------------------------------------------------


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


# ---- the server process ------------------------------------------------------------------------------------------


def test_a_full_disk_is_no_traceback(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "final.safetensors")
    words = r"final\.safetensors: the server cannot go on: No space left.*Make room"
    with pytest.raises(DeployError, match=words), files.told("the server", tmp_path):
        raise full


def test_the_thin_app_imports_little():
    """Flower starts a process for every message; torch would take seconds of each."""
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'pandas', 'onnxruntime'}"
    code = f"import sys, molehill_client.deploy.thin; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_flowers_node_has_what_is_replaced_in_it():
    """The names are private, and nothing else would tell that a new Flower calls them otherwise, or not at all."""
    tree = ast.parse(inspect.getsource(start_client_internal))
    functions = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
    calls = {each.func.id: each for each in ast.walk(tree) if isinstance(each, ast.Call) and is_name(each.func)}
    replaced = node.takes_only(b"", node.Pace()).keys() - {"time"}
    assert replaced == {"_pull_and_store_message", "_push_messages", "_verify_fab"}
    assert replaced <= functions & calls.keys()
    for name in ("_pull_and_store_message", "_push_messages"):
        assert not calls[name].args  # what stands in takes keywords only
    given = {each.arg for each in calls["_pull_and_store_message"].keywords}
    assert given >= {"get_fab", "trusted_entities"}
    assert (len(calls["_verify_fab"].args), calls["_verify_fab"].keywords) == (2, [])


def test_flowers_node_uses_of_time_only_sleep():
    """`Pace` stands in for it and has nothing else."""
    tree = ast.parse(inspect.getsource(start_client_internal))
    imports = [each for each in ast.walk(tree) if isinstance(each, ast.Import | ast.ImportFrom)]
    bound = [(each.name, each.asname) for one in imports for each in one.names if "time" in {each.name, each.asname}]
    assert bound == [("time", None)]
    assert not any(isinstance(each, ast.ImportFrom) and each.module == "time" for each in imports)
    used = [each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute) and is_name(each.value, "time")]
    assert set(used) == {"sleep"}
    assert len(used) == sum(is_name(each, "time") for each in ast.walk(tree))  # it is handed to nobody


def is_name(node, name=None):
    return isinstance(node, ast.Name) and name in {None, node.id}


def test_an_identity_with_a_passphrase_makes_tls_without_asking(tmp_path):
    authority = Authority.create(tmp_path / "ca")
    _, bundle = authority.sign(request(tmp_path / "own", "lab-1", passphrase=b"secret"))
    identity = install(bundle, tmp_path / "own", passphrase=b"secret")
    assert identity.tls().get_ca_certs()
    assert Identity.load(tmp_path / "own", passphrase=b"secret").tls(server=True).verify_mode.name == "CERT_REQUIRED"
    assert isinstance(identity.certificate, Certificate)
