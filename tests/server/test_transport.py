"""When a round closes, on a clock that only the test moves."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from molehill import __version__
from molehill.errors import FederationError
from molehill_server.events import EventLog, listening, read
from molehill_server.roster import Roster
from molehill_server.transport import Collection, Incoming, Outgoing, Patience


class Clockwork:
    """Replies arrive at set times after they were asked for; None never."""

    def __init__(self, delays, unreachable=()):
        self.delays, self.unreachable = delays, unreachable
        self.time, self.sent = 0.0, {}

    def nodes(self):
        return list(self.delays)

    def name(self, node):
        return ""

    def visit(self, node):
        return ""

    def push(self, message):
        if message.node in self.unreachable:
            return None
        delay = self.delays[message.node]
        name = f"{message.group}/{message.node}"
        self.sent[name] = None if delay is None else self.time + delay
        return name

    def pull(self, ids):
        ready = [name for name in ids if self.sent.get(name) is not None and self.sent[name] <= self.time]
        for name in ready:
            self.sent[name] = None
        return [Incoming(name, self.text(int(name.partition("/")[2]))) for name in sorted(ready)]

    def text(self, node):
        return json.dumps({"client": f"c{node}", "n_train": 1, "n_test": 1, "version": __version__})

    def now(self):
        return self.time

    def wait(self, seconds):
        assert seconds > 0
        self.time += seconds


def collect(transport, patience, late=None, group="1.0", good=lambda client: True):
    messages = [(f"c{node}", Outgoing(node, "train", group, "", 1.0)) for node in transport.nodes()]
    collection = Collection(transport, messages, patience, set() if late is None else late)
    got = []
    for client, _ in collection:
        got.append(client)
        if good(client):
            collection.accept()
    return got, collection


def test_all_answer():
    transport = Clockwork({1: 0, 2: 3, 3: 1})
    got, collection = collect(transport, Patience(100, 3, 0))
    assert (got, collection.missing, transport.time) == (["c1", "c3", "c2"], [], 3.0)


def test_the_deadline_closes_a_round_without_quorum():
    transport = Clockwork({1: 0, 2: 50, 3: None}, unreachable=(4,))
    transport.delays[4] = 0
    got, collection = collect(transport, Patience(10.5, 4, 2))
    assert (got, collection.missing, transport.time) == (["c1"], ["c4", "c2", "c3"], 10.5)


def test_grace_begins_with_the_quorum():
    transport = Clockwork({1: 0, 2: 4, 3: 6, 4: 9})
    got, collection = collect(transport, Patience(100, 2, 2.5))
    assert (got, collection.missing, transport.time) == (["c1", "c2", "c3"], ["c4"], 6.5)


def test_no_grace_still_takes_all_who_answered_in_time():
    got, _ = collect(Clockwork({1: 1, 2: 1, 3: 1}), Patience(100, 1, 0))
    assert got == ["c1", "c2", "c3"]


def test_only_accepted_replies_count_towards_the_quorum():
    transport = Clockwork({1: 0, 2: 0, 3: 5, 4: 8})
    got, _ = collect(transport, Patience(100, 2, 1), good=lambda client: client not in {"c1", "c2"})
    assert got == ["c1", "c2", "c3", "c4"]


def test_what_comes_too_late_is_seen_in_a_later_round_but_not_used():
    transport, late = Clockwork({1: 0, 2: 4}), set()
    collect(transport, Patience(100, 1, 1), late)
    assert late == {"1.0/2"}
    transport.delays = {1: 5}
    got, collection = collect(transport, Patience(100, 1, 1), late, "2.0")
    assert got == ["c1"]
    assert [reply.reply_to for reply in collection.overdue] == ["1.0/2"]
    assert late == set()


def test_who_is_lost_is_missing_and_not_waited_for():
    transport = Clockwork({1: 0, 2: 1, 3: 2})
    real = transport.pull
    transport.pull = lambda ids: [replace(reply, lost="/2" in reply.reply_to) for reply in real(ids)]
    got, collection = collect(transport, Patience(100, 3, 1))
    assert (got, collection.missing) == (["c1", "c3"], ["c2"])
    assert transport.time < 4


def log(tmp_path):
    return EventLog(tmp_path / "metrics.jsonl")


def test_the_roster_waits_for_the_first_client_and_finds_newcomers(tmp_path):
    transport = Clockwork({})
    with pytest.raises(FederationError, match="no client connected within 3 s"):
        Roster(transport, log(tmp_path)).gather(3, 0.5, 1)
    transport.delays = {5: 0, 3: 0}
    roster = Roster(transport, log(tmp_path))
    assert roster.gather(3, 0.5, 1) == {"c3": 3, "c5": 5}
    transport.delays = {5: 0, 4: 0}
    assert roster.refresh(1) == {"c4": 4, "c5": 5}


def test_two_nodes_cannot_be_one_client(tmp_path):
    transport = Clockwork({3: 0, 5: 0})
    transport.text = lambda node: json.dumps({"client": "same", "n_train": 1, "n_test": 1, "version": __version__})
    assert Roster(transport, log(tmp_path)).gather(3, 1.0, 1) == {"same": 3}
    (event,) = read(tmp_path / "metrics.jsonl")
    assert (event["client"], event["reason"]) == ("same", "a second node says it is 'same'")


def test_a_client_that_comes_back_is_asked_again_and_the_others_are_not(tmp_path):
    """Whether it was seen to be away, or only says that it is here for another time."""
    transport, rows, visits, asked = Clockwork({3: 0, 5: 0}), {3: 1, 5: 1}, {3: "a", 5: "a"}, []
    transport.visit = lambda node: visits[node]
    real = transport.text

    def text(node):
        asked.append(node)
        return json.dumps(json.loads(real(node)) | {"n_train": rows[node]})

    transport.text = text
    roster = Roster(transport, log(tmp_path))
    clients = roster.gather(3, 1.0, 1)
    assert roster.rows(roster.refresh(1)) == {"c3": 1, "c5": 1}
    assert sorted(asked) == [3, 5]
    rows[3], transport.delays = 2, {5: 0}
    assert roster.refresh(1) == {"c5": 5}
    transport.delays = {3: 0, 5: 0}
    assert roster.refresh(1) == clients
    assert roster.rows(clients) == {"c3": 2, "c5": 1}
    rows[5], visits[5] = 7, "b"
    assert roster.rows(roster.refresh(1)) == {"c3": 2, "c5": 7}
    assert sorted(asked) == [3, 3, 5, 5]
    transport.delays[3], visits[3] = None, "b"  # it came back, and does not say who it is
    assert roster.refresh(1) == {"c5": 5}


@pytest.mark.parametrize("text", ["", "{}", '{"client": "../x", "n_train": 1, "n_test": 1, "version": "0"}'])
def test_a_malformed_hello_is_refused(tmp_path, text):
    transport = Clockwork({3: 0})
    transport.text = lambda node: text
    with pytest.raises(FederationError, match="no client is ready: node 3: malformed hello"):
        Roster(transport, log(tmp_path)).gather(3, 1.0, 1)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({"client": "lab-2"}, "lab-1: it says it is 'lab-2', and its certificate says 'lab-1'"),
        (
            {"client": "lab-1", "version": "0.0.1"},
            f"lab-1: it runs Molehill 0.0.1, this is {__version__}. Install the same",
        ),
    ],
)
def test_a_node_of_another_name_or_version_is_refused(tmp_path, hello, reason):
    transport = Clockwork({3: 0})
    transport.name = lambda node: "lab-1"
    transport.text = lambda node: json.dumps({"n_train": 1, "n_test": 1, "version": __version__} | hello)
    with pytest.raises(FederationError, match=reason):
        Roster(transport, log(tmp_path)).gather(3, 1.0, 1)
    assert read(tmp_path / "metrics.jsonl")[0]["client"] == "lab-1"


def test_the_roster_waits_for_as_many_nodes_as_are_wanted(tmp_path):
    with pytest.raises(FederationError, match="2 clients connected within 3 s, 3 are wanted"):
        Roster(Clockwork({1: 0, 2: 0}), log(tmp_path), wanted=3).gather(3, 1.0, 1)


def test_events_reach_the_file_and_who_listens(tmp_path):
    heard = []
    one = log(tmp_path)
    with listening(heard.append):
        one.emit("start", run="x")
    one.emit("round", round=1)
    assert [event["event"] for event in heard] == ["start"]
    assert [event["event"] for event in read(tmp_path / "metrics.jsonl")] == ["start", "round"]
