"""What a node may do to the server process by its replies, over Flower's own grid of a SuperLink."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from fleet import digest, written
from flwr.proto import runtime_pb2
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.superlink.grid import HttpGrid

from molehill_server import flower
from molehill_server.flower import GridTransport


class SuperLink:
    """Has replies and their objects; one that is None was announced and never came."""

    def __init__(self) -> None:
        self.replies, self.objects = [], {}

    def add(self, node, changes=None):
        """A reply of a node, with other contents of objects by their place."""
        pushed, objects = written(node, [f"answer of {node}"], reply_to_message_id=f"asked {node}")
        self.replies.append((pushed.messages_list[0], pushed.message_object_trees[0]))
        names = list(objects)
        self.objects |= objects | {names[at]: content for at, content in (changes or {}).items()}

    def messages(self, asked):
        messages, trees = zip(*self.replies, strict=True)
        return runtime_pb2.PullAppMessagesResponse(messages_list=messages, message_object_trees=trees)

    def object(self, asked):
        content = self.objects[asked.object_id]
        return PullObjectResponse(object_found=True, object_available=content is not None, object_content=content)

    def grid(self):
        """Flower's grid, with this in place of its connection."""
        grid = HttpGrid(token="t")
        calls = {"PullMessages": self.messages, "PullObject": self.object, "ConfirmMessageReceived": lambda asked: None}
        grid._client, grid._run = SimpleNamespace(**calls), SimpleNamespace(run_id=3)
        return grid


def no_reply(content, kind="Message", children=""):
    return f"{kind} {children} {len(content)}\0".encode() + content


@pytest.mark.parametrize(
    "changes",
    [
        {0: None},  # announced, and never sent
        {2: None},
        {0: no_reply(b"\xff\xff", "ConfigRecord")},
        {1: no_reply(b"[" * 100_000, "RecordDict")},
        {1: no_reply(b"{}", "ArrayRecord")},
        {2: no_reply(b"{}", "RecordDict")},
        {2: no_reply(b"")},
        {2: no_reply(b"", children=digest(b"of nobody"))},
        {2: b"nothing of Flower's at all"},
    ],
)
def test_a_reply_that_is_none_is_lost_at_once_and_takes_no_other_with_it(changes, monkeypatch):
    """Flower itself waits for minutes for what a node does not send, and what it cannot read ends the process."""
    monkeypatch.setattr(flower, "_TRIES", 2)
    link = SuperLink()
    link.add(7), link.add(8, changes), link.add(9)
    began = time.monotonic()
    got = {reply.reply_to: reply for reply in GridTransport(link.grid()).pull({"asked 7", "asked 8", "asked 9"})}
    assert time.monotonic() - began < 5
    assert (got["asked 7"].text, got["asked 9"].text) == ("answer of 7", "answer of 9")
    assert got["asked 8"].lost
