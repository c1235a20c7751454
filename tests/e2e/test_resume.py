"""Killed at any moment and resumed, a run comes to the same end; and it is resumed as what it was, or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_world

from molehill.errors import FederationError, ResumeError
from molehill.wire.store import load_tree
from molehill_simulation.simulate import simulate

FEEDBACK = {"up": {"name": "compeft", "density": 0.2}}
RUNS = {
    "anchored": {},
    "personal": {"personal": {"gate": "personal", "head": "personal"}},
    "error feedback": {"wire": FEEDBACK},
    "server state": {"federation": {"server_opt": {"name": "adam", "lr": 1e-2}}},
    "in groups": {"engine": {"workers": 1, "together": 2}},
    "patches": {"federation": {"preset": "fedex"}},
    "chance": {"federation": {"select": {"name": "random", "fraction": 0.6}}, "scenario": {"availability": 0.7}},
}


def end_of(out):
    """Everything that must not depend on how often the run was interrupted."""
    summary = json.loads((out / "summary.json").read_text())
    del summary["seconds"]
    trees = {"final": load_tree(out / "final.safetensors")[0]}
    held = {}
    for name, state in tiny_world.states(out).items():
        trees[name], trees[f"{name} memory"], held[name] = state.tree, state.memory, state.held
    rounds = [
        {key: value for key, value in event.items() if key not in {"time", "seconds"}}
        for event in tiny_world.events(out, "round")
    ]
    return summary, {name: tree.digest for name, tree in trees.items()}, held, rounds


class Stop:
    """Ends the run as Ctrl-C does, at its n-th event."""

    def __init__(self, at):
        self.left = at
        self.seen = []

    def __call__(self, event):
        if event["event"] in {"rows", "working"}:  # before the run begins, and now and then, as time goes by
            return
        self.seen.append(event["event"])
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(bert, source, tmp_path_factory):
    """The end of a run that nobody interrupts, by name; each is run once."""
    known = {}

    def run(name):
        if name not in known:
            config = tiny_world.config(bert, source, **RUNS[name])
            out = tmp_path_factory.mktemp("undisturbed")
            watch = Stop(-1)
            simulate(config, out, observer=watch)
            tiny_world.forget()
            known[name] = config, end_of(out), watch.seen
        return known[name]

    return run


def kill_and_resume(config, out, at):
    with pytest.raises(KeyboardInterrupt):
        simulate(config, out, observer=Stop(at))
    tiny_world.forget()
    simulate(config, out)
    return end_of(out)


# Three clients: start, three steps of progress and the round, twice; then the evaluation, which begins with a line.
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 17])
def test_a_kill_at_any_event_changes_nothing(undisturbed, tmp_path, at):
    config, end, seen = undisturbed("anchored")
    assert seen[:5] == ["start", "progress", "progress", "progress", "round"]
    assert len(seen) == 17
    assert kill_and_resume(config, tmp_path, at) == end


@pytest.mark.parametrize("name", [name for name in RUNS if name != "anchored"])
def test_a_kill_at_every_round_and_between_clients_changes_nothing(undisturbed, tmp_path, name):
    config, end, seen = undisturbed(name)
    rounds = [at for at, event in enumerate(seen, start=1) if event == "round"]
    for at in [rounds[0] - 1, rounds[0], rounds[1] - 1, rounds[1]]:
        assert kill_and_resume(config, tmp_path / str(at), at) == end, at


def test_a_run_that_is_killed_again_and_again_comes_to_the_same_end(undisturbed, tmp_path):
    config, end, _ = undisturbed("error feedback")
    for at in (2, 4, 5, 3, 4, 2):
        with pytest.raises(KeyboardInterrupt):
            simulate(config, tmp_path, observer=Stop(at))
        tiny_world.forget()
    simulate(config, tmp_path)
    assert end_of(tmp_path) == end


def test_a_finished_run_resumes_to_itself(undisturbed, tmp_path):
    config, end, _ = undisturbed("anchored")
    for _ in range(2):
        simulate(config, tmp_path)
        assert end_of(tmp_path) == end
        tiny_world.forget()


def test_the_path_of_another_run_can_be_used_again_in_one_process(config, tmp_path):
    simulate(config(), tmp_path / "a")
    first = load_tree(tmp_path / "a" / "final.safetensors")[0]
    shutil.rmtree(tmp_path / "a")
    other = config(molora={"experts": 3}, run={"seed": 1})
    simulate(other, tmp_path / "a")
    again = load_tree(tmp_path / "a" / "final.safetensors")[0]
    assert len(again) > len(first)
    simulate(other, tmp_path / "b")
    np.testing.assert_array_equal(again.flat, load_tree(tmp_path / "b" / "final.safetensors")[0].flat)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": {"lr": 0.5}}, "train.lr"),
        ({"run": {"seed": 3, "name": "other"}}, "run.name, run.seed"),
        ({"molora": {"experts": 3}}, "molora.experts"),
        ({"personal": {"gate": "global"}}, "personal.gate"),
    ],
)
def test_another_configuration_is_refused_by_name(config, tmp_path, change, named):
    with pytest.raises(KeyboardInterrupt):
        simulate(config(), tmp_path, observer=Stop(5))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ResumeError, match=rf"another configuration, .*{re.escape(named)} differ.* Resume with"):
        simulate(config(**change), tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_another_base_is_refused_by_digest(config, bert, tmp_path):
    base = shutil.copytree(bert, tmp_path / "bert")
    settings = config(base={"model": str(base)})
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, tmp_path / "out", observer=Stop(5))
    tiny_world.forget()
    shutil.rmtree(base)
    tiny_world.save_base(base, "bert", seed=1)
    with pytest.raises(ResumeError, match=r"weight digest [0-9a-f]{12}, local:bert has [0-9a-f]{12}\. .*same base"):
        simulate(settings, tmp_path / "out")


def test_rows_that_changed_are_refused(config, source, tmp_path):
    rows = shutil.copy(source, tmp_path / "rows.jsonl")
    settings = config(data={"source": str(rows)})
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, tmp_path / "out", observer=Stop(5))
    tiny_world.forget()
    text = Path(rows).read_text(encoding="utf-8")
    word = next(word for word in tiny_world.WORDS if word in text)
    Path(rows).write_text(text.replace(word, "other", 1), encoding="utf-8")
    with pytest.raises(ResumeError, match=r"rows of .*rows\.jsonl are not those the run was started with"):
        simulate(settings, tmp_path / "out")


def test_the_personal_state_of_another_run_is_refused(config, finished, tmp_path):
    _, out = finished()
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        simulate(config(run={"name": "other"}), other, observer=Stop(6))  # in the second round
    shutil.rmtree(other / "clients")
    shutil.copytree(out / "clients", other / "clients")
    with pytest.raises(
        FederationError, match=r"client-1: .*personal state belongs to another run \('tiny', not 'other'\)"
    ):
        simulate(config(run={"name": "other"}), other)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_serves(undisturbed, tmp_path):
    config, end, _ = undisturbed("anchored")
    simulate(config, tmp_path)
    tiny_world.forget()
    last = max((tmp_path / "checkpoints").iterdir())
    (last / "tree.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(ResumeError, match="Delete this folder to use the one before"):
        simulate(config, tmp_path)
    tiny_world.forget()
    shutil.rmtree(last)
    simulate(config, tmp_path)
    assert end_of(tmp_path) == end
