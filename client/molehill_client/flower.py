"""The ClientApp that runs on every grid; the only module of the client that imports Flower."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from molehill.errors import MessageError
from molehill.plan import ClientPlan
from molehill.secure.messages import AskAgree, AskKeys, AskShares, AskUnmask
from molehill_client.baselines import baseline_together
from molehill_client.client import Client
from molehill_client.scoring import evaluate_together
from molehill_client.together import share, train_together

__all__ = ["ClientApp", "Context", "make_app"]

M = TypeVar("M", bound=BaseModel)


def make_app(open_client: Callable[[Context], Client]) -> ClientApp:
    """Build the ClientApp of data owners that ``open_client`` finds for a node.

    Args:
        open_client: Returns the client behind a Flower context; called once per message.

    Returns:
        An app that answers ``query.hello``, ``train``, ``train.baseline`` and ``evaluate``, and for secure aggregation
        ``query.keys``, ``query.shares``, ``query.agree`` and ``query.unmask``. An engine that holds several clients may
        call its `together` for plans.
    """
    return _App(open_client)


class _App(ClientApp):
    def __init__(self, open_client: Callable[[Context], Client]) -> None:
        super().__init__()
        self._open = open_client
        self.query("hello")(self._hello)
        self.query("keys")(self._keys)
        self.query("shares")(self._shares)
        self.query("agree")(self._agree)
        self.query("unmask")(self._unmask)
        self.train()(self._train)
        self.train("baseline")(self._baseline)
        self.evaluate()(self._evaluate)

    def together(self, messages: Sequence[Message], contexts: Sequence[Context]) -> Iterator[Message | Exception]:
        """Yield the reply to every message with a plan, or why there is none; all are of one type.

        Raises:
            MessageError: A plan is malformed; called one by one, the other clients answer.
        """
        clients = [self._open(context) for context in contexts]
        plans = [_read(ClientPlan, message) for message in messages]
        outcomes: Sequence[BaseModel | Exception]
        match messages[0].metadata.message_type:
            case "train":
                outcomes = share(train_together, clients, plans)
            case "train.baseline":
                outcomes = share(baseline_together, clients, plans)
            case _:
                outcomes = share(evaluate_together, clients, plans)
        for message, outcome in zip(messages, outcomes, strict=True):
            yield outcome if isinstance(outcome, Exception) else _reply(outcome, message)

    def _hello(self, message: Message, context: Context) -> Message:
        return _reply(self._open(context).hello(), message)

    def _keys(self, message: Message, context: Context) -> Message:
        return _reply(self._open(context).masker.keys(_read(AskKeys, message)), message)

    def _shares(self, message: Message, context: Context) -> Message:
        return _reply(self._open(context).masker.shares(_read(AskShares, message)), message)

    def _agree(self, message: Message, context: Context) -> Message:
        return _reply(self._open(context).masker.agree(_read(AskAgree, message)), message)

    def _unmask(self, message: Message, context: Context) -> Message:
        return _reply(self._open(context).masker.unmask(_read(AskUnmask, message)), message)

    def _train(self, message: Message, context: Context) -> Message:
        return _reply(self._open(context).train(_read(ClientPlan, message)), message)

    def _baseline(self, message: Message, context: Context) -> Message:
        return _reply(self._open(context).baseline(_read(ClientPlan, message)), message)

    def _evaluate(self, message: Message, context: Context) -> Message:
        return _reply(self._open(context).evaluate(_read(ClientPlan, message)), message)


def _read(kind: type[M], message: Message) -> M:
    record = message.content.get("plan")
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    try:
        return kind.model_validate_json(text if isinstance(text, str) else "")
    except ValidationError as error:
        first, what = error.errors()[0], "plan" if kind is ClientPlan else "request"
        raise MessageError(
            f"malformed {what}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            mend="Run the same version of Molehill on server and clients.",
        ) from None


def _reply(content: BaseModel, message: Message) -> Message:
    return Message(RecordDict({"reply": ConfigRecord({"json": content.model_dump_json()})}), reply_to=message)
