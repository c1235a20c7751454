"""The paths of the server, and the bundle behind them."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from molehill.decoding.interfaces import Strategy
from molehill.decoding.stream import ANSWER, Stream
from molehill.errors import AnswerError, BundleError, MolehillError
from molehill_edge import manifest as manifests
from molehill_edge.bundle import Bundle
from molehill_edge.gates import Gate
from molehill_edge.passes import EdgePasses
from molehill_edge.serving import replies
from molehill_edge.serving import requests as asks
from molehill_edge.serving.guard import HEALTH, Guard
from molehill_edge.serving.requests import Asked, Fields, RefusedError
from molehill_edge.serving.room import Readers, Room, Turn
from molehill_edge.view import DEFAULT, View

Begun = tuple[EdgePasses, list[Stream]]  # answers, and the passes that they are drawn with one after another
_PATIENCE = 30  # seconds in which the body of a request must have come


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Attributes:
        body: Bytes of a request.
        answer: Tokens of an answer.
        at_once: Requests that are computed at the same time.
        waiting: Requests that wait for them.
    """

    body: int
    answer: int
    at_once: int
    waiting: int


@dataclass(frozen=True)
class Model:
    """Who answers.

    Attributes:
        view: The bundle with a gate, which nothing changes any more, so that several threads may use it.
        strategy: How; by its own logits when None.
    """

    view: View
    strategy: Strategy | None


class Models:
    """The bundle under its id, and as ``ID@GATE`` with each of its gates.

    Args:
        bundle: That is open; the gate in use is that of its plain id.
        experts: Choose from these only, with every gate; None for all.
        strategy: Makes of each view how it answers, by its own logits where None; it is tried.

    Raises:
        AnswerError: The bundle cannot do the strategy.
        BundleError: A gate cannot be read, or would be left without experts.
    """

    def __init__(
        self, bundle: Bundle, experts: Sequence[str] | None = None,
        strategy: Callable[[View], Strategy | None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._bundle, self._experts, self._strategy = bundle, experts, strategy
        self._models: dict[str, Model] = {"": self._chosen(bundle.gate)}
        self._models |= {name: self._chosen(bundle.read_gate(name)) for name in (DEFAULT, *bundle.gates())}

    def _chosen(self, gate: Gate) -> Model:
        view = self._bundle.with_gate(gate)
        if self._experts is not None:
            view.choose_experts(self._experts)
        strategy = self._strategy(view)
        if strategy is not None:  # what it asks of the graph shows only when it does
            known = [list(golden.input_ids) for golden in view.manifest.golden] or [view.encode("Is it there?")]
            view.scores([max(known, key=len)], strategy)
        return Model(view, strategy)

    @property
    def names(self) -> list[str]:
        """What a request may call them."""
        name = self._bundle.manifest.id
        return [f"{name}@{gate}" if gate else name for gate in self._models]

    def require(self, name: str) -> None:
        """Refuse a name that nobody has.

        Raises:
            RefusedError: There is no such bundle or gate.
        """
        if name not in self.names:
            known = ", ".join(self.names)
            raise RefusedError(404, f"There is no model {name!r}, only {known}.", field="model", code="model_not_found")

    def find(self, name: str, *, writes: bool) -> Model:
        """The bundle with a gate, and how it answers.

        Args:
            name: Of the model.
            writes: Whether it must write text; else it must say something of texts.

        Raises:
            RefusedError: There is no such bundle or gate, or it is for another task.
        """
        self.require(name)
        task = self._bundle.manifest.task
        if manifests.reading(task).writes != writes:
            wanted = "write text" if writes else "say something of texts"
            what = f"The model is for {task.kind}, and this path for models that {wanted}."
            raise RefusedError(400, what, field="model", code="unsupported_model")
        return self._models[name.partition("@")[2]]

    def about(self, name: str) -> dict[str, Any]:
        """What a list of models says of one."""
        created = self._bundle.manifest.created
        return {"id": name, "object": "model", "created": created, "owned_by": "molehill"}


class Paths:
    """What is answered under each path.

    Args:
        models: Who answers.
        limits: What is taken on.
    """

    def __init__(self, models: Models, limits: Limits) -> None:
        self._models = models
        self._limits = limits
        self._room = Room(limits.at_once, limits.waiting)
        self._readers = Readers()

    async def health(self, request: Request) -> Response:
        """``GET /health``."""
        del request
        return replies.Json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        del request
        return replies.Json({"object": "list", "data": [self._models.about(name) for name in self._models.names]})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        name = str(request.path_params["name"])
        self._models.require(name)
        return replies.Json(self._models.about(name))

    async def chat(self, request: Request) -> Turn:
        """``POST /v1/chat/completions``."""
        fields = await self._fields(request)
        asked, messages = asks.read_asked(fields, self._limits.answer), asks.read_messages(fields)
        fields.end()
        model = self._models.find(asked.model, writes=True)
        view, (*before, last) = model.view, messages

        def begin() -> Begun:
            chat = view.chat(**asked.sampling, strategy=model.strategy)
            chat.messages = before
            ids = chat.encode(last["content"])
            most = self._longest(asked, view, ids)
            chat.passes = self._readers.take(ids, view)
            with self._readers.back_unless_begun(chat.passes):
                return chat.passes, [chat.stream(last["content"], max_new_tokens=most, stop=asked.stop)]

        return Turn(self._room, lambda: self._written(asked, begin, "messages"))

    async def complete(self, request: Request) -> Turn:
        """``POST /v1/completions``."""
        fields = await self._fields(request)
        asked, prompts = asks.read_asked(fields, self._limits.answer), asks.read_prompts(fields)
        fields.end()
        model = self._models.find(asked.model, writes=True)
        view = model.view

        def begin() -> Begun:
            read = [view.encode(prompt, raw=True) for prompt in prompts]
            options = {**asked.sampling, "raw": True, "stop": asked.stop, "strategy": model.strategy}
            passes = self._readers.take(read[0], view)
            with self._readers.back_unless_begun(passes):
                return passes, [
                    view.stream(prompt, max_new_tokens=self._longest(asked, view, ids), passes=passes, **options)
                    for prompt, ids in zip(prompts, read, strict=True)
                ]

        return Turn(self._room, lambda: self._written(asked, begin, "prompt"))

    async def classify(self, request: Request) -> Turn:
        """``POST /v1/classifications``, a path of ours."""
        fields = await self._fields(request)
        name, texts, truncate = fields.text("model"), asks.read_inputs(fields), fields.flag("truncate")
        fields.end()
        model = self._models.find(name, writes=False)
        view = model.view

        def compute() -> dict[str, Any]:
            with _asked_wrongly("input"):
                encoded = view.encode_all(texts, truncate=truncate)
            with _failing():
                found = view.predicted(texts, encoded, model.strategy)
            return replies.predictions(name, found, sum(map(len, encoded)))

        async def answer() -> Response:
            return replies.Json(await to_thread.run_sync(compute))

        return Turn(self._room, answer)

    def _longest(self, asked: Asked, view: View, ids: Sequence[int]) -> int | None:
        """Tokens of the answer to a prompt: as many as were asked for, or else some that fit; None where none do."""
        left = view.manifest.task.max_length - len(ids)
        return asked.most or (min(ANSWER, self._limits.answer, left) if left > 0 else None)

    async def _written(self, asked: Asked, begin: Callable[[], Begun], field: str) -> Response:
        """Texts, in pieces or whole.

        Args:
            asked: What is asked for.
            begin: Reads the prompts, and takes passes for their answers.
            field: Where the prompts are: the messages of a conversation, or texts that go on.

        Raises:
            RefusedError: A prompt cannot be answered.
        """
        shape = replies.Shape(asked.model, chat=field == "messages")
        passes, streams = await to_thread.run_sync(_begun, begin, field)
        if asked.stream:
            return replies.Events(self._until_done(passes, _events(asked, streams, shape)))
        try:
            for stream in streams:
                async for _ in _pieces(stream):
                    pass
        finally:
            self._readers.give(passes)
        return replies.Json(shape.whole([stream.answer for stream in streams]))

    async def _until_done(self, passes: EdgePasses, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """Events, after which passes are free again."""
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
        finally:
            self._readers.give(passes)

    async def _fields(self, request: Request) -> Fields:
        """The fields of a request.

        Raises:
            RefusedError: The body is too long, too slow, or no JSON object.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A page in a browser may send other kinds to any server without asking it first.
            raise RefusedError(415, "The body must be JSON, with Content-Type: application/json.", code="invalid_json")
        data = bytearray()
        try:
            with anyio.fail_after(_PATIENCE):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self._limits.body:
                        what = f"The request has more than {self._limits.body >> 10} KiB."
                        raise RefusedError(413, what, code="request_too_large")
        except (TimeoutError, ClientDisconnect):
            raise RefusedError(408, "The body of the request did not come.", code="timeout") from None
        return Fields(bytes(data))


def _begun(begin: Callable[[], Begun], field: str) -> Begun:
    with _asked_wrongly(field):
        return begin()


async def _events(asked: Asked, streams: Sequence[Stream], shape: replies.Shape) -> AsyncGenerator[bytes]:
    """The answers as events. The head of the response has gone, so what fails is an event too."""
    try:
        if first := shape.begin():
            yield first
        for index, stream in enumerate(streams):
            async with aclosing(_pieces(stream)) as pieces:
                async for piece in pieces:
                    yield shape.piece(index, piece)
            yield shape.end(index, stream.answer)
    except RefusedError as error:
        yield replies.event(replies.told(error))
        return
    if asked.usage:
        yield shape.tokens([stream.answer for stream in streams])
    yield replies.DONE


async def _pieces(stream: Stream) -> AsyncGenerator[str]:
    """The pieces of an answer, each token computed in a thread; who goes away between two of them ends it."""
    busy = threading.Lock()

    def following() -> str | None:
        with busy, _failing():
            return stream.step()

    try:
        while (piece := await to_thread.run_sync(following)) is not None:
            if piece:
                yield piece
    finally:
        with busy:  # a server whose patience is over does not wait for the thread
            stream.close()


@contextmanager
def _asked_wrongly(field: str) -> Iterator[None]:
    """What the bundle refuses, as a mistake of the caller."""
    try:
        yield
    except (AnswerError, BundleError) as error:
        raise RefusedError(400, _said(error), field=field, code="invalid_value") from None


@contextmanager
def _failing() -> Iterator[None]:
    """What the bundle cannot compute, as a mistake of the server."""
    try:
        yield
    except (AnswerError, BundleError) as error:
        raise RefusedError(500, _said(error), code="cannot_compute") from None


def _said(error: MolehillError) -> str:
    """What is wrong and how to mend it, without the place: folders of the server are nothing to its callers."""
    return str(MolehillError(error.what, mend=error.mend))


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return replies.refusal(error)


async def _no_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"There is no {request.method} {request.scope['path']}."
    return replies.refusal(RefusedError(error.status_code, what, code="not_found"), error.headers)


async def _broken(_: Request, __: Exception) -> Response:
    return replies.refusal(RefusedError(500, "The server has failed; its log says why.", code="internal_error"))


def make(models: Models, limits: Limits, key: str | None) -> Starlette:
    """The application.

    Args:
        models: Who answers.
        limits: What is taken on.
        key: That callers must know; None for none.
    """
    paths = Paths(models, limits)
    return Starlette(
        routes=[
            Route(HEALTH, paths.health),
            Route("/v1/models", paths.models),
            Route("/v1/models/{name:path}", paths.model),
            Route("/v1/chat/completions", paths.chat, methods=["POST"]),
            Route("/v1/completions", paths.complete, methods=["POST"]),
            Route("/v1/classifications", paths.classify, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, key=key)],
        exception_handlers={RefusedError: _refuse, HTTPException: _no_path, Exception: _broken},
    )
