"""Three machines and a coordinator, as processes of their own on loopback: the same numbers as the simulation."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny_world
from exchange_house import Wire
from lab import NAMES, open_lab, pids_of

from molehill.wire.store import load_tree
from molehill_client.deploy.join import joined
from molehill_client.secret import KeyFile
from molehill_client.state import StateStore
from molehill_server import audit
from molehill_simulation.simulate import simulate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run that has ended; the machines are still there, and all that passed between them was written down."""
    settings = config(evaluate={"baselines": True})
    with open_lab(tmp_path_factory.mktemp("lab"), settings, NAMES, passphrase=b"a secret") as lab:
        lab.up()
        with Wire(lab.port) as door, Wire(lab.exchange_port) as data:
            lab.taps = {"door": door, "data": data}
            lab.join_all()
            lab.finish(lab.run("--json"))
            yield lab
            lab.close()


def test_the_numbers_are_those_of_a_simulation(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "run"
    summary = simulate(finished.config, out)
    ours, _ = load_tree(finished.out / "final.safetensors")
    theirs, _ = load_tree(out / "final.safetensors")
    assert ours.layout == theirs.layout
    np.testing.assert_allclose(ours.flat, theirs.flat, rtol=1e-6, atol=1e-7)
    deployed = json.loads((finished.out / "summary.json").read_text())
    simulated = json.loads(summary.to_json())
    assert all(client.pop("recall") for client in simulated["clients"])
    assert not any(client.pop("recall") for client in deployed["clients"])  # how often it has each class is its own
    assert deployed["clients"] == simulated["clients"]
    assert deployed["gains"] == simulated["gains"]
    assert deployed["gains"].keys() == {"accuracy", "macro_f1", "loss"}  # over models that the machines trained alone
    assert "Gain over alone" in (finished.out / "report.html").read_text("utf-8")
    rounds = [tiny_world.events(folder, "round") for folder in (finished.out, out)]
    for ours, theirs in zip(*rounds, strict=True):
        for key in ("selected", "quarantined", "missing"):
            assert ours[key] == theirs[key]
        # the last bit of a token count differs between processes, and counts are compressed
        assert ours["bytes_up"] == pytest.approx(theirs["bytes_up"], rel=0.01)
        assert ours["loss_by_client"] == pytest.approx(theirs["loss_by_client"], rel=1e-6)
    assert (finished.out / "report.html").exists()
    assert (finished.out / "adapter" / "molora.json").exists()


def test_a_trainer_starts_once_and_loads_the_base_once(finished):
    for name in NAMES:
        log = (finished.folder / f"{name}.state" / "logs" / "trainer.log").read_text()
        assert len(re.findall("query.hello took", log)) == 1
        assert len(re.findall(" train took", log)) == 3
        assert "started again" not in finished.said(name)
        assert len(pids_of((finished.folder / f"{name}.state").resolve(), "deploy.trainer")) == 1


def texts(lab):
    """Every row of every machine."""
    return [
        json.loads(line)["text"].encode()
        for name in NAMES
        for side in ("train", "test")
        for line in (lab.folder / f"{name}.{side}.jsonl").read_text().splitlines()
    ]


def personal(lab):
    """Every tensor of a few numbers that a machine keeps for itself, as its bytes."""
    found = []
    _, meta = load_tree(lab.out / "initial.safetensors")
    for name in NAMES:
        state = lab.folder / f"{name}.state"
        run = lab.config.run.name
        store = StateStore(state / "runs" / run / name, run, meta["base"], KeyFile(state / "state.key"))
        assert store.rounds()
        for key, value in store.before(10**6).tree.items():
            if value.size >= 4 and np.any(value):
                found.append((key, value))
    assert found
    return found


def all_that_left(lab):
    """Every file of the coordinator and of its run, and every byte that passed either port."""
    left = {str(path): path.read_bytes() for path in lab.state.rglob("*") if path.is_file()}
    left |= {str(path): path.read_bytes() for path in lab.out.rglob("*") if path.is_file()}
    left |= {f"{name} {way}": bytes(data) for name, tap in lab.taps.items() for way, data in tap.seen.items()}
    return left


def test_no_row_and_no_personal_tensor_left_its_machine(finished):
    left = all_that_left(finished)
    rows = texts(finished)
    assert any(b"quarantined" in data for data in left.values())
    kept = personal(finished)
    for where, data in left.items():
        assert not [row for row in rows if row in data], where
        for key, value in kept:
            for kind in (np.float32, np.float16, np.float64):
                assert value.astype(kind).tobytes() not in data, f"{key.name} in {where}"


def test_nothing_passes_in_the_clear(finished):
    words = [finished.config.run.name.encode(), b"client-1", b"query", b"hello", b"fleet", b"molehill", b"molora"]
    final, _ = load_tree(finished.out / "final.safetensors")
    sample = max(final.values(), key=lambda value: value.size).tobytes()[:64]
    for name, tap in finished.taps.items():
        assert len(tap.seen["up"]) > 10_000
        for way, data in tap.seen.items():
            for word in [b'tiny"', sample, *words[1:]]:
                # the name of the exchange's host and the protocols of the handshake are all that TLS shows
                assert word not in data, f"{word} in {name} {way}"


def test_the_audit_logs_tell_who_took_part(finished):
    run = [json.loads(line) for line in (finished.out / "audit.jsonl").read_text().splitlines()]
    assert audit.verify(finished.out / "audit.jsonl").entries == len(run)
    rounds = [entry["fields"] for entry in run if entry["event"] == "round"]
    assert [sorted(each["accepted"]) for each in rounds] == [list(NAMES)] * 3
    door = [json.loads(line) for line in (finished.state / "audit.jsonl").read_text().splitlines()]
    assert audit.verify(finished.state / "audit.jsonl").entries == len(door)
    assert {entry["fields"]["client"] for entry in door if entry["event"] == "admitted"} == {f"CN={n}" for n in NAMES}


def test_nobody_else_can_read_what_a_coordinator_and_machines_write(finished):
    for folder in (finished.state, finished.out, *(finished.folder / f"{name}.state" for name in NAMES)):
        for path in (folder, *folder.rglob("*")):
            if path.is_dir() or path.is_file():
                assert path.stat().st_mode & 0o077 == 0, path


def test_what_people_ask_afterwards(finished):
    state = finished.folder / "client-1.state"
    found = finished.ask("server", "status", "--state", finished.state, "--json")
    document = json.loads(found.stdout)
    assert {node["name"]: node["status"] for node in document["nodes"]} == dict.fromkeys(NAMES, "online")
    assert document["run"]["status"] == "completed"
    assert "client-1" in finished.ask("server", "status", "--state", finished.state).stdout
    status = json.loads(finished.ask("client", "status", "--state", state, "--json").stdout)
    assert (status["name"], status["doing"], status["error"]) == ("client-1", "waiting", None)
    scores = json.loads(finished.ask("client", "evaluate", "--state", state, "--json").stdout)
    summary = json.loads((finished.out / "summary.json").read_text())
    own = next(client for client in summary["clients"] if client["id"] == "client-1")
    assert scores["stages"]["personalised"]["accuracy"] == own["personalised"]
    others = finished.folder / "client-2.test.jsonl"
    more = json.loads(finished.ask("client", "evaluate", "--state", state, "--data", others, "--json").stdout)
    assert more["n_test"] == len(others.read_text().splitlines())
    said = finished.ask("client", "forget", "--state", state)
    assert (said.returncode, "takes part in a federation" in said.stderr) == (11, True)
    again = finished.ask("server", "run", finished.file, "--state", finished.state, "--out", finished.out)
    assert (again.returncode, "the run folder is not empty" in again.stderr) == (7, True)


MASKED = {"privacy": {"secure_aggregation": True}, "wire": {"up": "fp32"}, "run": {"name": "masked", "rounds": 1}}


def test_a_masked_run_has_the_numbers_of_a_plain_simulation(finished, config, tmp_path):
    """The same sums, over keys that every machine has signed; on the machines that have a run behind them."""
    finished.file.write_text(config(**MASKED).to_toml(), encoding="utf-8")
    finished.finish(finished.run("--json", out="masked"), 400)
    rounds = finished.events("round")
    ours, _ = load_tree(finished.out / "final.safetensors")
    simulate(config(**{name: section for name, section in MASKED.items() if name != "privacy"}), tmp_path / "plain")
    theirs, _ = load_tree(tmp_path / "plain" / "final.safetensors")
    np.testing.assert_allclose(ours.flat, theirs.flat, rtol=1e-4, atol=1e-5)
    for one, other in zip(rounds, tiny_world.events(tmp_path / "plain", "round"), strict=True):
        assert sorted(one["accepted"]) == sorted(other["accepted"])
        assert one["quarantined"] == {}
        assert (one["loss_by_client"], one["tokens"]) == ({}, {})
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert len(list(finished.folder.glob("*.state/**/masking.sealed"))) == 3


def test_leaving_and_forgetting(finished):
    """Last in this file: the machine leaves, and keeps nothing once it is told to."""
    process, state = finished.processes["client-3"], finished.folder / "client-3.state"
    process.terminate()
    assert process.wait(40) == 0
    assert "left the federation" in finished.said("client-3")
    assert joined(state) is None
    assert pids_of(state.resolve(), "") == []
    assert finished.ask("client", "forget", "--state", state, "--run", "other").returncode == 11
    said = finished.ask("client", "forget", "--state", state)
    assert "forgot masked, tiny" in said.stderr
    assert not list((state / "runs").iterdir())
    stop = finished.ask("server", "stop", "--state", finished.state)
    assert stop.returncode == 0, stop.stderr
    assert finished.processes["coordinator"].wait(10) == 0
    assert pids_of(finished.state.resolve(), "") == []
