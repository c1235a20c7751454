"""`molehill check --probe`: the time of a run, from steps that were trained."""

from __future__ import annotations

import json
import math

import pytest
import tiny_world
from typer.testing import CliRunner

from molehill.cli import app
from molehill_simulation.describe import describe


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(60, "bert"))
    return tiny_world.save_base(folder / "base", "bert"), source


@pytest.mark.parametrize(("workers", "together", "baselines"), [(1, 1, False), (2, 2, True)])
def test_the_time_is_that_of_all_steps_over_the_processes(world, workers, together, baselines):
    engine = {"workers": workers, "together": together}
    config = tiny_world.config(*world, engine=engine, evaluate={"baselines": baselines}, federation={"preset": "ffa"})
    told = describe(config, probe=3)
    time = told.time
    assert time is not None
    assert (time.steps, len(time.clients)) == (3, together)
    assert (time.rounds, time.asked, time.each, time.processes) == (2, 3, 2, workers)
    assert 0 < time.step < math.inf
    assert time.training == pytest.approx(2 * 3 * 2 * time.step / workers)
    assert time.training < time.whole < math.inf
    said = dict(told.plan)["time"]
    assert " s of training: 2 rounds x 3 clients x 2 steps x " in said
    assert "not looked at" not in dict(told.plan) or "time" not in dict(told.plan)["not looked at"]


def test_steps_are_trained_only_where_somebody_asks_and_base_and_rows_are_here(world, tmp_path):
    base, source = world
    path = tmp_path / "run.toml"
    path.write_text(f'[base]\nmodel = "{base}"\n[task]\nmax_length = 16\n[data]\nsource = "{source}"\n'
                    'partition = "iid"\nclients = 2\n[molora]\nexperts = 2\nrank = 2\n')  # fmt: skip
    plain = json.loads(run("check", path, "--json").stdout)
    assert "time" not in plain
    assert "time (--probe 3 trains some steps)" in plain["plan"]["not looked at"]
    probed = json.loads(run("check", path, "--probe", 1, "--json").stdout)
    assert probed["time"]["training"] > 0
    for key in ("base.model=someone/some-model", "data.source=someone/rows"):
        refused = run("check", path, "--probe", 1, "--set", key, "--json")
        assert refused.exit_code == 2, refused.output
        assert json.loads(refused.stdout)["error"]["where"] == "--probe"
    assert run("check", path, "--probe", 0).exit_code == 2
