"""Owners of two kinds are told apart, lean on experts of their own, and keep that to themselves."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny_world
import torch

from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate
from molehill_simulation.world import open_world

OFTEN = {"a": "negative", "b": "positive"}


def rows():
    """Four owners of like texts, of which two have one label more often, and two another."""
    rng, found = random.Random(2), []
    for row in tiny_world.rows(400):
        owner = rng.choice(("a-1", "a-2", "b-1", "b-2"))
        if row["label"] == OFTEN[owner[0]] or rng.random() < 0.3:
            found.append({**row, "domain": owner})
    return found


@pytest.fixture(scope="module")
def made(bert, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("assignment")
    source = tiny_world.write_rows(folder / "rows.jsonl", rows())
    config = tiny_world.config(
        bert, source,
        run={"rounds": 4},
        data={"clients": 4, "partition": {"name": "by_column", "column": "domain"}},
        molora={"experts": 2, "selector": "dense", "scorer": "leaning", "init": "alike"},
        train={"steps": 8, "lr": 0.02},
        personal={"steps": 0},
        federation={"assign": {"name": "clusters", "warmup": 1, "least": 0.0}},
    )  # fmt: skip
    return config, folder / "run", simulate(config, folder / "run")


def final(out):
    return load_tree(out / "final.safetensors")[0]


def test_kinds_are_told_apart_and_each_owner_keeps_what_it_leans_on(made):
    _, out, summary = made
    (decided,) = tiny_world.events(out, "assigned")
    leans = decided["leans"]
    assert decided["round"] == 1
    assert leans["a-1"] == leans["a-2"] != leans["b-1"] == leans["b-2"]
    assert {expert for each in leans.values() for expert in each} == {"e0", "e1"}
    states = tiny_world.states(out)
    for client, lean in leans.items():
        kept = {key: value for key, value in states[f"{client}/4"].tree.items() if key.own}
        assert len(kept) > 1
        for key, value in kept.items():
            assert key.role == "gate.own.lean"
            np.testing.assert_allclose(value, [lean.get("e0", 0.0), lean.get("e1", 0.0)], atol=0.5)  # it learns on
    assert summary.mean.personalised > summary.mean.global_
    assert summary.loss.mean.personalised < summary.loss.mean.global_


def test_a_run_that_stops_goes_on_as_if_it_had_not(made, tmp_path):
    config, out, _ = made

    tiny_world.stopped_after(2, config, tmp_path / "run")
    simulate(config, tmp_path / "run")
    assert final(tmp_path / "run").digest == final(out).digest
    assert len(tiny_world.events(tmp_path / "run", "assigned")) == 1


def test_owners_by_themselves_and_in_the_same_passes_come_to_the_same(made, tmp_path):
    config, out, _ = made
    alone = config.model_copy(update={"engine": config.engine.model_copy(update={"together": 1, "workers": 1})})
    simulate(alone, tmp_path / "alone")
    ours, theirs = (final(path) for path in (out, tmp_path / "alone"))
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], atol=2e-3)
    assert (
        tiny_world.events(out, "assigned")[0]["leans"] == tiny_world.events(tmp_path / "alone", "assigned")[0]["leans"]
    )


def test_alike_experts_are_one_until_somebody_leans(made):
    model = open_world(made[0]).model
    A = {key: value for key, value in model.tree().items() if key.kind == "A"}
    for key, value in A.items():
        assert np.array_equal(value, A[key._replace(expert="e0")])
    B = {key: np.ones(shape, np.float32) for key, shape in model.layout.items() if key.kind == "B"}
    model.load(B)
    x = torch.randint(9, 30, (2, 6))
    mask = torch.ones_like(x, dtype=torch.bool)
    before = model.hidden(x, mask)
    model.load({key: np.array([5.0, -5.0], np.float32) for key in model.layout if key.own})
    torch.testing.assert_close(model.hidden(x, mask), before)
