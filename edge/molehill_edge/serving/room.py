"""How many requests are computed at once, how many may wait, what becomes of those whose client has gone."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import anyio
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from molehill_edge.passes import EdgePasses
from molehill_edge.serving import replies
from molehill_edge.serving.requests import RefusedError
from molehill_edge.view import View


class Room:
    """Places for requests.

    Args:
        at_once: Requests that are computed at the same time.
        waiting: Requests that may wait for them.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        self._free = anyio.Semaphore(at_once)
        self._most = at_once + waiting
        self._inside = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, and hold it.

        Raises:
            RefusedError: Too many wait already.
        """
        if self._inside >= self._most:
            raise RefusedError(503, "Too many requests wait already: try again in a moment.", code="overloaded")
        self._inside += 1
        try:
            async with self._free:
                yield
        finally:
            self._inside -= 1


class Turn:
    """A response that is computed once there is a place for it, and given up when its client has gone.

    Args:
        room: Has the places.
        answer: Computes it.
    """

    def __init__(self, room: Room, answer: Callable[[], Awaitable[Response]]) -> None:
        self._room = room
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as any application of ASGI."""
        more: bool | None = None  # whether the answer goes on; None before it begins

        async def sending(message: Message) -> None:
            nonlocal more
            more = bool(message.get("more_body"))
            await send(message)

        try:
            await self._answered(scope, receive, sending)
        except anyio.get_cancelled_exc_class():  # by the server, which ends and has been patient
            error = RefusedError(503, "The server ends.", code="server_ends")
            if more is None:
                await replies.refusal(error)(scope, _nothing, send)
            elif more:
                last = replies.event(replies.told(error))
                await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or leave when the client does."""
        async with anyio.create_task_group() as group:

            async def leave() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(leave)
            try:
                async with self._room.place():
                    response = await self._answer()
                    await response(scope, _nothing, send)
            except RefusedError as error:
                headers = {"Retry-After": "1"} if error.status == 503 else None
                await replies.refusal(error, headers)(scope, _nothing, send)
            group.cancel_scope.cancel()


class Readers:
    """Passes that no request uses, with what they have read: a turn of a conversation reads only what is new in it.

    There are never more than requests that were computed at the same time.
    """

    def __init__(self) -> None:
        self._free: list[EdgePasses] = []  # those that were used last are the last
        self._lock = threading.Lock()

    def take(self, ids: Sequence[int], view: View) -> EdgePasses:
        """Those that have most of a prompt's beginning, read with the same gate, or else those unused for longest.

        Args:
            ids: The prompt.
            view: Has the gate.
        """
        with self._lock:
            if not self._free:
                return view.passes()
            kept = [view.passes(each).most_kept(ids) for each in self._free]
            return view.passes(self._free.pop(kept.index(max(kept))))

    @contextmanager
    def back_unless_begun(self, passes: EdgePasses) -> Iterator[None]:
        """Put passes back if what they were taken for is refused."""
        try:
            yield
        except BaseException:
            self.give(passes)
            raise

    def give(self, passes: EdgePasses) -> None:
        """Put some back."""
        with self._lock:
            self._free.append(passes)


async def _nothing() -> Message:
    """What a response hears of its client: `Turn` listens in its place."""
    await anyio.sleep_forever()
    raise AssertionError  # not reached
