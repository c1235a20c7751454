"""FedLEASE: clients learn alone, clusters of them make experts, and each trains its cluster's expert on."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny_world
import torch

from molehill.config import parse
from molehill.wire.keys import Key
from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate

WARMUP = 2
FLIPPED = {"positive": "negative", "negative": "positive"}


def rows():
    """Four owners of like texts, of which two mean the opposite by the labels."""
    rng, found = random.Random(2), []
    for row in tiny_world.rows(320):
        owner = rng.choice(("a-1", "a-2", "b-1", "b-2"))
        found.append(
            {
                **row,
                "label": row["label"] if owner[0] == "a" else FLIPPED.get(row["label"], row["label"]),
                "domain": owner,
            }
        )
    return found


@pytest.fixture(scope="module")
def made(bert, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fedlease")
    source = tiny_world.write_rows(folder / "rows.jsonl", rows())
    config = tiny_world.config(
        bert, source,
        run={"rounds": 4},
        data={"clients": 4, "partition": {"name": "by_column", "column": "domain"}},
        molora={"preset": "fedlease", "experts": 3, "dropout": 0.0},
        train={"steps": 8, "lr": 0.01, "head_lr": 1e-4, "batch_size": 16},
        personal={"gate": "split", "steps": 0},
        federation={"preset": "fedlease", "assign": {"name": "lease", "warmup": WARMUP, "most": 3}},
        wire={"up": "fp32", "down": "fp32"},
    )  # fmt: skip
    return config, folder / "run", simulate(config, folder / "run")


def tree(out, name):
    return load_tree(out / name)[0]


def test_clusters_are_found_and_each_trains_its_own_expert(made):
    _, out, summary = made
    (decided,) = tiny_world.events(out, "assigned")
    assert decided["round"] == WARMUP
    trains = decided["trains"]
    assert trains["a-1"] == trains["a-2"] != trains["b-1"] == trains["b-2"]
    assert {expert for each in trains.values() for expert in each} == {"e0", "e1"}
    assert decided["leans"]["a-1"] == {trains["a-1"][0]: 2.0, trains["b-1"][0]: 1.0}
    assert summary.mean.personalised > summary.mean.global_


def test_nothing_is_merged_in_the_warm_up_and_what_is_not_ones_own_stays(made, tmp_path):
    config, out, _ = made
    assert [event["report"] for event in tiny_world.events(out, "round")][:WARMUP] == [{}] * WARMUP
    short = config.model_copy(update={"run": config.run.model_copy(update={"rounds": WARMUP})})
    simulate(short, tmp_path / "formed")
    formed = tree(tmp_path / "formed", "final.safetensors")
    final, initial = tree(out, "final.safetensors"), tree(out, "initial.safetensors")
    for key in initial:
        if key.expert == "e2":  # nobody's, so it stays as it was formed
            np.testing.assert_array_equal(final[key], formed[key])
        moved = not np.array_equal(final[key], formed[key])
        if key.role.startswith("gate.of."):
            assert np.array_equal(formed[key], initial[key])  # routers rest in the warm-up
            assert moved == (".e2." not in key.role)
        elif key.expert in {"e0", "e1"} or key.kind == "head":
            assert moved


def test_an_expert_starts_as_the_mean_of_what_its_cluster_learnt_alone(made, tmp_path):
    config, _, _ = made
    short = config.model_copy(update={"run": config.run.model_copy(update={"rounds": WARMUP})})
    simulate(short, tmp_path / "run")
    formed, states = tree(tmp_path / "run", "final.safetensors"), tiny_world.states(tmp_path / "run")
    (decided,) = tiny_world.events(tmp_path / "run", "assigned")
    alone = {client: states[f"{client}/{WARMUP}"].tree for client in decided["trains"]}
    checked = 0
    for key in formed:
        if key.kind not in {"A", "B"}:
            continue
        members = [client for client, own in decided["trains"].items() if own == [key.expert]] or list(alone)
        learnt = [alone[client][key._replace(expert="e0")] for client in members]
        np.testing.assert_allclose(formed[key], np.mean(learnt, axis=0), atol=1e-5)
        checked += len(members)
    assert checked
    key = Key("head", "-", "head.weight")
    np.testing.assert_allclose(formed[key], np.mean([each[key] for each in alone.values()], axis=0), atol=1e-5)
    a, b = (alone[client] for client in ("a-1", "a-2"))
    assert not np.allclose(a.flat, b.flat)  # they were not averaged


def test_a_run_that_stops_goes_on_as_if_it_had_not(made, tmp_path):
    config, out, _ = made

    tiny_world.stopped_after(1, config, tmp_path / "run")
    simulate(config, tmp_path / "run")
    assert tree(tmp_path / "run", "final.safetensors").digest == tree(out, "final.safetensors").digest


def test_who_was_not_there_has_the_shared_model_then_trains_apart_and_joins(made, tmp_path):
    config, _, _ = made
    federation = {
        "preset": "fedlease",
        "assign": {"name": "lease", "warmup": 1},
        "select": {"name": "random", "fraction": 0.75},
    }
    for rounds in (1, 2):
        values = {**config.model_dump(mode="json"), "federation": federation}
        simulate(parse({**values, "run": {**values["run"], "rounds": rounds}}), tmp_path / str(rounds))
    first, second = tiny_world.events(tmp_path / "2", "round")
    (new,) = set(second["selected"]) - set(first["selected"])
    assert first["report"] == {}
    assert second["report"]["updates"] == 2  # of three, of which one is new and trains apart
    formed, joined = (event["trains"] for event in tiny_world.events(tmp_path / "2", "assigned"))
    assert joined.keys() - formed.keys() == {new}
    assert joined[new] in formed.values()
    for event in tiny_world.events(tmp_path / "1", "evaluation"):
        stages = event["stages"]
        assert (stages["personalised"]["loss"] == stages["global"]["loss"]) is (event["client"] == new)
