"""Upload and disk at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from molehill_server.exchange.spool import Part

T = TypeVar("T")

_AHEAD = 2**19  # bytes of an upload in memory that are not written yet


class Writer:
    """Writes a part in a thread of its own while the next pieces come; a task for every piece would cost as much as it.

    Args:
        part: The part; it is the writer's until it has ended.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._given = self._written = part.size
        self._pieces: SimpleQueue[memoryview | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._room, self._waiting = asyncio.Event(), False
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def give(self, piece: memoryview) -> None:
        """Have a piece written; returns when there is room for the next one.

        Raises:
            DiskFullError: There is no room on the disk.
        """
        self._given += len(piece)
        self._pieces.put(piece)
        while self._given - self._written > _AHEAD and self._failed is None:
            self._room.clear()
            self._waiting = True  # before the thread's progress is looked at again, as the thread does it the other way
            if self._given - self._written > _AHEAD // 2:
                await self._room.wait()
        self._raise()

    async def end(self) -> None:
        """Return when all pieces are written; the part is free again.

        Raises:
            DiskFullError: There was no room on the disk.
        """
        self._pieces.put(None)
        await in_thread(self._thread.join)
        self._raise()

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            try:
                if self._failed is None:
                    self._part.write(piece)
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                self._failed = error
            self._written += len(piece)
            if self._waiting and (self._given - self._written <= _AHEAD // 2 or self._failed is not None):
                self._waiting = False
                self._loop.call_soon_threadsafe(self._room.set)


async def in_thread(call: Callable[..., T], *args: Any) -> T:
    """Call something that may wait for the disk; a caller that is cancelled waits until it is done with the file.

    Args:
        call: What to call.
        *args: Its arguments.

    Raises:
        asyncio.CancelledError: The caller was cancelled.
    """
    task = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if task.exception() is None and hasattr(opened := task.result(), "close"):
            opened.close()  # nobody will
        raise
