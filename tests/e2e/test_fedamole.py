"""Experts choose their clients: told embeddings, dealt experts, and what becomes of a run that stops."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_world
import torch

from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate

DEALT = {"experts": 4, "rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["query", "intermediate.dense"]}


@pytest.fixture(scope="module")
def made(bert, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fedamole")
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(120))
    config = tiny_world.config(
        bert, source,
        run={"rounds": 3},
        molora={"preset": "fedamole", **DEALT},
        personal={"gate": "split", "head": "global", "steps": 0},
        federation={"preset": "fedamole"},
    )  # fmt: skip
    simulate(config, folder / "run")
    return config, folder / "run"


def test_every_expert_has_two_clients_in_every_round_the_first_among_them(made):
    _, out = made
    decided = tiny_world.events(out, "assigned")
    assert [event["round"] for event in decided] == [0, 1, 2]
    for event in decided:
        for expert in ("e0", "e1", "e2", "e3"):
            assert sum(expert in trains for trains in event["trains"].values()) == 2
        assert all(len(trains) >= 2 for trains in event["trains"].values())
    assert not any(event["quarantined"] for event in tiny_world.events(out, "round"))


def test_a_client_asks_its_own_experts_alone(made):
    _, out = made
    states, last = tiny_world.states(out), tiny_world.events(out, "assigned")[-1]
    assert last["round"] == 2
    for client, leans in last["leans"].items():
        for key, value in states[f"{client}/3"].tree.items():
            assert key.role == "gate.own.lean"
            assert value.tolist() == [leans[expert] for expert in ("e0", "e1", "e2", "e3")]
            assert {expert for expert, lean in leans.items() if lean == 0} == set(last["trains"][client])
    first = tiny_world.events(out, "assigned")[0]["trains"]
    for client, tokens in tiny_world.events(out, "round")[0].get("tokens", {}).items():
        assert {expert for expert, count in tokens.items() if count > 0} == {*first[client], "shared0"}


def test_a_run_that_stops_goes_on_as_if_it_had_not(made, tmp_path):
    config, out = made

    tiny_world.stopped_after(1, config, tmp_path / "run")
    simulate(config, tmp_path / "run")
    ours, theirs = (load_tree(path / "final.safetensors")[0] for path in (tmp_path / "run", out))
    assert ours.digest == theirs.digest
    again = [event["trains"] for event in tiny_world.events(tmp_path / "run", "assigned")]
    assert again == [event["trains"] for event in tiny_world.events(out, "assigned")]
    assert np.isfinite(ours.flat).all()
