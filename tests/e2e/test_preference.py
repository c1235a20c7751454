"""Preferences from a file to a device: a federation learns which answer is better, and writes like it."""

from __future__ import annotations

import math

import pytest
import tiny_world

from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal
from molehill_export.export import Options, export
from molehill_simulation.loaded import load
from molehill_simulation.report import render
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source
from molehill_simulation.summary import read_summary

SIZES = {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
WORSE = {"negative": "positive", "neutral": "negative", "positive": "neutral"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference")
    base = tiny_world.save_base(folder / "base", "llama", hidden_size=32, **SIZES)
    rows = [
        {"prompt": row["text"], "chosen": row["label"], "rejected": WORSE[row["label"]]} for row in tiny_world.rows(60)
    ]
    config = tiny_world.config(
        base, tiny_world.write_rows(folder / "rows.jsonl", rows), task={"kind": "preference", "max_length": 32},
        molora={"targets": "all-linear", "experts": 2, "rank": 4, "scope": "layer", "alpha": 16.0},
        train={"steps": 30, "lr": 1e-2, "objective": {"name": "dpo", "beta": 0.5}}, run={"rounds": 1},
        evaluate={"baselines": True, "generate": 2}, engine={"together": 3},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


def test_the_better_answer_gains_and_the_base_prefers_none(run):
    summary = read_summary(run / "summary.json")
    assert summary.mean.base == 0.5
    assert summary.loss.mean.base == pytest.approx(math.log(2))
    assert summary.figures["margin"].mean.base == 0.0
    assert summary.mean.personalised > 0.6
    assert summary.figures["margin"].mean.personalised > 0
    assert summary.loss.mean.personalised < math.log(2)
    assert all(client.answered == 2 for client in summary.clients)


def test_the_report_says_what_a_pair_is(run):
    page = render(run)
    assert "so the base itself has one half" in page
    assert "pairs preferred aright" in page


def test_it_writes_on_host_and_device_alike(run, tmp_path):
    question = tiny_world.rows(60)[0]["text"]
    with load(run) as model:
        assert model.writes
        written = model.generate(question, max_new_tokens=4).text
    export(open_source(run), tmp_path / "bundle", Options(scheme="fp32"))
    with Bundle.open(tmp_path / "bundle", trust=InsecureLocal(lambda _: None)) as bundle:
        assert bundle.manifest.task.kind == "causal-lm"
        assert bundle.generate(question, max_new_tokens=4).text == written
