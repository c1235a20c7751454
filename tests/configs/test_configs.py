"""Every configuration that ships loads, is accepted, and runs a round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_world
import torch

from molehill.config import load, parse
from molehill.wire.store import load_tree
from molehill_server.check import check
from molehill_simulation.simulate import simulate

ROOT = Path(__file__).parents[2] / "configs"
FILES = sorted(ROOT.rglob("*.toml"))
# With B = 0 at the start, A learns nothing in the first step.
TINY = (
    "run.rounds=1",
    "train.steps=2",
    "train.batch_size=4",
    "personal.steps=2",
    "data.clients=2",
    "task.max_length=32",
    "base.device=cpu",
    "wire.down=fp32",
    "engine.workers=1",
)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """What makes a configuration tiny, by kind of task."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")

    def make(kind):
        base = tiny_world.save_base(folder / kind, kind)
        rows = [row | {"words": len(row.get("text", "").split())} for row in tiny_world.rows(24, kind)]
        source = tiny_world.write_rows(folder / f"{kind}.jsonl", rows)
        return (*TINY, f"base.model={base}", f"data.source={source}")

    return {"classification": make("bert"), "causal-lm": make("llama"), "mixture": make("olmoe")}


def test_the_files_are_where_the_documentation_says():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    baselines = ("local", "fedit", "ffa", "fedsa", "flora", "flexlora", "fedex", "fedlease")
    assert {"demo.toml", "causal-lm.toml", *(f"baselines/{name}.toml" for name in baselines)} <= names
    assert len([name for name in names if name.startswith("methods/")]) >= 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_configuration_is_accepted_as_it_ships(path):
    config = load(path)
    assert [conflict for conflict in check(config) if conflict.verdict == "refuse"] == []
    assert parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_configuration_runs_a_step(path, overrides, tmp_path):
    shipped = load(path)
    waits = shipped.federation.assign.declared("assignment", "forms")  # else nothing is shared in a single round
    named = isinstance(next(iter(shipped.data.domains), 0), str)
    more = ["federation.assign.warmup=1"] * waits + ['data.domains=["books", "films"]'] * named
    own = "base_route" in shipped.molora.scorer.declared("scorer", "reads")
    config = load(path, (*overrides["mixture" if own else shipped.task.kind], *more))
    summary = simulate(config, tmp_path)
    assert load(tmp_path / "config.toml").digest == summary.config_digest
    assert summary.rounds == 1
    assert len(summary.clients) == 2
    for client in summary.clients:
        assert all(0 <= value <= 1 for value in client.row)  # no stage is missing
    (event,) = tiny_world.events(tmp_path, "round")
    assert event["quarantined"] == {}
    assert len(event["accepted"]) == 2
    assert tiny_world.events(tmp_path, "failed") == []
    initial, _ = load_tree(tmp_path / "initial.safetensors")
    final, _ = load_tree(tmp_path / "final.safetensors")
    assert np.isfinite(final.flat).all()
    stays = final.layout == initial.layout and np.array_equal(final.flat, initial.flat)
    assert stays == (config.federation.preset == "local")  # which shares nothing
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert (tmp_path / "adapter" / "molora.json").is_file()
