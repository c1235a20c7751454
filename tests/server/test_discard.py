"""What a client names as its delta is dropped, but never what the others still fetch."""

from __future__ import annotations

import pytest
from toy_federation import config

from molehill.plan import ClientPlan, ClientReply
from molehill.wire.local import FolderExchange
from molehill_server.transport import Incoming


def test_a_reply_that_names_a_broadcast_blob_takes_it_from_nobody(toy):
    run = toy(config(run={"rounds": 2}, federation={"preset": "ffa"}))

    def fault(client, plan, reply):
        update = {"delta": plan.blobs["e0.A"]} if client.number == 0 else {}
        return reply.model_copy(update=update).model_dump_json()

    run.run(fault)
    for event in run.events("round"):
        assert list(event["quarantined"]) == ["client-0"]
        assert len(event["accepted"]) == 3


class Late:
    """A transport that keeps the first client's reply of round 1, changed, until round 2."""

    def __init__(self, inner, change):
        self.inner, self.change, self.kept = inner, change, None

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def pull(self, ids):
        message = self.inner.pushed[-1]
        if self.kept and message.group.startswith("2."):
            reply, self.kept = self.kept, None
            assert reply.reply_to in ids
            return [reply]
        found = self.inner.pull(ids)
        if message.group.startswith("1.") and self.kept is None and found:
            told = ClientReply.model_validate_json(found[0].text)
            changed = told.model_copy(update={"delta": self.change(ClientPlan.model_validate_json(message.text))})
            self.kept = Incoming(found[0].reply_to, changed.model_dump_json())
            return self.inner.pull(ids)
        return found


@pytest.mark.parametrize(
    "delta",
    [lambda _: "../../secret", lambda _: "", lambda plan: plan.blobs["e0.A"]],
    ids=["path", "nothing", "broadcast"],
)
def test_an_overdue_reply_may_name_anything(toy, tmp_path, delta):
    run = toy(config(run={"rounds": 2}, federation={"preset": "ffa"}))
    run.exchange = FolderExchange(tmp_path / "exchange")
    run.start(around=lambda transport: Late(transport, delta)).run()
    assert run.transport.kept is None
    one, two = run.events("round")
    assert one["missing"] == ["client-0"]
    assert len(two["accepted"]) == 4
