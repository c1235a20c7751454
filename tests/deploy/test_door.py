"""The door: who comes through, how many at a time, what they may say, and how much of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from pathlib import Path

import flwr.supernode.fleet_http_client
import pytest
from fleet import Member, name_of, reply_of
from flwr.proto import fleet_pb2, message_pb2, node_pb2

from molehill import gateway, loopback
from molehill.gateway import Gateway, RefusedError, listen, serving
from molehill.pki import Authority, Door, Identity, install, request
from molehill_server.deploy import door, replies
from molehill_server.deploy.guard import CALLS, Budget, Guard


class Flower:
    """Takes Flower's place and notes what it hears."""

    def __init__(self, house):
        self.house = house

    async def __call__(self, scope, receive, send):
        self.house.heard.append((scope["path"].rpartition("/")[2], (await receive())["body"]))
        await gateway._answer(send, 200, self.house.extra, self.house.answer)

    async def close(self):
        pass


class House:
    """A door, the gateway behind it, and behind that whoever takes Flower's place."""

    def __init__(self, folder, limits=None, budget=None):
        self.folder, self.limits, self.budget = folder, limits, budget
        self.heard, self.guests = [], {}
        self.authority = Authority.create(folder / "ca")
        self.answer, self.extra = b"", []

    def identity(self, name, hosts=()):
        own = self.folder / name
        _, bundle = self.authority.sign(request(own, name, hosts=hosts), server=bool(hosts))
        install(bundle, own)
        return own

    @contextlib.asynccontextmanager
    async def open(self):
        own = Identity.load(self.identity("server", ("localhost", "127.0.0.1")), usage="server")
        pair = loopback.renew(self.folder)
        trust = ssl.create_default_context(cafile=str(pair.cert))
        flower = Flower(self)
        guard = Guard(self.guests, Door(self.folder / "ca" / "revoked.json").admit, self.budget)
        with listen() as behind, socket.socket(socket.AF_UNIX) as inner:
            inner.bind(str(self.folder / "s"))
            there = f"https://127.0.0.1:{behind.getsockname()[1]}"
            async with serving(flower, behind, pair), serving(Gateway(there, trust, guard), inner):
                opened = await door.open_door(
                    ("127.0.0.1", 0),
                    self.folder / "s",
                    own.tls(server=True),
                    lambda _: "",
                    guests=self.guests,
                    limits=self.limits,
                )
                self.port = opened.sockets[0].getsockname()[1]
                with contextlib.ExitStack() as self.stack:
                    yield
                opened.close()
                await asyncio.sleep(0.2)  # the far ends close too

    def member(self, name, tls=None):
        return self.stack.enter_context(Member(self.folder / name, self.port, tls and self.folder / tls))

    def line(self, tls=None, **options):
        """A connection; with TLS of an identity or without."""
        raw = self.stack.enter_context(socket.create_connection(("127.0.0.1", self.port), **options))
        if tls is None:
            return raw
        context = Identity.load(self.folder / tls).tls()
        return self.stack.enter_context(context.wrap_socket(raw, server_hostname="127.0.0.1"))

    def run(self, work, *given):
        """Run something that blocks while the door is open."""

        async def whole():
            async with self.open():
                return await asyncio.to_thread(work, *given)

        return asyncio.run(whole())


@pytest.fixture
def house(tmp_path):
    def make(limits=None, budget=None):
        return House(tmp_path, limits, budget)

    return make


# ---- who ---------------------------------------------------------------------------------------------------------


def test_a_call_counts_for_the_certificate_it_came_with_and_for_no_other_key(house):
    """An accomplice's connection does not help a machine that is kept out."""
    here = house()
    here.identity("one"), here.identity("other")

    def work():
        plain, borrowed = here.member("one"), here.member("one", tls="other")
        assert plain.push().status_code == 200
        assert borrowed.push().status_code == 401
        assert borrowed.activate() == 401
        assert plain.post("push-messages", reply_of(0), **{"flwr-public-key": "nonsense!"}).status_code == 401
        both = [*plain.headers().items(), ("flwr-public-key", "eA==")]
        assert plain.client.post("/v1/fleet/pull-messages", content=b"", headers=both).status_code == 401
        assert plain.client.post("/v1/fleet/pull-messages", content=b"").status_code == 401

    here.run(work)
    assert [call for call, _ in here.heard] == ["push-messages"]
    assert not here.guests
    assert {path.name for path in here.folder.glob("s*")} == {"s", "server"}  # no name of a socket stays


def test_what_is_revoked_is_refused_from_the_next_call_on(house):
    here = house()
    here.identity("one")

    def work():
        member = here.member("one")
        assert member.push().status_code == 200
        here.authority.revoke("one")
        assert member.push().status_code == 403

    here.run(work)
    assert len(here.heard) == 1


def test_a_member_cannot_fill_the_log(house, caplog):
    """Whatever it makes up, it is refused in one line, and what is refused of others in lines of theirs."""
    here = house()
    here.identity("one"), here.identity("other")

    def work():
        member, other = here.member("one"), here.member("other")
        for number in range(2, 8):
            assert member.post("x" * number, b"").status_code == 404
            body = fleet_pb2.PushMessagesRequest(messages_list=[message_pb2.Message()] * number)
            assert member.post("push-messages", body).status_code == 400
        assert other.post("push-messages", b"\xff").status_code == 400

    here.run(work)
    said = sorted(record.getMessage() for record in caplog.records if record.name == "molehill.gateway")
    assert [line.partition(": ")[2] for line in said] == [
        "one: 2 messages in place of one",
        "other: the body is none of the call",
        "one: no call of a node",
    ]


def test_the_calls_that_may_pass_are_those_of_flowers_node():
    """The names are those of the pinned version."""
    source = Path(flwr.supernode.fleet_http_client.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"/v1/fleet/([a-z-]+)", source)) == CALLS | {"unregister-node"}


# ---- how many ----------------------------------------------------------------------------------------------------


def is_open(line):
    line.settimeout(0.01)
    try:
        return line.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def count_open(lines, want):
    """How many of these connections are open, once it is no more than wanted, or in the end."""
    for _ in range(100):
        alive = [each for each in lines if is_open(each)]
        if len(alive) <= want:
            break
    return len(alive)


def test_half_open_connections_are_few_and_keep_nobody_out(house):
    here = house(door.Limits(handshakes=8, handshakes_per_address=4))
    here.identity("one")

    def work():
        lines = [here.line() for _ in range(60)]
        assert count_open(lines, 4) == 4
        another = here.line(source_address=("127.0.0.2", 0))
        assert here.member("one").push().status_code == 200
        assert is_open(another)

    here.run(work)


def test_of_ipv6_a_network_counts_as_one_address():
    assert door._network("2001:db8::1") == door._network("2001:db8::ffff:1") != door._network("2001:db8:0:1::1")
    assert door._network("::ffff:10.0.0.1") == "10.0.0.1" == door._network("10.0.0.1")
    assert door._network("fe80::1%eth0") == "fe80::/64"


def test_one_machine_cannot_fill_the_door(house):
    here = house(door.Limits(connections_per_machine=3))
    here.identity("one"), here.identity("other")

    def work():
        mine = here.member("other")
        assert mine.push().status_code == 200
        lines = [here.line("one") for _ in range(9)]
        assert count_open(lines, 3) == 3
        assert mine.push().status_code == 200

    here.run(work)


# ---- how much ----------------------------------------------------------------------------------------------------


def begin(member, here, length, sent=b"", call="pull-messages"):
    """Begin a call whose body does not come."""
    line = here.line("one")
    head = "".join(f"{name}: {value}\r\n" for name, value in member.headers().items())
    line.sendall(f"POST /v1/fleet/{call} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{head}\r\n".encode() + sent)
    return line


def status(line):
    line.settimeout(10)
    return int(line.recv(100).split()[1])


def test_a_body_that_does_not_come_is_given_up_and_nothing_of_it_goes_on(house, monkeypatch):
    monkeypatch.setattr(gateway, "_WHOLE", 0.3)
    here = house()
    here.identity("one")

    def work():
        member = here.member("one")
        line = begin(member, here, 1000, b"x" * 999)
        assert status(line) == 408
        assert count_open([line], 0) == 0
        begin(member, here, 1000, b"x" * 500).close()  # it went away in the middle

    here.run(work)
    assert here.heard == []


def test_a_node_gets_so_much_memory_and_so_many_bytes_a_second_and_no_more(house):
    here = house(budget=Budget(held=3000, held_by_node=2000, burst=10_000, rate=1.0))
    here.identity("one"), here.identity("other")

    def work():
        member, decent = here.member("one"), here.member("other")
        lines = [begin(member, here, 5000, bytes(1500)) for _ in range(2)]
        assert 503 in {status(line) for line in lines[1:]}
        assert decent.push().status_code == 200
        lines[0].close()
        for _ in range(50):
            if (got := member.post("pull-messages", bytes(1000)).status_code) == 429:
                break
        assert got == 429
        assert decent.push().status_code == 200

    here.run(work)


@pytest.mark.parametrize("size", [4 * 2**20 + 1, 16 * 2**20])
def test_a_body_has_at_most_four_mebibytes(house, size):
    here = house()
    here.identity("one")
    assert here.run(lambda: here.member("one").post("push-object", bytes(size)).status_code) in {413, 444}
    assert here.heard == []


def test_an_answer_is_bounded_too_and_never_compressed(house, monkeypatch):
    """A machine's own gateway reads what a coordinator answers; that one may lie."""
    monkeypatch.setattr(gateway, "_MAX_ANSWER", 10_000)
    here = house()
    here.identity("one")

    def work():
        member = here.member("one")
        here.answer = bytes(10_000)
        assert member.post("pull-messages", b"").content == here.answer
        here.answer = bytes(10_001)
        assert member.post("pull-messages", b"").status_code == 502
        here.answer, here.extra = b"", [(b"content-encoding", b"gzip")]
        assert member.post("pull-messages", b"").status_code == 502

    here.run(work)


# ---- what --------------------------------------------------------------------------------------------------------


def changed(change, **said):
    asked = reply_of(7, **said)
    change(asked)
    return asked


def deep(count):
    asked = reply_of(7, 1)
    tree = asked.message_object_trees[0]
    for number in range(1, count):
        tree = tree.children.add(object_id=name_of(number))
    return asked


def objects(**fields):
    given = {"node": node_pb2.Node(node_id=7), "run_id": 3, "session_id": "s", "object_id": name_of(1)}
    return message_pb2.PushObjectRequest(**given | fields)


OTHER_NODE = fleet_pb2.PushMessagesRequest(node=node_pb2.Node(node_id=8)).SerializeToString()


@pytest.mark.parametrize(
    ("call", "body", "code"),
    [
        ("push-messages", reply_of(7), None),
        ("push-messages", reply_of(7, 16), None),
        ("push-messages", deep(16), None),
        ("push-messages", reply_of(7, 17), 413),
        ("push-messages", deep(17), 413),
        ("push-messages", reply_of(7, 100_000), 413),
        ("push-messages", reply_of(7, message_type="x" * 2**18), 413),
        ("push-messages", reply_of(7, message_id=name_of(5)), 403),  # objects of another message
        ("push-messages", changed(lambda asked: asked.message_object_trees.add()), 400),
        ("push-messages", changed(lambda asked: asked.ClearField("message_object_trees")), 400),
        ("push-messages", changed(lambda asked: asked.message_object_trees[0].children.add(object_id="..")), 400),
        ("push-messages", reply_of(7, src_node_id=1), 403),
        ("push-messages", reply_of(7, src_node_id=1, dst_node_id=8, reply_to_message_id=""), 403),
        ("push-messages", reply_of(7, reply_to_message_id=""), 403),
        ("push-messages", changed(lambda asked: asked.messages_list.add()), 400),
        ("push-messages", reply_of(7).SerializeToString() + OTHER_NODE, 403),  # protobuf takes the last of two values
        ("push-messages", b"", 400),
        ("push-messages", b"nonsense", 400),
        ("push-object", objects(), None),
        ("push-object", objects(object_content=bytes(2**22 - 200)), None),
        ("push-object", objects(session_id=""), 400),
        ("push-object", objects(object_id="abc"), 400),
        ("push-object", b"nonsense", 400),
        ("pull-messages", b"whatever it is", None),
    ],
)
def test_of_messages_only_small_replies_of_the_node_itself_reach_flower(call, body, code):
    body = body if isinstance(body, bytes) else body.SerializeToString()
    if code is None:
        replies.judge(f"/v1/fleet/{call}", body)
        return
    with pytest.raises(RefusedError) as refused:
        replies.judge(f"/v1/fleet/{call}", body)
    assert refused.value.status == code
