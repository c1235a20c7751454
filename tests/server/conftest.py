from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from toy_federation import ToyClient, write_initial

from molehill.config import Config
from molehill.errors import MolehillError
from molehill.plan import ClientPlan
from molehill.wire.local import MemoryExchange
from molehill_server.coordinator import Coordinator
from molehill_server.exchange.grants import Grants
from molehill_server.transport import Incoming, Outgoing


@dataclass
class ToyTransport:
    """Calls the clients directly, one message per pull; ``fault`` may change or swallow what they say.

    So may ``meddle`` with the answers to questions of secure aggregation.
    """

    clients: dict[int, ToyClient]
    fault: object = None
    meddle: object = None
    time: float = 0.0
    queue: deque = field(default_factory=deque)
    pushed: list[Outgoing] = field(default_factory=list)

    def nodes(self):
        return list(self.clients)

    def name(self, node):
        return ""

    def visit(self, node):
        return ""

    def push(self, message):
        self.pushed.append(message)
        self.queue.append((str(len(self.pushed)), message))
        return self.queue[-1][0]

    def pull(self, ids):
        while self.queue:
            name, message = self.queue.popleft()
            assert name in ids
            try:
                text = self._answer(self.clients[message.node], message)
            except MolehillError as error:
                text = error
            if isinstance(text, Exception):
                return [Incoming(name, None, str(text))]
            if text is not None:
                return [Incoming(name, text)]
        return []

    def _answer(self, client, message):
        if message.kind == "query.hello":
            return json.dumps(client.hello())
        if message.kind.startswith("query"):
            text = client.query(message.kind, message.text)
            return text if self.meddle is None else self.meddle(client, message, text)
        plan = ClientPlan.model_validate_json(message.text)
        if message.kind != "train":
            reply = client.evaluate(plan) if message.kind == "evaluate" else client.baseline(plan)
            return reply.model_dump_json()
        reply = client.train(plan)
        return reply.model_dump_json() if self.fault is None else self.fault(client, plan, reply)

    def now(self):
        return self.time

    def wait(self, seconds):
        self.time += seconds


@dataclass
class Toy:
    """A federation in a folder."""

    config: Config
    out: Path
    exchange: MemoryExchange = field(default_factory=MemoryExchange)
    grants: Grants | None = None
    maskers: dict = field(default_factory=dict)

    def start(self, fault=None, meddle=None, around=lambda transport: transport) -> Coordinator:
        if not (self.out / "initial.safetensors").exists():
            write_initial(self.out)
        clients = {n + 10: ToyClient(n, self.config, self.out, self.exchange) for n in range(self.config.data.clients)}
        for client in clients.values():  # which outlive a server that is started again
            client.masker = self.maskers.setdefault(client.name, client.masker)
        self.transport = around(ToyTransport(clients, fault, meddle))
        return Coordinator(self.config, self.out, self.exchange, self.transport, grants=self.grants)

    def run(self, fault=None, meddle=None):
        return self.start(fault, meddle).run()

    def run_until_killed(self, number):
        """Run, and be killed when the first client answers in that round."""

        def dies(client, plan, reply):
            if plan.round == number:
                raise KeyboardInterrupt
            return reply.model_dump_json()

        with pytest.raises(KeyboardInterrupt):
            self.run(dies)

    def events(self, kind=None):
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if kind in (None, event["event"])]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """No test can see whether a disk was synced, and it takes most of the time."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def toy(tmp_path):
    return lambda settings, name="run": Toy(settings, tmp_path / name)
