"""The event file of a run that goes on."""

from __future__ import annotations

import pytest
from toy_federation import config

from molehill_server.events import EventLog, read, rewind


@pytest.mark.parametrize(("round_number", "count"), [(0, 2), (1, 5), (2, 8)])
def test_rewinding_keeps_all_up_to_the_end_of_a_round(tmp_path, round_number, count):
    path = tmp_path / "metrics.jsonl"
    log = EventLog(path)
    log.emit("refused", client="", reason="node 7: no hello")  # nodes are asked before the run starts
    log.emit("start", rounds=2)
    for number in (1, 2):
        log.emit("retry", round=number)
        log.emit("progress")
        log.emit("round", round=number)
    log.emit("resume", round=2)
    whole = read(path)
    rewind(path, round_number)
    assert read(path) == whole[:count]


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
