"""The event file of a run that goes on."""

from __future__ import annotations

import pytest
from toy_federation import config

from molehill.errors import DataError, ResumeError
from molehill_server.events import EMPTY, EventLog, read, rewind


@pytest.fixture
def log(tmp_path):
    """A log, what it held when it was committed, and what it said of that."""
    events = EventLog(tmp_path / "metrics.jsonl")
    assert events.commit() == EMPTY
    events.emit("refused", client="", reason="node 7: no hello")  # nodes are asked before the run starts
    events.emit("start", rounds=2)
    return events, read(tmp_path / "metrics.jsonl"), events.commit()


def test_rewinding_keeps_all_up_to_the_mark(tmp_path, log):
    events, whole, mark = log
    events.emit("round", round=1)
    path = tmp_path / "metrics.jsonl"
    assert len(read(path)) == 3
    rewind(path, mark)
    assert read(path) == whole
    assert EventLog(path).commit() == mark
    rewind(path, mark)
    assert read(path) == whole


DAMAGES = {
    "lost": lambda path, data: path.unlink(),
    "empty": lambda path, data: path.write_bytes(b""),
    "halved": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "zeroed": lambda path, data: path.write_bytes(bytes(len(data))),
    "a bit": lambda path, data: path.write_bytes(data[:30] + bytes([data[30] ^ 1]) + data[31:]),
    "a line less": lambda path, data: path.write_bytes(data.split(b"\n", 1)[1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_events_that_were_damaged_since_are_refused(tmp_path, log, damage):
    _, _, mark = log
    path = tmp_path / "metrics.jsonl"
    DAMAGES[damage](path, path.read_bytes())
    with pytest.raises(ResumeError, match=rf"metrics\.jsonl: .* damaged .*\(\d+ of {mark.size} bytes"):
        rewind(path, mark)


def test_an_event_that_is_nested_without_end_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not an event"):
        read(path)


def test_a_run_killed_in_its_first_round_keeps_its_start(toy):
    run = toy(config(run={"rounds": 1}))

    def dies(client, plan, reply):
        raise KeyboardInterrupt

    stranger = type("Stranger", (), {"hello": lambda self: {"client": "no version"}})()

    def with_stranger(fault):
        coordinator = run.start(fault)
        run.transport.clients[99] = stranger
        return coordinator

    with pytest.raises(KeyboardInterrupt):
        with_stranger(dies).run()
    with_stranger(None).run()
    kinds = [event["event"] for event in run.events()]
    assert kinds[:2] == ["refused", "start"]
    assert kinds.count("start") == 1
    assert "resume" in kinds
