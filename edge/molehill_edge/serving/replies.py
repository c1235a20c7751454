"""Answers as OpenAI's API shapes them: whole, in pieces as events, and as errors."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from molehill.decoding.stream import Answer
from molehill.predictions import Prediction
from molehill_edge.serving.requests import RefusedError

DONE = b"data: [DONE]\n\n"
_KINDS = {401: "authentication_error", 403: "permission_error"}
_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


class Json(Response):
    """A JSON document in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See `encoded`."""
        return encoded(content)


class Events(StreamingResponse):
    """Events of an answer, which are closed before anything else when their reader has gone.

    Args:
        events: Made by `event`, and `DONE`.
    """

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as any application of ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()


def refusal(error: RefusedError, headers: Mapping[str, str] | None = None) -> Json:
    """A refusal as a response."""
    return Json(told(error), error.status, headers)


def told(error: RefusedError) -> dict[str, Any]:
    """A refusal as a document."""
    kind = _KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.what, "type": kind, "param": error.field, "code": error.code}}


def encoded(document: Any) -> bytes:
    """A document as bytes; numbers that JSON does not have are a mistake of ours."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")  # half a character, from a caller: JSON writes it as Python does


def event(document: Mapping[str, Any]) -> bytes:
    """A document as an event of a stream."""
    return b"data: " + encoded(document) + b"\n\n"


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """The tokens of some answers."""
    read, drawn = sum(each.prompt_tokens for each in answers), sum(each.tokens for each in answers)
    told: dict[str, Any] = {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}
    if len(answers) == 1:  # of several, the later ones find another cache than when they began
        told["prompt_tokens_details"] = {"cached_tokens": read - answers[0].fed}
    return told


@dataclass(frozen=True)
class Shape:
    """How answers of one path look.

    Attributes:
        model: Who answers.
        chat: As a message of a conversation; else as a text that goes on.
        id: Of this answer.
        created: When, in seconds since 1970.
    """

    model: str
    chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All answers of a request, each a choice."""
        choices = []
        for index, answer in enumerate(answers):
            text = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append({
                "index": index, **(text if self.chat else {"text": answer.text}), "logprobs": None,
                "finish_reason": _REASONS[answer.reason],
            })  # fmt: skip
        return {**self._head(""), "choices": choices, "usage": usage(answers)}

    def begin(self) -> bytes:
        """What comes before the first piece; nothing where the text just goes on."""
        return self._piece(0, {"role": "assistant", "content": ""}, None) if self.chat else b""

    def piece(self, index: int, text: str) -> bytes:
        """A piece of the text of a choice."""
        return self._piece(index, {"content": text} if self.chat else text, None)

    def end(self, index: int, answer: Answer) -> bytes:
        """Why a choice ended."""
        return self._piece(index, {} if self.chat else "", _REASONS[answer.reason])

    def tokens(self, answers: Sequence[Answer]) -> bytes:
        """What was read and drawn."""
        return event({**self._head(".chunk"), "choices": [], "usage": usage(answers)})

    def _piece(self, index: int, said: Any, reason: str | None) -> bytes:
        choice = {"index": index, ("delta" if self.chat else "text"): said, "logprobs": None, "finish_reason": reason}
        return event({**self._head(".chunk"), "choices": [choice]})

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        name = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{name}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def predictions(model: str, found: Sequence[Prediction], tokens: int) -> dict[str, Any]:
    """What is said of texts; a shape of ours, since OpenAI has none.

    Args:
        model: Who says so.
        found: For every text.
        tokens: How many were read.
    """
    data = [{"object": "classification", "index": index, **each.as_json()} for index, each in enumerate(found)]
    return {
        "object": "list", "model": model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}
    }  # fmt: skip
