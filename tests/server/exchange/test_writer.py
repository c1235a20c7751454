"""The thread between an upload and the disk."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress

import pytest
from exchange_house import noise

from molehill.wire.message import digest
from molehill_server.exchange import spool
from molehill_server.exchange import writer as module
from molehill_server.exchange.spool import DiskFullError, Part
from molehill_server.exchange.writer import Writer, in_thread


class SlowPart(Part):
    """A part on a slow disk."""

    def write(self, data):
        time.sleep(0.002)
        super().write(data)


def test_all_is_written_in_order_and_little_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_AHEAD", 4000)
    begun = []
    monkeypatch.setattr(spool, "_BEGIN", 10_000)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: begun.append((start, size)), raising=False)
    blob, most = noise(105_000), 0

    async def upload(part):
        nonlocal most
        writer = Writer(part)
        for start in range(0, len(blob), 1000):
            await writer.give(memoryview(blob)[start : start + 1000])
            most = max(most, start + 1000 - part.size)
        await writer.end()
        await writer.end()

    with SlowPart(tmp_path / "part", len(blob)) as part:
        asyncio.run(upload(part))
        assert part.digest == digest(blob)
    assert begun == [(start, 10_000) for start in range(0, 100_000, 10_000)]  # the rest is left to the end
    assert (tmp_path / "part").read_bytes() == blob
    assert most <= 5000


def test_a_disk_that_is_full_stops_the_upload(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_AHEAD", 4000)

    def full(part, data):
        time.sleep(0.002)
        raise DiskFullError

    async def upload(part):
        writer = Writer(part)

        async def fill():
            for _ in range(100):
                await writer.give(memoryview(bytes(1000)))

        for call in (fill, writer.end):
            with pytest.raises(DiskFullError):
                await call()

    monkeypatch.setattr(Part, "write", full)
    with Part(tmp_path / "part", 100_000) as part:
        asyncio.run(upload(part))


def test_what_was_opened_for_a_caller_who_is_gone_is_closed(tmp_path):
    started, go_on, opened = threading.Event(), threading.Event(), []

    def open_slowly():
        started.set()
        go_on.wait(10)
        opened.append((tmp_path / "file").open("wb"))
        return opened[0]

    async def cancelled():
        task = asyncio.create_task(in_thread(open_slowly))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert opened[0].closed
