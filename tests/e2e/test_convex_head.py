"""A head that is computed after the rounds: owners whose classes occur unlike gain by it, and it is a head as any."""

from __future__ import annotations

import random

import pytest
import tiny_world
import torch

from molehill.config import load as load_config
from molehill_simulation.loaded import load
from molehill_simulation.simulate import simulate
from molehill_simulation.summary import read_summary
from molehill_simulation.world import open_world

OFTEN = {"negative": "books", "positive": "films"}


def shifted():
    """Rows of two owners who have texts alike and labels unlike: four of five of one label are of one owner."""
    rng, other = random.Random(1), {"books": "films", "films": "books"}
    rows = []
    for row in tiny_world.rows(150):
        owner = OFTEN.get(row["label"], rng.choice(list(other)))
        rows.append({**row, "domain": owner if rng.random() < 0.85 else other[owner]})
    return rows


@pytest.fixture(scope="module")
def made(bert, tmp_path_factory):
    """The configuration, the run folder, and what it came to, with a computed head."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("convex")
    source = tiny_world.write_rows(folder / "rows.jsonl", shifted())
    config = tiny_world.config(
        bert, source, data={"clients": 2, "partition": {"name": "by_column", "column": "domain"}},
        personal={"head": "convex", "steps": 0},
    )  # fmt: skip
    return config, folder / "run", simulate(config, folder / "run")


def test_owners_whose_classes_occur_unlike_gain_without_a_step(made):
    _, out, summary = made
    assert summary == read_summary(out / "summary.json")
    for client in summary.clients:
        assert client.personalised > client.global_
    assert summary.mean.personalised > summary.mean.global_ + 0.1
    assert summary.loss.mean.personalised < summary.loss.mean.global_ - 0.05


def test_with_anchored_and_no_steps_nobody_does(made, tmp_path):
    config, *_ = made
    plain = config.model_copy(update={"personal": config.personal.model_copy(update={"head": "anchored"})})
    summary = simulate(plain, tmp_path / "plain")
    assert summary.mean.personalised == summary.mean.global_ == made[2].mean.global_


def test_a_run_that_stops_between_the_owners_comes_to_the_same_heads(made, tmp_path):
    config, out, _ = made
    seen = []

    def stop(event):
        seen.append(event["event"])
        if seen.count("evaluation") == 1 or (event["event"] == "progress" and seen.count("round") == 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", observer=stop)
    tiny_world.forget()
    simulate(config, tmp_path / "run")
    mine, theirs = tiny_world.states(tmp_path / "run"), tiny_world.states(out)
    assert {name: state.tree.digest for name, state in mine.items()} == {
        name: state.tree.digest for name, state in theirs.items()
    }
    for name in ("books/2", "films/2"):
        assert {key.role for key in mine[name].tree if key.kind == "head"} == {
            "head.residual.weight", "head.residual.bias",
        }  # fmt: skip
        assert all(key.residual for key in mine[name].tree)


def test_the_head_answers_for_its_owner_and_nobody_else(made):
    _, out, summary = made
    told = dict(zip(("books", "films"), summary.clients, strict=True))
    for name, owner in ((owner.name, owner) for owner in open_world(load_config(out / "config.toml")).owners):
        right = {}
        for who in (name, None):
            with load(out, who) as model:
                found = model.classify(owner.test["text"])
            right[who] = sum(a.label == b for a, b in zip(found, owner.test["label"], strict=True)) / len(found)
        assert right == pytest.approx({name: told[name].personalised, None: told[name].global_})
