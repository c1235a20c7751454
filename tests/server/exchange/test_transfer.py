"""Whole transfers between a node and a server, over real TLS connections."""

from __future__ import annotations

import threading
import time

import pytest
from exchange_house import NOW, noise, wait_for

from molehill.errors import FederationError, MessageError
from molehill.wire.message import digest
from molehill.wire.remote import Patience


@pytest.mark.parametrize("size", [0, 1, 2**19, 3 * 2**20 + 7])
def test_what_a_node_puts_the_coordinator_gets_and_the_other_way_round(serving, size):
    node, blob = serving.node(), noise(size)
    name = node.put(blob, NOW)
    assert serving.blobs.get(name) == blob
    assert not serving.files("parts")
    assert not node.has(name)  # what it sent is not for it to read
    assert name == digest(blob)

    serving.give(read=[name])
    assert node.has(name)
    assert node.get(name, size) == blob


def test_a_cached_blob_is_not_fetched_again_and_a_damaged_one_is(serving, wire, tmp_path):
    blob = noise(2**20)
    name = serving.blobs.put(blob)
    serving.give(read=[name])
    node = serving.node(port=wire.port, cache=tmp_path / "cache")
    assert node.get(name) == blob
    before = len(wire.seen["down"])
    assert node.get(name) == blob
    assert len(wire.seen["down"]) < before + 1000
    (tmp_path / "cache" / name).write_bytes(b"other")
    assert node.get(name) == blob
    assert len(wire.seen["down"]) > before + 2**20


def test_the_cache_keeps_what_was_used_last(serving, tmp_path):
    names = [serving.blobs.put(noise(1000, seed)) for seed in range(3)]
    serving.give(read=names)
    node = serving.node(cache=tmp_path / "cache")
    node._cache._max_bytes = 2500
    for name in (*names[:2], names[0], names[2]):
        node.get(name)
        time.sleep(0.01)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {names[0], names[2]}


def test_nothing_readable_crosses_and_little_more_than_the_blob(serving, wire):
    node, blob = serving.node(port=wire.port), (b"a row of private data; " * 2**16)[: 2**20] + noise(2**20)
    name = node.put(blob, NOW)
    up = len(wire.seen["up"])
    serving.give(read=[name])
    assert node.get(name) == blob
    down = len(wire.seen["down"])
    assert 2**21 < up < 1.02 * 2**21
    assert 2**21 < down < 1.02 * 2**21
    for seen in wire.seen.values():
        assert b"private" not in seen
        assert name.encode() not in seen
        assert not any(blob[at : at + 16] in seen for at in range(0, len(blob), 4099))


def test_the_same_delta_again_gives_the_same_receipt_and_moves_nothing(serving, wire):
    node, blob = serving.node(port=wire.port), noise(2**20)
    name = node.put(blob, NOW)
    receipt = (serving.folder / "receipts" / "lab-1.json").read_bytes()
    before = len(wire.seen["up"])
    assert node.put(blob, NOW) == name
    assert len(wire.seen["up"]) < before + 10_000
    assert (serving.folder / "receipts" / "lab-1.json").read_bytes() == receipt


def test_a_delta_that_the_coordinator_dropped_can_be_sent_again(serving):
    node, blob = serving.node(), noise(1000)
    name = node.put(blob, NOW)
    serving.blobs.drop(name)
    node.put(blob, NOW)
    assert serving.blobs.get(name) == blob


def test_another_attempt_takes_another_delta_and_drops_the_first(serving):
    node = serving.node()
    first = node.put(b"first", NOW)
    serving.give(attempt=1)
    assert node.put(b"first", NOW) == first
    with pytest.raises(MessageError, match="another delta"):
        node.put(b"second", NOW)
    serving.give(attempt=2)
    second = node.put(b"second", NOW)
    assert not serving.blobs.has(first)
    assert serving.blobs.get(second) == b"second"


def test_an_upload_cut_on_the_way_goes_on_where_it_was(serving, wire):
    serving.close()
    serving.start(rate=4e6)
    wire._target = serving.port
    node, blob = serving.node(port=wire.port), noise(4 * 2**20)
    sending = threading.Thread(target=node.put, args=(blob, NOW))
    sending.start()
    part = serving.folder / "parts" / "lab-1" / "run.3.part"
    wait_for(lambda: part.exists() and part.stat().st_size >= 2 * 2**20)
    before = len(wire.seen["up"])
    wire.cut()
    sending.join(20)
    assert serving.blobs.get(digest(blob)) == blob
    assert len(wire.seen["up"]) - before < 1.02 * (len(blob) - 2 * 2**20)


def test_a_download_cut_on_the_way_goes_on_where_it_was(serving, wire):
    serving.close()
    serving.start(rate=4e6)
    wire._target = serving.port
    blob = noise(4 * 2**20)
    name = serving.blobs.put(blob)
    serving.give(read=[name])
    node, got = serving.node(port=wire.port), []
    fetching = threading.Thread(target=lambda: got.append(node.get(name)))
    fetching.start()
    wait_for(lambda: len(wire.seen["down"]) > 2 * 2**20)
    wire.cut()
    fetching.join(20)
    assert got == [blob]
    assert len(wire.seen["down"]) < 1.5 * len(blob)


def test_an_upload_survives_a_kill_of_the_server(house):
    house.give()
    house.spawn("--rate", "4e6")
    blob = noise(4 * 2**20)
    node = house.node(patience=Patience(stalled=30, pause=0.05))
    sending = threading.Thread(target=node.put, args=(blob, NOW))
    sending.start()
    part = house.folder / "parts" / "lab-1" / "run.3.part"
    wait_for(lambda: part.exists() and part.stat().st_size >= 2**20)
    house.kill()
    kept = part.stat().st_size
    assert 2**20 <= kept < len(blob)
    assert sending.is_alive()
    began = time.monotonic()
    house.spawn("--rate", "4e6")
    sending.join(30)
    assert not sending.is_alive()
    assert house.blobs.get(digest(blob)) == blob
    assert time.monotonic() - began < 30
    assert not house.files("parts")


def test_a_kill_between_receipt_and_blob_loses_nothing(serving):
    node, blob = serving.node(), noise(1000)
    name = node.put(blob, NOW)
    (serving.folder / "blobs" / name).rename(serving.folder / "parts" / "lab-1" / "run.3.part")
    assert node.put(blob, NOW) == name
    assert serving.blobs.get(name) == blob


def test_a_server_that_is_away_ends_in_words(house):
    house.port = 9
    node = house.node(patience=Patience(stalled=0.3, pause=0.05))
    with pytest.raises(FederationError, match=r"127\.0\.0\.1:9: the exchange has not answered for 0 s"):
        node.put(b"x", NOW)
