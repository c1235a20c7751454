"""An owner that comes after the last round: what it chooses, what is written of it, and what is left alone."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny_world
import torch
from typer.testing import CliRunner
from verbs import ask, verb

from molehill.config import load as read_config
from molehill.errors import AdapterError, ConfigError, DataError, ResumeError
from molehill.files import digest_of
from molehill.tasks.schema import load_rows
from molehill_edge.tensors import read
from molehill_export.export import export_experts
from molehill_export.rows import labelled
from molehill_simulation.commands.generate import generate
from molehill_simulation.commands.personalise import personalise as command
from molehill_simulation.data import deal
from molehill_simulation.loaded import load
from molehill_simulation.newcomer import personalise
from molehill_simulation.simulate import simulate
from molehill_simulation.source import finished, open_source

TEXTS = ["the scene was very good", "it was a dull page and so poor"]
ROWS = [row for row in tiny_world.rows(5000) if len(row["text"].split()) <= 5][:960]  # short ones are soon learnt
MINE, FEW = ROWS[840:960], ROWS[800:825]
CHOICE = ("shared_model", "fitted_model", "trained_alone")


def digests(folder):
    return {str(path.relative_to(folder)): digest_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("newcomer")
    base = tiny_world.save_base(folder / "base", "bert")
    source = tiny_world.write_rows(folder / "rows.jsonl", ROWS[:800])
    config = tiny_world.config(
        base, source, personal={"head": "global"}, train={"steps": 100, "lr": 2e-2, "batch_size": 16},
        data={"clients": 2},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


def rows_of(path, rows):
    return tiny_world.write_rows(path, rows)


def contrary(rows):
    """The rows with every label taken for the next."""
    names = [*tiny_world.LABELS]
    return [{**row, "label": names[(names.index(row["label"]) + 1) % 3]} for row in rows]


def test_one_like_the_others_takes_what_they_have_and_the_run_stays_as_it_is(run, tmp_path):
    before = digests(run)
    data = rows_of(tmp_path / "mine.jsonl", MINE)
    words = (run, "--data", data, "--name", "late", "--out", tmp_path / "late", "--json")
    words += tuple(word for name in CHOICE for word in ("--candidate", name))
    said = json.loads(ask(verb(command), *words))
    assert digests(run) == before
    assert said["chosen"] in {"shared_model", "fitted_model"}
    assert said["candidates"] == [*CHOICE]
    assert (said["n_train"], said["n_test"]) == (90, 30)
    assert 15 <= said["aside"] <= 21
    assert said["why"] == f"chosen on {said['aside']} of 90 training rows, then made with all of them"
    assert said["stages"].keys() == {"base", "global", "personalised"}
    assert said["stages"]["global"]["accuracy"] > said["stages"]["base"]["accuracy"]
    low, high = said["gains"]["accuracy"]["interval"]
    assert low <= said["gains"]["accuracy"]["value"] <= high
    # Who asks its folder asks what was scored; the shared model, where that was chosen.
    out = tmp_path / "late"
    assert {path.name for path in (out / "clients").iterdir()} == {"late", "state.key"}
    answers = json.loads(ask(verb(generate), out, "--prompt", TEXTS[0], "--as", "late", "--json"))
    assert answers["model"]["as"] == "late"


def test_one_that_contradicts_the_others_takes_its_own_and_is_exported(run, tmp_path):
    data = rows_of(tmp_path / "other.jsonl", contrary(MINE))
    made = personalise(run, data, "other", tmp_path / "other", candidates=CHOICE)
    assert made.chosen == "trained_alone"
    assert made.gains["accuracy"].value > 0.2
    assert made.gains["accuracy"].interval[0] > 0
    source = open_source(tmp_path / "other")
    asked = load(tmp_path / "other", "other").predict(TEXTS)
    assert [each.label for each in asked] != [each.label for each in load(run).predict(TEXTS)]
    # What exports ask of a run: experts by a gate, rows to measure on, and when it ended.
    mine, theirs = (read(export_experts(source, tmp_path / gate, gate)[0])[0] for gate in ("other", "global"))
    assert any(not np.array_equal(mine[name], theirs[name]) for name in mine if name.endswith("/B"))
    assert len(labelled(source, "other", None)) == made.n_test
    assert finished(tmp_path / "other") == finished(run)


def test_one_with_few_rows_fits_the_model_to_them_and_is_told_why(run, tmp_path):
    data = rows_of(tmp_path / "few.jsonl", FEW)
    text = ask(verb(command), run / "adapter", "--data", data, "--out", tmp_path / "few")
    assert "fitted_model: not chosen: " in text
    assert "so the first candidate, fitted_model, was taken" in text
    kept = json.loads((tmp_path / "few/personalised.json").read_text())
    assert (kept["chosen"], kept["aside"]) == ("fitted_model", 0)
    assert kept["candidates"] == ["fitted_model", "shared_model", "own_adapter", "trained_alone"]  # without a head
    ours, theirs = (load(path, who).predict(TEXTS) for path, who in ((tmp_path / "few", "newcomer"), (run, "global")))
    assert [each.probabilities for each in ours] != [each.probabilities for each in theirs]


def test_one_that_stays_with_the_shared_model_has_it_as_it_is(run, tmp_path):
    made = personalise(run, rows_of(tmp_path / "few.jsonl", FEW), "late", tmp_path / "late", candidates=CHOICE)
    assert made.stages["personalised"] == made.stages["global"]
    assert made.gains["accuracy"].interval == (0.0, 0.0)
    ours, theirs = (load(path, who).predict(TEXTS) for path, who in ((tmp_path / "late", "late"), (run, "global")))
    assert [each.probabilities for each in ours] == [each.probabilities for each in theirs]


def test_the_run_and_the_command_say_what_can_be_chosen(run, tmp_path):
    data = rows_of(tmp_path / "few.jsonl", FEW)
    made = personalise(run, data, "late", tmp_path / "late", candidates=["shared_model", "fitted_model"])
    assert (made.chosen, made.candidates) == ("shared_model", ("shared_model", "fitted_model"))
    config = read_config(tmp_path / "late/config.toml")
    assert [ref.name for ref in config.personal.candidates] == ["shared_model", "fitted_model"]
    assert config.personal.holdout == 0.2


def test_what_was_scored_is_what_is_asked_where_the_rounds_left_patches(run, tmp_path):
    known = read_config(run / "config.toml")
    config = tiny_world.config(known.base.model, known.data.source, federation={"preset": "fedex"})
    simulate(config, tmp_path / "patched")
    made = personalise(tmp_path / "patched", rows_of(tmp_path / "mine.jsonl", MINE), "late")
    assert made.out == tmp_path / "patched-late"
    assert made.candidates == ("fitted_model", "shared_model", "own_adapter")  # what starts over is without patches
    config = read_config(made.out / "config.toml")
    (owner,) = deal(config.data, load_rows(config.data, config.task)[0], config.run.seed)
    for path, who, stage in ((tmp_path / "patched", "global", "global"), (made.out, "late", "personalised")):
        with load(path, who) as model:
            said = [each.label for each in model.predict(owner.test["text"])]
        right = np.mean([ours == theirs for ours, theirs in zip(said, owner.test["label"], strict=True)])
        assert right == pytest.approx(made.stages[stage].accuracy)


def test_bad_rows_are_told_with_file_and_line_and_leave_nothing(run, tmp_path):
    bad = rows_of(tmp_path / "bad.jsonl", [*MINE[:10], {"text": "so dull", "label": "angry"}])
    result = CliRunner().invoke(verb(command), [str(run), "--data", str(bad), "--out", str(tmp_path / "new")])
    assert result.exit_code == DataError.exit_code
    assert "bad.jsonl:11" in result.output.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_what_cannot_be_used_is_named(run, tmp_path):
    data = rows_of(tmp_path / "few.jsonl", FEW)
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="no run folder"):
        personalise(tmp_path, data, "late", out)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.toml").write_bytes((run / "config.toml").read_bytes())
    with pytest.raises(AdapterError, match=r"final\.safetensors is not there"):
        personalise(tmp_path / "half", data, "late", out)
    shutil.copytree(run, tmp_path / "kept")
    text = (run / "config.toml").read_text()
    (tmp_path / "kept/config.toml").write_text(text.replace('gate = "anchored"', 'gate = "personal"'))
    with pytest.raises(ConfigError, match=r"no model that all share.* nothing for owners that come later"):
        personalise(tmp_path / "kept", data, "late", out)
    with pytest.raises(ConfigError, match="has an owner called 'client-1'"):
        personalise(run, data, "client-1", out)
    for name in ("global", "../up", ""):
        with pytest.raises(ConfigError, match="--name"):
            personalise(run, data, name, out)
    with pytest.raises(ConfigError, match=r"--candidate.*shared_modle"):
        personalise(run, data, "late", out, candidates=["shared_modle"])
    with pytest.raises(DataError, match="no such file"):
        personalise(run, tmp_path / "none.jsonl", "late", out)
    with pytest.raises(DataError, match=r"one.jsonl.* Give more rows"):
        personalise(run, rows_of(tmp_path / "one.jsonl", ROWS[:1]), "late", out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ResumeError, match="something already"):
        personalise(run, data, "late", out)
