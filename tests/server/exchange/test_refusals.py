"""What a node must not do at the exchange, tried over real connections."""

from __future__ import annotations

import json
import threading
import time

import grpc
import pytest
from exchange_house import NOW, noise, put, refusal, slowly, wait_for
from tiny_pki import serial

from molehill.errors import MessageError
from molehill.wire.exchange import Place
from molehill.wire.message import digest
from molehill.wire.remote import CHUNK
from molehill_protos.v1 import exchange_pb2 as pb
from molehill_server.exchange import traffic


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


def test_a_node_puts_nothing_but_deltas(serving):
    with pytest.raises(ValueError, match="a node can only put a delta"):
        serving.node().put(b"x")
