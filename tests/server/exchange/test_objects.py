"""Whole blobs in an object store, unfinished ones on the disk."""

from __future__ import annotations

import uuid

import pytest
from exchange_house import NOW, noise, wait_for

from molehill.errors import FederationError, MessageError
from molehill.wire.remote import CHUNK


@pytest.fixture(params=["memory://{name}", "file://{folder}"])
def stored(request, house, tmp_path):
    """A house whose blobs are in a store."""
    house.store = request.param.format(name=uuid.uuid4(), folder=tmp_path / "store")
    house.give()
    return house


@pytest.mark.parametrize("size", [0, 1, 5 * CHUNK + 7])
def test_blobs_go_through_the_store(stored, size):
    stored.start()
    node, blob = stored.node(), noise(size)
    name = node.put(blob, NOW)
    assert stored.blobs.get(name) == blob
    assert not stored.files("blobs")
    assert not stored.files("parts")
    stored.give(read=[name])
    assert node.get(name) == blob
    assert node.put(blob, NOW) == name
    stored.blobs.drop(name)
    with pytest.raises(MessageError, match="there is no blob"):
        node.get(name)


def test_another_attempt_drops_the_first_delta_and_old_rounds_are_collected(stored):
    stored.start(collect=0.05)
    first = stored.node().put(noise(1000), NOW)
    stored.give(attempt=1)
    second = stored.node().put(noise(1000, 1), NOW)
    assert not stored.blobs.has(first)
    assert stored.blobs.has(second)
    stored.give(round=4)
    wait_for(lambda: not stored.files("receipts"))
    assert not stored.blobs.has(second)


def test_a_store_that_fails_for_a_while_loses_nothing(stored, monkeypatch):
    stored.start()
    node, blob, tries = stored.node(), noise(2 * CHUNK), []
    take = type(stored.blobs).take

    def fail(store, file, name):
        tries.append(file.stat().st_size)
        if len(tries) < 3:
            raise FederationError("the object store fails")
        take(store, file, name)

    monkeypatch.setattr(type(stored.blobs), "take", fail)
    assert stored.blobs.get(node.put(blob, NOW)) == blob
    assert tries == [len(blob)] * 3  # and not sent again


def test_the_process_takes_the_url(house, tmp_path):
    house.store = f"file://{tmp_path / 'store'}"
    house.give()
    house.spawn()
    blob = noise(2 * CHUNK)
    name = house.node().put(blob, NOW)
    assert house.blobs.get(name) == blob
    assert [path.name for path in (tmp_path / "store").iterdir()] == [name]
