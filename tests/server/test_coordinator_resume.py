"""A run that was killed goes on to the same result, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import config, killed_at

from molehill.errors import ResumeError
from molehill.wire.store import load_tree
from molehill_server import checkpoint
from molehill_server.exchange.grants import Grants

KILLS = [
    ("fedit", 1),
    ("fedit", 5),
    ("fedit", 9),
    ("rolora", 6),
    ("fedsa", 4),
    ("flora", 8),
    ("fedex", 7),
    ("local", 8),
]


@pytest.mark.parametrize(("preset", "kill"), KILLS)
def test_a_killed_run_resumes_to_the_same_result(toy, preset, kill):
    settings = config(federation={"preset": preset, "select": {"name": "random", "fraction": 0.75}})
    whole = toy(settings, "whole").run()
    run = toy(settings, "killed")
    with pytest.raises(KeyboardInterrupt):
        run.run(killed_at(kill))
    again = run.run()
    assert np.array_equal(again.flat, whole.flat)
    assert [event["round"] for event in run.events("round")] == [1, 2, 3]
    assert len(run.events("end")) == 1


@pytest.mark.parametrize("opt", ["momentum", "adam"])
def test_the_server_optimiser_survives_a_kill(toy, opt):
    settings = config(federation={"server_opt": opt}, wire={"down": "int8"})
    whole = toy(settings, "whole").run()
    run = toy(settings, "killed")
    run.run_until_killed(3)
    assert np.array_equal(run.run().flat, whole.flat)


def test_killed_while_committing(toy, monkeypatch):
    settings = config()
    whole = toy(settings, "whole").run()
    run = toy(settings, "killed")
    real = checkpoint.save

    def dies(folder, state):
        if state.glob.round == 2:
            (folder / ".round-00002" / "blobs").mkdir(parents=True)
            raise KeyboardInterrupt
        return real(folder, state)

    monkeypatch.setattr(checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    monkeypatch.setattr(checkpoint, "save", real)
    assert np.array_equal(run.run().flat, whole.flat)
    assert [event["round"] for event in run.events("round")] == [1, 2, 3]
    assert sorted(path.name for path in (run.out / "checkpoints").iterdir()) == ["round-00002", "round-00003"]


def test_resuming_refuses_another_configuration_or_base(toy, tmp_path):
    run = toy(config())
    run.run()
    run.config = config(train={"lr": 0.5})
    with pytest.raises(ResumeError, match="another configuration"):
        run.start()
    run.config = config()
    tree, _ = load_tree(run.out / "initial.safetensors")
    from molehill.wire.store import save_tree

    save_tree(run.out / "initial.safetensors", tree, {"base": "c" * 64})
    with pytest.raises(ResumeError, match="another base model"):
        run.start()


def test_a_damaged_checkpoint_is_refused(toy):
    run = toy(config())
    run.run()
    (run.out / "checkpoints" / "round-00003" / "tree.safetensors").write_bytes(b"nothing")
    with pytest.raises(ResumeError, match="cannot be read"):
        run.start()


def test_a_retry_is_another_attempt_and_a_kill_is_not(toy, tmp_path):
    run, attempts = toy(config(run={"rounds": 1}, data={"clients": 2}, round={"quorum": 1.0, "retries": 2})), []
    run.grants = Grants(tmp_path / "grants")

    def fail_then_die(client, plan, reply):
        attempts.append(run.grants.of(client.name).attempt)
        if len(attempts) == 4:
            raise KeyboardInterrupt
        return None if len(attempts) == 1 else reply.model_dump_json()

    with pytest.raises(KeyboardInterrupt):
        run.run(fail_then_die)
    delivered = set(run.exchange._blobs)
    run.run(fail_then_die)
    assert attempts == [0, 0, 1, 1, 1, 1]
    assert set(run.events("round")[0]["deltas"].values()) <= delivered  # what was uploaded before the kill still counts
