"""Everything a node must not do, tried over real connections."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest
from exchange_house import NOW, QUICK, noise, wait_for
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_pki import Authority, serial

from molehill.errors import ConfigError, FederationError, IdentityError, MessageError
from molehill.pki import Identity
from molehill.wire.exchange import Place
from molehill.wire.message import digest
from molehill.wire.remote import CHUNK, SERVICE, GrpcExchange, Patience
from molehill_protos.v1 import exchange_pb2 as pb
from molehill_server.exchange import traffic
from molehill_server.exchange.spool import Part

SECOND = Patience(stalled=0.5, pause=0.02)


def put(blob, *, offset=0, length=None, name=None, run="run", number=3, size=CHUNK):
    """The messages of an upload."""
    name = name or digest(blob)
    length = len(blob) if length is None else length
    yield pb.PutChunk(header=pb.PutHeader(run=run, round=number, digest=name, length=length, offset=offset))
    for start in range(offset, len(blob), size):
        yield pb.PutChunk(data=blob[start : start + size])


def refusal(call, *arguments, **options):
    try:
        result = call(*arguments, timeout=20, **options)
        pytest.fail(f"answered {list(result) if hasattr(result, '__next__') else result}")
    except grpc.RpcError as error:
        return error.code().name, error.details()


# ---- who -------------------------------------------------------------------------------------------------------


def test_nobody_gets_an_answer_without_a_certificate(serving):
    stub = serving.stub(key=False)
    for call, request in (
        (stub.Get, pb.GetRequest(digest="0" * 64)),
        (stub.Offset, pb.OffsetRequest()),
        (stub.Put, put(b"x")),
        (health_pb2_grpc.HealthStub(serving.channel).Check, health_pb2.HealthCheckRequest()),
    ):
        assert refusal(call, request)[0] == "UNAVAILABLE"
    with grpc.insecure_channel(f"127.0.0.1:{serving.port}") as plain:
        assert refusal(health_pb2_grpc.HealthStub(plain).Check, health_pb2.HealthCheckRequest())[0] == "UNAVAILABLE"


def test_health_answers_those_with_a_certificate(serving):
    serving.stub()
    check = health_pb2_grpc.HealthStub(serving.channel).Check
    for name in ("", SERVICE):
        assert check(health_pb2.HealthCheckRequest(service=name), timeout=20).status == 1


def test_a_node_of_another_authority_is_refused(serving, tmp_path):
    stranger = Authority(tmp_path, "other-ca").issue("lab-1")
    trusting = replace(Identity.load(stranger), authority=Identity.load(serving.identities["lab-1"]).authority)
    with pytest.raises(FederationError, match="knows this certificate's authority"):
        serving.node(identity=trusting, patience=SECOND).put(b"x", NOW)
    assert not serving.files("blobs")


def test_a_server_of_another_authority_is_refused_at_once(serving, tmp_path):
    mixed = Authority(tmp_path, "other-ca").issue("lab-1")
    with pytest.raises(ConfigError, match=r"server's certificate is not accepted.*ca\.pem"):
        serving.node(identity=mixed, patience=Patience(stalled=60)).put(b"x", NOW)


def test_a_revoked_certificate_is_refused_from_the_next_call_on(serving):
    node, other = serving.node(), serving.node("lab-2")
    serving.give("lab-2")
    node.put(b"x", NOW)
    (serving.folder / "revoked.json").write_text(json.dumps([serial(serving.identities["lab-1"])]))
    for call in (lambda: node.put(b"x", NOW), lambda: node.get("0" * 64), lambda: node.has("0" * 64)):
        with pytest.raises(MessageError, match=r"this certificate was revoked.*new certificate"):
            call()
    other.put(b"y", NOW)


def test_health_is_not_told_to_a_revoked_certificate(serving):
    serving.stub()
    stub, request = health_pb2_grpc.HealthStub(serving.channel), health_pb2.HealthCheckRequest()
    assert stub.Check(request, timeout=20).status == next(stub.Watch(request, timeout=20)).status == 1
    (serving.folder / "revoked.json").write_text(json.dumps([serial(serving.identities["lab-1"])]))
    assert refusal(stub.Check, request) == ("UNAUTHENTICATED", "this certificate was revoked.")
    with pytest.raises(grpc.RpcError, match="this certificate was revoked"):
        next(stub.Watch(request, timeout=20))


def test_a_damaged_list_of_revoked_certificates_lets_nobody_in(serving):
    (serving.folder / "revoked.json").write_text("[")
    with pytest.raises(FederationError, match="list of revoked certificates is damaged"):
        serving.node(patience=SECOND).put(b"x", NOW)


@pytest.mark.parametrize("names", [("../lab-1",), ("lab 1",), ("lab-1", "lab-2")])
def test_a_common_name_that_cannot_be_a_node_is_refused(serving, authority, names):
    identity = authority.issue(names[0], extra_names=names[1:])
    with pytest.raises(MessageError, match="the common name of this certificate"):
        serving.node(identity=identity).put(b"x", NOW)


def test_a_certificate_that_expired_is_found_on_the_node(serving, authority):
    identity = authority.issue("late", until=-timedelta(hours=1))
    with pytest.raises(IdentityError, match=r"it expired at .* clock of this machine says .* Set the clock"):
        Identity.load(identity)


@pytest.mark.parametrize("damage", ["missing", "garbled", "pair"])
@pytest.mark.parametrize("file", ["key.pem", "cert.pem"])
def test_an_identity_that_cannot_be_used_says_which_file(authority, file, damage):
    identity, other = authority.issue(f"{file}-{damage}"), authority.issue("other")
    if damage == "missing":
        (identity / file).unlink()
    elif damage == "garbled":
        (identity / file).write_text("nothing")
    else:
        (identity / file).write_bytes((other / file).read_bytes())
    with pytest.raises(
        IdentityError, match="do not belong together|not signed by" if damage == "pair" else "there is no|not a "
    ):
        Identity.load(identity)


# ---- what ------------------------------------------------------------------------------------------------------


def test_a_node_reads_only_what_its_own_plan_names(serving):
    mine, theirs = serving.blobs.put(b"mine"), serving.blobs.put(b"theirs")
    serving.give("lab-1", read=[mine])
    serving.give("lab-2", read=[theirs])
    node = serving.node()
    assert node.get(mine) == b"mine"
    for name in (theirs, "0" * 64):
        with pytest.raises(MessageError, match=f"plan of lab-1 does not name blob {name[:12]}"):
            node.get(name)


def test_a_blob_that_was_dropped_and_one_that_is_too_large(serving):
    name = serving.blobs.put(noise(2**20))
    serving.give(read=[name])
    with pytest.raises(MessageError, match="a blob of 1048576 bytes, the limit is 1000"):
        serving.node().get(name, 1000)
    serving.blobs.drop(name)
    assert not serving.node().has(name)
    with pytest.raises(MessageError, match=r"there is no blob .* dropped since"):
        serving.node().get(name)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_nothing_but_a_digest_becomes_a_path(serving, name):
    stub = serving.stub()
    for call, request in (
        (stub.Get, pb.GetRequest(digest=name)),
        (stub.Put, put(b"x", name=name or " ")),
    ):
        code, text = refusal(call, request)
        assert (code, "is no digest" in text) == ("INVALID_ARGUMENT", True)


@pytest.mark.parametrize(
    ("grant", "at", "text"),
    [
        (None, NOW, "there is no plan for lab-2"),
        ({"write": False}, NOW, "lab-2 may deliver nothing"),
        ({}, Place("run", 2), "may deliver for round 3 of run, not for round 2 of run"),
        ({}, Place("run", 4), "not for round 4"),
        ({}, Place("../run", 3), r"not for round 3 of \.\./run"),
    ],
)
def test_a_node_writes_only_in_its_round(serving, grant, at, text):
    if grant is not None:
        serving.give("lab-2", **grant)
    with pytest.raises(MessageError, match=text):
        serving.node("lab-2").put(b"x", at)
    assert not serving.files("blobs")
    assert not serving.files("parts")


@pytest.mark.parametrize("size", [6, 3 * CHUNK])
def test_a_second_delta_in_a_round_is_refused(serving, size):
    node = serving.node()
    first = node.put(noise(size), NOW)
    with pytest.raises(MessageError, match=f"delivered another delta, {first[:12]}, for round 3 of run"):
        node.put(noise(size, 1), NOW)
    assert serving.files("blobs") == [first]


@pytest.mark.parametrize("size", [6, 3 * CHUNK])
def test_a_node_cannot_call_another_blob_its_delta(serving, size):
    shared = serving.blobs.put(noise(size))
    serving.give(read=[shared])
    with pytest.raises(MessageError, match="is not a delta of lab-1"):
        serving.node().put(noise(size), NOW)
    assert not serving.files("receipts")
    assert not serving.files("parts")
    assert serving.files("blobs") == [shared]


def test_what_is_left_of_another_delta_is_not_gone_on_with(serving):
    left, blob = noise(2 * CHUNK, 1), noise(3 * CHUNK)
    assert refusal(serving.stub().Put, put(left, length=len(left) + 1, name="0" * 64))[0] == "OUT_OF_RANGE"
    assert serving.files("parts")
    assert serving.blobs.get(serving.node().put(blob, NOW)) == blob


def test_too_large_is_refused_before_a_byte_is_kept(serving):
    serving.give(max_bytes=1000)
    with pytest.raises(MessageError, match="a delta of 1001 bytes, the limit is 1000"):
        serving.node().put(noise(1001), NOW)
    assert not serving.files("parts")


def test_uploads_that_lie(serving):
    stub, blob = serving.stub(), noise(3000)
    lies = {
        "more data than the header": put(noise(3000, 1), length=2000, size=1000),
        "the data ends at byte 3000 of 4000": put(blob, length=4000),
        "begins at byte 1000, the server has 3000": put(blob, offset=1000),
        "an upload begins with a header": iter([pb.PutChunk(data=b"x")]),
        "begins with a header": iter(()),
        "after the header there is only data": iter([*put(b"x"), *put(b"x")]),
    }
    for text, messages in lies.items():
        code, details = refusal(stub.Put, messages)
        assert (code in {"INVALID_ARGUMENT", "OUT_OF_RANGE"}, text in details) == (True, True)
    assert not serving.files("blobs")
    code, details = refusal(stub.Put, put(b"one thing", name=digest(b"another")))
    assert (code, "does not fit its digest" in details) == ("DATA_LOSS", True)
    assert not serving.files("parts")
    assert not serving.files("receipts")


def test_a_part_that_was_damaged_on_the_disk_is_sent_again(serving):
    blob = noise(3000)
    (serving.folder / "parts" / "lab-1").mkdir(parents=True)
    (serving.folder / "parts" / "lab-1" / "run.3.part").write_bytes(bytes(2000))
    assert serving.blobs.get(serving.node().put(blob, NOW)) == blob


def test_a_message_over_the_limit_is_not_taken(serving):
    blob = bytes(2**20 + 2**11)
    code, _ = refusal(serving.stub().Put, put(blob, size=len(blob)))
    assert code == "RESOURCE_EXHAUSTED"


def slowly(blob, go_on, started=None):
    """An upload that stops after its first chunk until told to go on."""
    messages = put(blob, size=1000)
    yield next(messages)
    yield next(messages)
    if started is not None:
        started.set()
    go_on.wait(20)
    yield from messages


def test_a_round_that_ends_in_mid_upload_keeps_nothing(serving):
    go_on, blob = threading.Event(), noise(3000)
    call = serving.stub().Put.future(slowly(blob, go_on), timeout=20)
    wait_for(lambda: serving.files("parts"))
    serving.give(round=4)
    go_on.set()
    assert "may deliver for round 4 of run, not for round 3" in call.exception(20).details()
    assert not serving.files("blobs")
    assert not serving.files("receipts")


def revoke(house, name="lab-1"):
    (house.folder / "revoked.json").write_text(json.dumps([serial(house.identities[name])]))


def next_round(house):
    house.give(round=4)


@pytest.mark.parametrize(("change", "code"), [(revoke, "UNAUTHENTICATED"), (next_round, "PERMISSION_DENIED")])
def test_an_upload_that_may_go_on_no_longer_is_ended_though_nothing_comes(serving, monkeypatch, change, code):
    monkeypatch.setattr(traffic, "_LOOK", 0.05)
    go_on = threading.Event()
    call = serving.stub().Put.future(slowly(noise(3000), go_on), timeout=20)
    wait_for(lambda: serving.files("parts"))
    change(serving)
    assert call.exception(10).code().name == code
    go_on.set()
    assert not serving.files("blobs")


@pytest.mark.parametrize(("change", "code"), [(revoke, "UNAUTHENTICATED"), (next_round, "PERMISSION_DENIED")])
def test_a_download_that_may_go_on_no_longer_is_ended(house, monkeypatch, change, code):
    monkeypatch.setattr(traffic, "_LOOK", 0.05)
    name = house.blobs.put(noise(16 * 10**6))
    house.give(read=[name])
    house.start(rate=4e6)
    call = house.stub().Get(pb.GetRequest(digest=name), timeout=20)
    next(call)
    change(house)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code().name == code


def test_who_is_revoked_in_mid_upload_delivers_nothing(serving):
    """Also between two looks."""
    go_on = threading.Event()
    call = serving.stub().Put.future(slowly(noise(3000), go_on), timeout=20)
    wait_for(lambda: serving.files("parts"))
    revoke(serving)
    go_on.set()
    assert call.exception(20).details() == "this certificate was revoked."
    assert not serving.files("blobs")
    assert not serving.files("receipts")


def test_who_is_revoked_while_it_waits_gets_no_turn(house, monkeypatch):
    for node in ("lab-1", "lab-2"):
        house.give(node)
    house.start(streams=1)
    go_on = threading.Event()
    first = house.stub().Put.future(slowly(noise(3000, 1), go_on), timeout=20)
    wait_for(lambda: house.files("parts"))
    second = house.stub("lab-2").Put.future(put(noise(3000, 2)), timeout=20)
    time.sleep(0.2)
    revoke(house, "lab-2")
    go_on.set()
    assert second.exception(20).code().name == "UNAUTHENTICATED"
    first.result(20)


def test_a_newer_upload_takes_the_place_of_an_older_one(serving):
    go_on, blob = threading.Event(), noise(3000)
    older = serving.stub().Put.future(slowly(blob, go_on), timeout=20)
    part = serving.folder / "parts" / "lab-1" / "run.3.part"
    wait_for(lambda: part.exists() and part.stat().st_size == 1000)
    name = serving.node().put(blob, NOW)
    go_on.set()
    assert older.exception(20).code().name == "ABORTED"
    assert serving.blobs.get(name) == blob


def test_a_node_cannot_fill_the_log(serving, caplog):
    for number in range(5):
        assert refusal(serving.stub().Get, pb.GetRequest(digest=f"{number}" * 64))[0] == "PERMISSION_DENIED"
    said = [record.getMessage() for record in caplog.records if record.name == "molehill.exchange"]
    assert len([line for line in said if line.startswith("refused get of lab-1")]) == 1


# ---- how much --------------------------------------------------------------------------------------------------


def test_transfers_over_the_bound_wait_and_those_over_the_queue_come_again(house):
    for node in ("lab-1", "lab-2"):
        house.give(node)
    house.start(streams=1, waiting=0)
    go_on, blob = threading.Event(), noise(3000)
    first = house.stub().Put.future(slowly(blob, go_on), timeout=20)
    wait_for(lambda: house.files("parts"))
    code, text = refusal(house.stub("lab-2").Put, put(blob))
    assert (code, text) == ("UNAVAILABLE", "the exchange is busy; try again")
    with pytest.raises(FederationError, match="busy"):
        house.node("lab-2", patience=SECOND).put(blob, NOW)
    go_on.set()
    assert first.result(20).digest == digest(blob)


def test_a_transfer_waits_for_its_turn(house):
    for node in ("lab-1", "lab-2"):
        house.give(node)
    house.start(streams=1)
    go_on, one, two = threading.Event(), noise(3000, 1), noise(3000, 2)
    first = house.stub().Put.future(slowly(one, go_on), timeout=20)
    wait_for(lambda: house.files("parts"))
    second = house.stub("lab-2").Put.future(put(two), timeout=20)
    time.sleep(0.2)
    assert [first.done(), second.done()] == [False, False]
    assert house.files("parts") == ["run.3.part"]
    go_on.set()
    assert second.result(20).digest == digest(two)


def test_one_node_has_a_bound_of_its_own(house):
    house.give()
    house.give("lab-2")
    house.start(streams_per_node=1)
    go_on = threading.Event()
    first = house.stub().Put.future(slowly(noise(3000), go_on), timeout=20)
    wait_for(lambda: house.files("parts"))
    code, text = refusal(house.stub().Put, put(b"x"))
    assert (code, text) == ("UNAVAILABLE", "lab-1 has 1 transfers under way; try again")
    house.node("lab-2").put(b"y", NOW)
    go_on.set()
    first.result(20)


def test_the_rate_of_a_node_is_bounded_both_ways(house):
    house.start(rate=4e6)
    blob = noise(2 * 10**6)
    house.give(read=[house.blobs.put(blob)])
    began = time.monotonic()
    house.node().put(noise(2 * 10**6, 1), NOW)
    house.node().get(digest(blob))
    assert time.monotonic() - began > 0.6  # 4 MB at 4 MB/s, less what the last chunks need not wait for


def test_a_node_that_falls_silent_loses_its_place(house):
    house.give()
    house.start(idle=0.2)
    go_on = threading.Event()
    code, text = refusal(house.stub().Put, slowly(noise(3000), go_on))
    go_on.set()
    assert code == "DEADLINE_EXCEEDED"
    assert "nothing was sent for 0 s" in text
    assert house.files("parts")  # what came stays, to go on with


def test_a_trickle_loses_its_place(house, monkeypatch):
    """One byte now and then is not silence."""
    monkeypatch.setattr(traffic, "_LOOK", 0.05)
    house.give()
    house.start(idle=0.5, slowest=1e4)
    blob = noise(3000)

    def drop_by_drop():
        for message in put(blob, size=1):
            time.sleep(0.05)
            yield message

    began = time.monotonic()
    code, text = refusal(house.stub().Put, drop_by_drop())
    assert (code, "are too few; go on from there" in text) == ("DEADLINE_EXCEEDED", True)
    assert time.monotonic() - began < 5
    assert house.files("parts")
    assert house.blobs.get(house.node().put(blob, NOW)) == blob


def test_time_that_the_server_takes_is_not_the_nodes(house, monkeypatch):
    monkeypatch.setattr(traffic, "_LOOK", 0.05)
    house.give()
    house.start(idle=0.5, rate=1e6, slowest=1e8)
    house.node().put(noise(2 * 10**6), NOW)


def test_four_nodes_leave_the_others_half_of_the_turns():
    limits = traffic.Limits()
    assert 4 * limits.streams_per_node <= limits.streams / 2


def test_a_full_disk_is_said_and_nothing_half_written_is_left(serving, monkeypatch):
    blob, write = noise(3 * CHUNK), Part.write

    def full(part, data):
        if part.size >= CHUNK:
            monkeypatch.setattr(part, "_file", Full(part._file))
        write(part, data)

    class Full:
        def __init__(self, file):
            self.close = file.close

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Part, "write", full)
    with pytest.raises(MessageError, match=r"the server's disk is full\. Ask whoever runs the server"):
        serving.node().put(blob, NOW)
    assert not serving.files("parts")
    assert not serving.files("blobs")
    assert not serving.files("receipts")
    monkeypatch.setattr(Part, "write", write)
    serving.node().put(blob, NOW)


def test_the_reserve_of_the_coordinator_is_left_free(house):
    house.give()
    house.start(reserve=2**60)
    with pytest.raises(MessageError, match="disk is full"):
        house.node().put(b"x", NOW)
    assert not house.files("parts")


# ---- the rest --------------------------------------------------------------------------------------------------


def test_old_rounds_are_collected_and_what_plans_name_is_not(house):
    house.give()
    house.start(collect=0.05)
    shared = house.blobs.put(b"shared")
    house.give("lab-2", read=[shared])
    name = house.node().put(b"delta", NOW)
    go_on = threading.Event()
    open_upload = house.stub("lab-2").Put.future(slowly(noise(3000), go_on), timeout=20)
    wait_for(lambda: house.files("parts"))
    time.sleep(0.2)
    assert house.files("blobs") == sorted([name, shared])
    assert house.files("receipts") == ["lab-1.json"]
    for node in ("lab-1", "lab-2"):
        house.give(node, round=4, read=[shared])
    wait_for(lambda: not house.files("receipts") and not house.files("parts"))
    assert house.files("blobs") == [shared]
    go_on.set()
    assert open_upload.exception(20).code().name == "PERMISSION_DENIED"
    assert house.files("blobs") == [shared]


def test_a_damaged_grant_lets_nothing_happen_and_nothing_be_collected(house):
    house.give()
    house.start(collect=0.05)
    name = house.node().put(b"delta", NOW)
    (house.folder / "grants" / "lab-1.json").write_text("{")
    time.sleep(0.2)
    assert house.files("blobs") == [name]
    with pytest.raises(FederationError, match="grant for lab-1 is damaged"):
        house.node(patience=SECOND).put(b"delta", NOW)


def test_a_port_in_use_ends_in_words(house):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "molehill_server.exchange", "--folder", str(house.folder), "--listen", listen]
        command += ["--identity", str(house.identities["server"])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.exit_code
    assert f"error: {listen}: cannot listen there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_told_server_ends_by_itself_and_says_what_it_did(house):
    house.give()
    house.spawn()
    house.node().put(b"x", NOW)
    assert house.end(house.process, signal.SIGTERM) == 0
    assert "lab-1 delivered" in house.log()
    assert "Traceback" not in house.log()


def test_a_node_puts_nothing_but_deltas(serving):
    with pytest.raises(ValueError, match="a node can only put a delta"):
        serving.node().put(b"x")


def test_a_closed_exchange_does_not_hang(serving):
    identity = Identity.load(serving.identities["lab-1"])
    node = GrpcExchange(f"127.0.0.1:{serving.port}", identity, patience=QUICK)
    node.close()
    with pytest.raises(ValueError, match="closed"):
        node.put(b"x", NOW)
