"""Whole transfers between a node and a server, over real TLS connections."""

from __future__ import annotations

import random
import threading
import time

import pytest
from exchange_house import NOW, Wire, noise, wait_for

from molehill.errors import FederationError, MessageError, MolehillError
from molehill.pki import Identity
from molehill.wire.message import digest
from molehill.wire.remote import Patience
from molehill_server.exchange.serve import WINDOW


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


def test_no_proxy_stands_between_a_node_and_the_exchange(serving, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert serving.node().put(b"delta", NOW) == digest(b"delta")


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


@pytest.mark.parametrize("size", [2**20, 2**23])
def test_little_more_than_the_blobs_crosses(serving, wire, size):
    """All that TCP carries counts, both ways: the handshake and the frames of TLS, HTTP/2 and the protocol."""
    node, blob = serving.node(port=wire.port), noise(size)
    name = node.put(blob, NOW)
    serving.give(read=[name])
    assert node.get(name) == blob
    assert 2 * size < sum(map(len, wire.seen.values())) < 1.02 * 2 * size


def test_nothing_readable_crosses(serving, wire):
    node, blob = serving.node(port=wire.port), (b"a row of private data; " * 2**16)[: 2**20] + noise(2**20)
    name = node.put(blob, NOW)
    serving.give(read=[name])
    assert node.get(name) == blob
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
    assert len(wire.seen["up"]) - before < 1.02 * (len(blob) - 2 * 2**20 + WINDOW)  # what was on its way is lost


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


def test_a_slow_link_of_long_delay_is_no_stall(house):
    """Each way takes longer than any silence that is borne, and longer than a call: it moves all the time."""
    house.give()
    house.start(idle=1.0)
    wire = Wire(house.port)
    try:
        wire.delay, wire.rate = 0.1, 6e5
        node, blob = house.node(port=wire.port, patience=Patience(stalled=1.0, call=1.5, slowest=1e5)), noise(10**6)
        name = node.put(blob, NOW)
        assert house.blobs.get(name) == blob
        house.give(read=[name])
        assert node.get(name) == blob
        assert len(wire.seen["up"]) + len(wire.seen["down"]) < 1.05 * 2 * len(blob)  # in one go
    finally:
        house.close()
        wire.close()


def test_a_link_slower_than_allowed_takes_several_calls(serving, wire):
    wire.rate = 1e6
    node, blob = (
        serving.node(port=wire.port, patience=Patience(stalled=20, pause=0.02, call=0.7, slowest=1e9)),
        noise(10**6),
    )
    name = node.put(blob, NOW)
    assert serving.blobs.get(name) == blob
    serving.give(read=[name])
    assert node.get(name) == blob


@pytest.mark.parametrize("seed", range(2))
def test_a_link_that_is_cut_again_and_again_carries_it_all(serving, wire, seed):
    wire.rate, chance, over, cuts = 4e6, random.Random(seed), threading.Event(), 0
    node, blob = serving.node(port=wire.port, patience=Patience(stalled=20, pause=0.02)), noise(4 * 2**20)

    def cut():
        nonlocal cuts
        while not over.wait(chance.uniform(0.2, 0.6)):
            wire.cut()
            cuts += 1

    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        name = node.put(blob, NOW)
        assert serving.blobs.get(name) == blob
        serving.give(read=[name])
        assert node.get(name) == blob
    finally:
        over.set()
        cutting.join()
    assert cuts >= 3
    assert not serving.files("parts")


def test_many_nodes_at_once_take_little_memory(house, authority):
    """Real connections, and more bytes under way than the server may take."""
    names = [f"lab-{number}" for number in range(40)]
    identities = [Identity.load(authority.issue(name)) for name in names]
    for name in names:
        house.give(name)
    house.spawn("--streams", "8")
    before, blob, failed = house.peak(), noise(4 * 2**20), []

    def upload(name, identity):
        try:
            house.node(identity=identity, patience=Patience(stalled=60)).put(name.encode() + blob, NOW)
        except MolehillError as error:
            failed.append(error)

    threads = [threading.Thread(target=upload, args=each) for each in zip(names, identities, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(house.files("blobs")) == len(names)
    assert house.peak() - before < 80  # of 160 MiB


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
