"""How much a node may take of the exchange: transfers, rates, time and room on the disk."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
from exchange_house import NOW, SECOND, noise, put, refusal, slowly, wait_for

from molehill.errors import FederationError, MessageError
from molehill.wire.message import digest
from molehill.wire.remote import CHUNK
from molehill_server.exchange import traffic
from molehill_server.exchange.spool import Part


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
