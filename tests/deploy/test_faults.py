"""Processes killed at random moments: the run ends as if nothing had happened, or says that it cannot go on.

Three of them in one run in the gate; in ``make nightly`` twenty runs with one each, and nine more under secure
aggregation. The machines and the coordinator stay for all runs, as they do in a lab: what a kill leaves behind must not
matter to the next run either.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest
import tiny_world
from lab import NAMES, open_lab, pids_of

from molehill.wire.store import load_tree
from molehill_server import audit
from molehill_simulation.simulate import simulate

pytestmark = pytest.mark.slow

NIGHTLY = pytest.mark.skipif(not os.environ.get("MOLEHILL_NIGHTLY"), reason="takes minutes: make nightly")
VICTIMS = ("exchange", "server", "trainer", "coordinator", "superlink", "machine", "clientapp", "run", "supernode")
SETTINGS = {
    "round": {"quorum": 1.0, "min_clients": 3, "retries": 8, "deadline": 200.0, "grace": 5.0},
    "run": {"rounds": 3, "name": "faulty"},
}


MASKED = {**SETTINGS, "privacy": {"secure_aggregation": True}, "wire": {"up": "fp32"}}


@pytest.fixture(scope="module")
def lab(config, tmp_path_factory):
    with open_lab(tmp_path_factory.mktemp("faults"), config(**SETTINGS), NAMES) as lab:
        lab.up()
        lab.join_all()
        yield lab


@pytest.fixture(scope="module")
def undisturbed(lab, tmp_path_factory):
    """What the run comes to when nothing happens; a deployed run has the numbers of a simulated one."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    summary = simulate(lab.config, out)
    return json.loads(summary.to_json()), load_tree(out / "final.safetensors")[0]


@pytest.fixture(scope="module")
def masked_lab(config, tmp_path_factory):
    with open_lab(tmp_path_factory.mktemp("masked"), config(**MASKED), NAMES) as lab:
        lab.up()
        lab.join_all()
        yield lab


def strike(lab, victim, rng):
    """Kill -9 something, and do what an operator would do then."""
    name = rng.choice(NAMES)
    own = (lab.folder / f"{name}.state").resolve()
    match victim:
        case "coordinator":
            process = lab.processes["coordinator"]
            process.kill()
            process.wait()
            lab.up()
        case "machine":
            process = lab.processes[name]
            process.kill()
            process.wait()
            lab.join(name)
        case "run":
            lab.processes["run"].kill()
            lab.processes["run"].wait()
        case "exchange" | "superlink":
            word = {"exchange": "molehill_server.exchange", "superlink": "flower-superlink"}[victim]
            kill(pids_of(lab.state.resolve(), word))
        case "server":
            kill(pids_of(lab.state.resolve(), "flwr-serverapp"))
        case "trainer" | "supernode" | "clientapp":
            word = {"trainer": "deploy.trainer", "supernode": "flower-supernode", "clientapp": "flwr-clientapp"}[victim]
            kill(pids_of(own, word))


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def require_as_if_nothing_had_happened(lab, undisturbed, run, story):
    """The run ends with the numbers of the undisturbed one, or says why it cannot."""
    code = run.wait(400)
    story = f"{story}: {lab.story()}"
    assert code in {0, 9}, story
    rounds = lab.events("round")
    assert Counter(event["round"] for event in rounds).most_common(1)[0][1] == 1, story
    assert audit.verify(lab.out / "audit.jsonl").entries
    if code == 9:
        assert "below its quorum" in lab.said("run") or "cannot begin" in lab.said("run")
        return
    summary, final = undisturbed
    for event in rounds:
        assert sorted(event["accepted"]) == sorted(event["selected"])
        assert len(set(event["deltas"].values())) == 3
    ours, _ = load_tree(lab.out / "final.safetensors")
    np.testing.assert_allclose(ours.flat, final.flat, rtol=1e-6, atol=1e-7, err_msg=story)
    found = json.loads((lab.out / "summary.json").read_text())
    known = [{**client, "recall": {}} for client in summary["clients"]]  # a deployment does not know recalls
    assert found["clients"] == known
    assert not (lab.state / "exchange" / "blobs").exists() or len(list((lab.state / "exchange/blobs").iterdir())) <= 8


def wait_and_strike(lab, victim, rng, seconds):
    time.sleep(rng.uniform(0, seconds))
    assert not lab.events("end"), f"the run was over before {victim} could be killed"
    strike(lab, victim, rng)


def test_kills_at_random_moments_change_nothing(lab, undisturbed):
    """Of what serves the tensors at the beginning, then of what conducts the run, then of what trains."""
    rng = random.Random(0)
    run = lab.run()
    for done, victim in enumerate(("exchange", "server", "trainer")):
        lab.until(lambda done=done: lab.events("start") and len(lab.events("round")) >= done, run, 300)
        wait_and_strike(lab, victim, rng, 4)
    require_as_if_nothing_had_happened(lab, undisturbed, run, "exchange, server, trainer")


@NIGHTLY
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_a_random_moment_changes_nothing(lab, undisturbed, seed):
    rng = random.Random(seed)
    victim = VICTIMS[seed % len(VICTIMS)]
    out = f"run-{seed}"
    lab.ask("server", "stop", "--run", "--state", lab.state)  # of a seed that failed
    run = lab.run(out=out)
    lab.until(lambda: lab.events("start"), run, 300)
    wait_and_strike(lab, victim, rng, 15)
    if victim == "run":
        run = lab.run("--resume", out=out)
    require_as_if_nothing_had_happened(lab, undisturbed, run, victim)
    seconds = tiny_world.events(lab.out, "end")[0]["seconds"]
    print(f"seed {seed}: {victim}, {len(lab.events('retry'))} retries, {seconds:.0f} s")  # noqa: T201 - the fault table


@NIGHTLY
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_among_masked_rounds_changes_nothing(masked_lab, config, tmp_path, victim):
    """Keys, signatures and sums are taken up again, or made anew where nothing was unmasked yet."""
    rng, lab = random.Random(victim), masked_lab
    out = f"run-{victim}"
    run = lab.run("--set", f"run.name=masked-{victim}", out=out)  # clients help with a round of one name once
    lab.until(lambda: lab.events("start"), run, 300)
    time.sleep(rng.uniform(0, 15))
    strike(lab, victim, rng)
    if victim == "run":
        run = lab.run("--resume", out=out)
    story = f"{victim}: {lab.story()}"
    assert run.wait(500) == 0, story
    rounds = lab.events("round")
    assert [event["round"] for event in rounds] == [1, 2, 3], story
    assert all(len(event["accepted"]) == 3 for event in rounds)
    name = {"run": {**SETTINGS["run"], "name": f"masked-{victim}"}}
    simulate(config(**{**SETTINGS, **name, "wire": MASKED["wire"]}), tmp_path / "plain")
    (ours, _), (theirs, _) = (load_tree(at / "final.safetensors") for at in (lab.out, tmp_path / "plain"))
    np.testing.assert_allclose(ours.flat, theirs.flat, rtol=1e-3, atol=1e-4, err_msg=story)
