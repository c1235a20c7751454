"""The ClientApp that runs on every grid; the only module of the client that imports Flower."""

from __future__ import annotations

import os
from collections.abc import Callable

from pydantic import BaseModel, ValidationError

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

import molehill
from molehill.errors import MessageError
from molehill.plan import ClientPlan
from molehill_client.client import Client

__all__ = ["ClientApp", "Context", "make_app"]


class _Hello(BaseModel):
    client: str
    n_train: int
    n_test: int
    version: str


def make_app(open_client: Callable[[Context], Client]) -> ClientApp:
    """Build the ClientApp of data owners that ``open_client`` finds for a node.

    Args:
        open_client: Returns the client behind a Flower context; called once per message.

    Returns:
        An app that answers ``query.hello``, ``train``, ``train.baseline`` and ``evaluate``.
    """
    app = ClientApp()

    def hello(_: Message, context: Context) -> RecordDict:
        client = open_client(context)
        return _record(
            _Hello(
                client=client.name,
                n_train=len(client.train_rows),
                n_test=len(client.test_rows),
                version=molehill.__version__,
            )
        )

    def train(message: Message, context: Context) -> RecordDict:
        return _record(open_client(context).train(_plan(message)))

    def baseline(message: Message, context: Context) -> RecordDict:
        return _record(open_client(context).baseline(_plan(message)))

    def evaluate(message: Message, context: Context) -> RecordDict:
        return _record(open_client(context).evaluate(_plan(message)))

    def reply_to(handler: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
        return lambda message, context: Message(handler(message, context), reply_to=message)

    app.query("hello")(reply_to(hello))
    app.train()(reply_to(train))
    app.train("baseline")(reply_to(baseline))
    app.evaluate()(reply_to(evaluate))
    return app


def _plan(message: Message) -> ClientPlan:
    record = message.content.get("plan")
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    try:
        return ClientPlan.model_validate_json(text if isinstance(text, str) else "")
    except ValidationError as error:
        first = error.errors()[0]
        raise MessageError(
            f"malformed plan: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            mend="Run the same version of Molehill on server and clients.",
        ) from None


def _record(reply: BaseModel) -> RecordDict:
    return RecordDict({"reply": ConfigRecord({"json": reply.model_dump_json()})})
