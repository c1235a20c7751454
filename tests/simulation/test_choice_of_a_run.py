"""A run in which owners choose what they make of the final model: what is told of it, kept, asked and exported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_world
import torch
from safetensors.numpy import load_file

from molehill.errors import ConfigError
from molehill_edge import Bundle, InsecureLocal
from molehill_edge.tensors import read
from molehill_export.elsewhere import Wanted, write_elsewhere
from molehill_export.export import Options, export, export_experts
from molehill_simulation.loaded import load
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

TEXTS = ["the scene was very good", "it was a dull page and so poor"]


def contrary(rows):
    """Rows of which one domain says of every text what the other does not, in three owners."""
    turn = dict(zip(tiny_world.LABELS, [*list(tiny_world.LABELS)[1:], *list(tiny_world.LABELS)[:1]], strict=True))
    owners = ["one", "two", "three"]
    return [
        {**row, "label": turn[row["label"]] if i % 3 == 2 else row["label"], "owner": owners[i % 3]}
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("choice")
    base = tiny_world.save_base(folder / "base", "bert")
    source = tiny_world.write_rows(folder / "rows.jsonl", contrary(tiny_world.rows(360)))
    adapter = {"name": "own_adapter", "along": [1.0], "steps": 100}
    config = tiny_world.config(
        base, source,
        data={"partition": {"name": "by_column", "column": "owner"}},
        personal={"holdout": 0.25, "candidates": ["shared_model", adapter], "head": "global"},
        train={"steps": 25, "lr": 2e-2, "batch_size": 16},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


def test_everybody_is_told_what_was_chosen(run):
    summary = json.loads((run / "summary.json").read_text())
    chosen = {client["id"]: client["chosen"] for client in summary["clients"]}
    assert set(chosen.values()) <= {"shared_model", "own_adapter"}
    assert "own_adapter" in chosen.values()
    assert {event["client"]: event["chosen"] for event in tiny_world.events(run, "evaluation")} == chosen
    kept = {client: tiny_world.states(run)[f"{client}/2"].chosen for client in chosen}
    assert kept == chosen
    for client in summary["clients"]:
        assert client["aside"] in {22, 23}
    report = (run / "report.html").read_text()
    assert f"own_adapter by {list(chosen.values()).count('own_adapter')}" in report


@pytest.fixture
def owner(run):
    """One who has experts of its own."""
    summary = json.loads((run / "summary.json").read_text())
    return next(client["id"] for client in summary["clients"] if client["chosen"] == "own_adapter")


def test_what_is_asked_and_exported_is_what_was_scored(run, owner, tmp_path):
    source = open_source(run)
    own = tiny_world.states(run)[f"{owner}/2"].own
    with source.gate(owner) as model:
        found = model.tree(own.layout)
        assert all(np.allclose(found[key], own[key], atol=1e-6) for key in own)
    asked = load(run, owner).predict(TEXTS)
    shared = load(run).predict(TEXTS)
    assert [each.probabilities for each in asked] != [each.probabilities for each in shared]
    export(source, tmp_path / "bundle", Options(gates=(owner,), scheme="fp32", force=True))
    with Bundle.open(tmp_path / "bundle", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        for ours, theirs in zip(asked, bundle.classify(TEXTS), strict=True):
            assert ours.label == theirs.label
            assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-4)
    with pytest.raises(ConfigError, match="experts of its own"):
        export(source, tmp_path / "both", Options(gates=("global", owner), scheme="fp32", force=True))
    mine, theirs = (read(export_experts(source, tmp_path / gate, gate)[0])[0] for gate in (owner, "global"))
    assert mine.keys() == theirs.keys()
    assert any(not np.array_equal(mine[name], theirs[name]) for name in mine if name.endswith("/B"))


def test_a_whole_model_of_an_owner_has_its_own_experts(run, owner, tmp_path):
    weights = {}
    for gate in (owner, "global"):
        write_elsewhere(open_source(run), tmp_path / gate, Wanted(gate=gate, merged=True, float32=True, force=True))
        kept = load_file(tmp_path / gate / "model.safetensors")
        (name,) = (name for name in kept if name.endswith("layer.0.attention.self.query.weight"))
        weights[gate] = kept[name]
    assert not np.allclose(weights[owner], weights["global"], atol=1e-4)
