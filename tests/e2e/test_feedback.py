"""Whatever happens to deltas in a federation, with error feedback nothing of what was learnt gets lost."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_world

from molehill.wire.message import decode_delta, digest
from molehill.wire.tree import Tree
from molehill_client import participant
from molehill_simulation.simulate import simulate

UP = {"up": {"name": "compeft", "density": 0.1}}
TROUBLES = {
    "late": {"scenario": {"stragglers": 0.5, "delay": 50.0}, "round": {"quorum": 0.3, "deadline": 60.0, "grace": 1.0}},
    "quarantined": {"scenario": {"garbage": {"client-3": "nan"}}, "round": {"quorum": 0.3}},
    "below quorum": {"scenario": {"dropout": 0.3}, "round": {"quorum": 0.7, "retries": 20}},
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_was_learnt_was_used_or_is_still_to_be_sent(config, tmp_path, monkeypatch, trouble):
    learnt, blobs, real = {}, {}, participant.encode_delta

    def encode(delta, codec, memory=None):
        blob = real(delta, codec, memory)
        learnt[delta.client, delta.round] = delta.tree.copy()  # of the last attempt
        blobs[digest(blob)] = blob
        return blob

    monkeypatch.setattr(participant, "encode_delta", encode)
    settings = config(wire=UP, run={"rounds": 6}, **TROUBLES[trouble])
    simulate(settings, tmp_path)
    rounds = tiny_world.events(tmp_path, "round")
    used = {client: [] for client, _ in learnt}
    for event in rounds:
        for client, name in event["deltas"].items():
            used[client].append(decode_delta(blobs[name], 2**24).tree)
    unused = 0
    for client, trees in used.items():
        all_learnt = [tree.flat for (name, _), tree in learnt.items() if name == client]
        unused += len(all_learnt) - len(trees)
        state = tiny_world.states(tmp_path)[f"{client}/6"]
        last = max((event["round"] for event in rounds if client in event["accepted"]), default=0)
        state.settle(last)
        left = Tree.of(state.memory)
        np.testing.assert_allclose(
            np.sum([tree.flat for tree in trees], axis=0) + left.flat, np.sum(all_learnt, axis=0), atol=1e-6
        )
    assert unused or tiny_world.events(tmp_path, "retry")
