"""The in-process grid: Flower's interface, faults, isolation and its own time."""

from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from molehill.errors import TrainingError
from molehill_server.flower import GridTransport
from molehill_server.transport import Outgoing
from molehill_simulation.flower import context_of
from molehill_simulation.grid import LocalGrid
from molehill_simulation.scenario import Reported
from molehill_simulation.stage import FIRST_NODE, NoReply


def message(number, record=None, kind="train"):
    content = RecordDict({} if record is None else {"x": record})
    return Message(content, FIRST_NODE + number, kind, group_id="1.0", ttl=10.0)


def grid(train, nodes=3):
    app = ClientApp()

    @app.train()
    def run(msg, context):
        return Message(train(msg, context), reply_to=msg)

    return LocalGrid(app, nodes, {"lr": 0.5})


def number(context):
    return context.node_config["partition-id"]


def whoami(_, context):
    return RecordDict({"who": MetricRecord({"id": number(context), "of": context.node_config["num-partitions"]})})


def test_it_is_a_grid_and_every_message_gets_its_reply():
    one = grid(whoami)
    assert isinstance(one, Grid)
    assert list(one.get_node_ids()) == [2, 3, 4]
    assert [info.node_id for info in one.get_nodes()] == [2, 3, 4]
    ids = list(one.push_messages([message(n) for n in (0, 1, 2)]))
    replies = {}
    while len(replies) < 3:
        for reply in one.pull_messages(set(ids) - set(replies)):
            replies[reply.metadata.reply_to_message_id] = reply
    assert [replies[name].content["who"]["id"] for name in ids] == [0, 1, 2]
    assert replies[ids[1]].metadata.src_node_id == 3
    assert list(one.pull_messages(ids)) == []


def test_clients_run_when_replies_are_pulled_one_at_a_time():
    ran = []
    one = grid(lambda msg, context: ran.append(number(context)) or RecordDict())
    ids = set(one.push_messages([message(n) for n in (0, 1, 2)]))
    assert ran == []
    one.pull_messages(ids)
    assert ran == [0]


def test_faults_become_error_replies_and_interrupts_pass():
    def train(msg, context):
        if number(context) == 0:
            raise TrainingError("loss is NaN", where="client-0", mend="Lower the learning rate.")
        if number(context) == 1:
            raise ValueError("odd")
        raise KeyboardInterrupt

    one = grid(train)
    first, second = one.send_and_receive([message(0), message(1)])
    assert first.error.reason == "client-0: loss is NaN. Lower the learning rate."
    assert second.error.reason == "ValueError: odd"
    with pytest.raises(KeyboardInterrupt):
        one.send_and_receive([message(2)])


@pytest.mark.parametrize("answered", [0, 1])
def test_a_fault_of_a_group_meets_the_one_who_caused_it(answered):
    class App:
        def __call__(self, msg, context):
            if number(context) == 1:
                raise MemoryError("client-1 is too large")
            return Message(RecordDict(), reply_to=msg)

        def together(self, messages, contexts):
            yield from (Message(RecordDict(), reply_to=msg) for msg in messages[:answered])
            raise MemoryError("too large")

    one = LocalGrid(App(), 3, {}, together=3)
    replies = list(one.send_and_receive([message(n) for n in range(3)]))
    assert [reply.error.reason if reply.has_error() else None for reply in replies] == [
        None,
        "MemoryError: client-1 is too large",
        None,
    ]


@pytest.mark.parametrize("clients", [1, 4, 5, 7, 9, 10, 16, 17, 31])
def test_groups_are_full_and_the_last_ones_share_alike(clients):
    sizes = []

    class App:
        def __call__(self, msg, context):
            sizes.append(1)
            return Message(RecordDict(), reply_to=msg)

        def together(self, messages, contexts):
            sizes.append(len(messages))
            yield from (Message(RecordDict(), reply_to=msg) for msg in messages)

    one = LocalGrid(App(), clients, {}, together=4)
    assert len(list(one.send_and_receive([message(n) for n in range(clients)]))) == clients
    assert sum(sizes) == clients
    assert len(sizes) == -(-clients // 4)
    assert max(sizes) - min(sizes) <= 1 or clients > 12
    assert sizes == sorted(sizes, reverse=True)


def test_late_and_lost_replies_follow_the_grids_clock():
    def train(msg, context):
        if number(context) == 0:
            one.late(5)
        if number(context) == 1:
            raise NoReply
        return RecordDict()

    one = grid(train)
    ids = set(one.push_messages([message(n) for n in (0, 1, 2)]))
    (reply,) = one.pull_messages(ids)
    assert reply.metadata.src_node_id == FIRST_NODE + 2
    assert one.pull_messages(ids) == []
    one.wait(4.9)
    assert one.pull_messages(ids) == []
    one.wait(0.2)
    (reply,) = one.pull_messages(ids)
    assert reply.metadata.src_node_id == FIRST_NODE
    assert len(list(one.send_and_receive([message(n) for n in (0, 1, 2)], timeout=1))) == 1
    assert len(list(one.send_and_receive([message(n) for n in (0, 1, 2)]))) == 2


def test_clients_cannot_change_what_others_receive():
    seen = []

    def train(msg, context):
        seen.append((list(msg.content["x"]["list"]), sorted(msg.content)))
        msg.content["x"]["list"].append(number(context))
        msg.content["y"] = ConfigRecord({"z": 1})
        return RecordDict()

    one = grid(train)
    record = ConfigRecord({"list": [7], "text": "plan"})
    one.send_and_receive([message(n, record) for n in (0, 1, 2)])
    assert seen == [([7], ["x"])] * 3


def test_arrays_are_not_copied():
    import numpy as np

    array = Array(np.zeros(1000, np.float32))
    got = []
    one = grid(lambda msg, context: got.append(msg.content["x"]["w"]) or RecordDict())
    one.send_and_receive([message(0, ArrayRecord({"w": array}))])
    assert got[0].data is array.data


def test_context_survives_between_messages_of_one_node():
    def train(msg, context):
        seen = context.state.get("seen", MetricRecord({"n": 0}))["n"] + 1
        context.state["seen"] = MetricRecord({"n": seen})
        assert context.run_config == {"lr": 0.5}
        return RecordDict({"seen": MetricRecord({"n": seen})})

    one = grid(train)
    for expected in (1, 2):
        replies = one.send_and_receive([message(0)])
        assert [reply.content["seen"]["n"] for reply in replies] == [expected]
    (other,) = one.send_and_receive([message(1)])
    assert other.content["seen"]["n"] == 1


def test_flowers_own_strategies_run_on_it():
    import numpy as np

    app, server = ClientApp(), ServerApp()

    @app.train()
    def train(msg, context):
        weights = msg.content["arrays"]["w"].numpy() + 1
        arrays = ArrayRecord({"w": Array(weights)})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=msg)

    found = []

    @server.main()
    def main(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0)
        start = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
        found.append(strategy.start(grid, start, num_rounds=2).arrays["w"].numpy())

    server(LocalGrid(app, 4, {}), context_of(1, 1, {}, {}))
    np.testing.assert_array_equal(found[0], [2.0, 2.0])


def test_the_transport_uses_the_grids_clock_and_reads_replies():
    one = grid(lambda msg, context: RecordDict({"reply": ConfigRecord({"json": msg.content["plan"]["json"]})}))
    transport = GridTransport(one)
    name = transport.push(Outgoing(FIRST_NODE, "train", "1.0", '{"a": 1}', 10.0))
    (reply,) = transport.pull({name})
    assert (reply.reply_to, reply.text, reply.error) == (name, '{"a": 1}', "")
    transport.wait(1000)
    assert transport.now() == one.now() == 1000
    name = transport.push(Outgoing(FIRST_NODE, "evaluate", "1.0", "{}", 10.0))
    (reply,) = transport.pull({name})
    assert reply.text is None
    assert "No evaluate function" in reply.error
    empty = GridTransport(grid(lambda msg, context: RecordDict()))
    (reply,) = empty.pull({empty.push(Outgoing(FIRST_NODE, "train", "1.0", "", 10.0))})
    assert (reply.text, reply.error) == (None, "its reply holds no JSON")
    assert not reply.lost


def test_on_engines_that_answer_everything_who_vanished_is_lost():
    def app(msg, context):
        raise NoReply("not reachable")

    one = LocalGrid(Reported(app), 1, {})
    transport = GridTransport(one)
    (reply,) = transport.pull({transport.push(Outgoing(FIRST_NODE, "train", "1.0", "", 10.0))})
    assert (reply.text, reply.error, reply.lost) == (None, "not reachable", True)
