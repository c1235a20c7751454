from __future__ import annotations

import sys
import threading
import uuid
from pathlib import Path

import pytest

from molehill.errors import ConfigError, FederationError, MessageError
from molehill.wire.connect import connect
from molehill.wire.exchange import Exchange
from molehill.wire.message import digest


@pytest.fixture(params=["memory:{name}", "folder:{folder}", "fsspec:memory://{name}/blobs", "fsspec:file://{folder}"])
def exchange(request: pytest.FixtureRequest, tmp_path: Path) -> Exchange:
    return connect(request.param.format(name=uuid.uuid4(), folder=tmp_path / "deep" / "blobs"))


def test_put_get_has_drop(exchange: Exchange) -> None:
    name = exchange.put(b"abc")
    assert name == digest(b"abc") == exchange.put(b"abc")
    assert exchange.has(name)
    assert exchange.get(name) == b"abc"
    exchange.drop(name)
    exchange.drop(name)
    assert not exchange.has(name)
    with pytest.raises(MessageError, match="no blob"):
        exchange.get(name)


def test_what_is_too_large_is_not_read(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    name = exchange.put(b"abc")
    assert exchange.get(name, 3) == b"abc"
    monkeypatch.setattr("molehill.wire.local.digest", lambda _: pytest.fail("it was read"))
    with pytest.raises(MessageError, match="a blob of 3 bytes, the limit is 2"):
        exchange.get(name, 2)


def test_many_threads_may_put_the_same(exchange: Exchange) -> None:
    blob = bytes(200_000)
    threads = [threading.Thread(target=exchange.put, args=(blob,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exchange.get(digest(blob)) == blob


def test_memory_is_shared_by_name() -> None:
    one, two = f"memory:{uuid.uuid4()}", f"memory:{uuid.uuid4()}"
    name = connect(one).put(b"x")
    assert connect(one).has(name)
    assert not connect(two).has(name)


@pytest.mark.parametrize("kind", ["folder:", "fsspec:file://"])
def test_a_folder_is_shared_and_leaves_no_parts(kind: str, tmp_path: Path) -> None:
    name = connect(f"{kind}{tmp_path}").put(b"x")
    assert connect(f"{kind}{tmp_path}").get(name) == b"x"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", ["folder:", "fsspec:file://"])
def test_a_damaged_file_is_refused_and_can_be_put_again(kind: str, tmp_path: Path) -> None:
    exchange = connect(f"{kind}{tmp_path}")
    name = exchange.put(b"abc")
    (tmp_path / name).write_bytes(b"ab")
    with pytest.raises(MessageError, match="does not fit its digest"):
        exchange.get(name)
    assert exchange.put(b"abc") == name
    assert exchange.get(name) == b"abc"


@pytest.mark.parametrize("kind", ["folder:", "fsspec:file://"])
@pytest.mark.parametrize("name", ["../secret", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_nothing_but_a_digest_becomes_a_path(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    exchange = connect(f"{kind}{tmp_path / 'blobs'}")
    for call in (exchange.get, exchange.has, exchange.drop):
        with pytest.raises(MessageError, match="is no digest"):
            call(name)
    assert (tmp_path / "secret").exists()


@pytest.mark.parametrize("address", ["", "memory:", "folder:", "fsspec:", "ftp:host", "memory"])
def test_unknown_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="unknown exchange"):
        connect(address)


def test_a_store_that_fsspec_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nowhere://x: cannot use the object store .* Use a URL that fsspec knows"):
        connect("fsspec:nowhere://x")


def test_fsspec_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"pip install 'molehill\[object-storage\]'"):
        connect("fsspec:memory://x")


def test_a_store_that_fails_is_put_into_words(tmp_path: Path) -> None:
    exchange = connect(f"fsspec:file://{tmp_path / 'blobs'}")
    (tmp_path / "blobs").rmdir()
    (tmp_path / "blobs").write_text("no folder")
    with pytest.raises(FederationError, match=r"blobs: the object store fails .* Check that the store can be reached"):
        exchange.put(b"x")
