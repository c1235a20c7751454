"""The toy federation's ClientApp; importable in other processes."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from toy_federation import ToyClient

from molehill.config import load
from molehill.plan import ClientPlan
from molehill.wire.connect import connect

app = ClientApp()
_clients: dict[tuple, ToyClient] = {}


def _client(context: Context) -> ToyClient:
    given = context.run_config
    key = (given["out"], given["exchange"], context.node_config["partition-id"])
    if key not in _clients:
        exchange = connect(given["exchange"])
        _clients[key] = ToyClient(key[2], load(given["config"]), Path(given["out"]), exchange)
    return _clients[key]


def _answer(message: Message, text: str) -> Message:
    return Message(RecordDict({"reply": ConfigRecord({"json": text})}), reply_to=message)


def _plan(message: Message) -> ClientPlan:
    return ClientPlan.model_validate_json(message.content["plan"]["json"])


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    return _answer(message, json.dumps(_client(context).hello()))


@app.train()
def train(message: Message, context: Context) -> Message:
    return _answer(message, _client(context).train(_plan(message)).model_dump_json())


@app.train("baseline")
def baseline(message: Message, context: Context) -> Message:
    return _answer(message, _client(context).baseline(_plan(message)).model_dump_json())


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _answer(message, _client(context).evaluate(_plan(message)).model_dump_json())
