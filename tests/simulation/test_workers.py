"""Worker processes: the same run, and what happens when one dies or is interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tiny_world
import torch
import toy_app
from toy_federation import config, write_initial

from molehill.errors import DataError, DeployError, FederationError
from molehill.wire.store import load_tree
from molehill_server import app as server
from molehill_simulation.engine import run_local
from molehill_simulation.simulate import simulate
from molehill_simulation.worker import read_frame, write_frame

FOUL = {"availability": 0.8, "dropout": 0.2, "stragglers": 0.3, "delay": 1.0, "garbage": {"client-1": "nan"}}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


def run(settings, out, observer=None, app="toy_app:app", client_app=toy_app.app):
    out.mkdir(exist_ok=True)
    if not (out / "initial.safetensors").exists():
        write_initial(out)
    run_local(settings, out, client_app, server.app, observer, app)
    return load_tree(out / "final.safetensors")[0]


def rounds(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    timeless = ("seconds", "time")
    return [{k: v for k, v in e.items() if k not in timeless} for e in lines if e["event"] in ("round", "progress")]


def workers_of(settings, count=2):
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"workers": count})})


def children():
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_two_workers_do_what_one_process_does(tmp_path):
    settings = config(scenario=FOUL, round={"quorum": 0.25, "retries": 3})
    alone, before = run(settings, tmp_path / "alone"), children()
    shared = run(workers_of(settings), tmp_path / "shared")
    assert np.array_equal(alone.flat, shared.flat)
    assert rounds(tmp_path / "shared") == rounds(tmp_path / "alone")
    assert not (tmp_path / "shared" / "exchange").exists()
    assert children() == before


def test_a_full_disk_in_a_worker_ends_the_run_in_words(tmp_path):
    """It is no reply of a client: without the clients of that worker the run would measure something else."""
    app = "import errno\nimport os\nimport toy_app\n\n\ndef app(message, context):\n"
    app += "    if message.metadata.message_type == 'train':\n"
    app += "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'round-000001.sealed')\n"
    app += "    return toy_app.app(message, context)\n"
    (tmp_path / "full_disk.py").write_text(app)
    settings = config(round={"quorum": 0.25})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        for name, each in (("alone", settings), ("shared", workers_of(settings))):
            with pytest.raises(
                DeployError, match=r"round-000001\.sealed: the run cannot go on: No space left"
            ) as caught:
                run(each, tmp_path / name, app="full_disk:app", client_app=import_module("full_disk").app)
            assert caught.value.exit_code == 11


def test_a_worker_that_dies_ends_the_run_with_a_clear_error_and_it_can_be_resumed(tmp_path):
    settings = config(run={"rounds": 4})

    def kill(event):
        if event["event"] == "round" and event["round"] == 2:
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)

    before = children()
    with pytest.raises(FederationError, match=r"engine\.workers: a worker process was ended by signal 9.*--resume"):
        run(workers_of(settings), tmp_path / "run", kill)
    assert children() == before
    assert len([e for e in rounds(tmp_path / "run") if e["event"] == "round"]) == 2
    resumed = run(settings, tmp_path / "run")  # with another engine
    assert np.array_equal(resumed.flat, run(settings, tmp_path / "whole").flat)


def test_a_worker_that_cannot_start_says_why(tmp_path):
    with pytest.raises(FederationError, match="ended with code 1: ModuleNotFoundError: No module named 'nowhere'"):
        run(workers_of(config()), tmp_path, app="nowhere:app")


def test_an_interrupt_ends_the_workers(tmp_path):
    before = children()

    def interrupt(event):
        if event["event"] == "progress":
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        run(workers_of(config()), tmp_path, interrupt)
    assert children() == before


def test_real_clients_in_companies_come_out_alike_wherever_they_train(tmp_path):
    torch.set_num_threads(1)
    base = tiny_world.save_base(tmp_path / "bert", "bert")
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(80))
    finals = {}
    for workers, together in ((1, 1), (1, 2), (2, 2)):
        tiny_world.forget()
        engine = {"workers": workers, "together": together}
        settings = tiny_world.config(
            base, rows, data={"clients": 4}, wire={"up": "fp32", "down": "fp32"}, engine=engine
        )
        out = tmp_path / f"{workers}-{together}"
        events = []
        simulate(settings, out, observer=events.append)
        at_work = {client for event in events if event["event"] == "working" for client in event["parts"]}
        assert at_work == {f"client-{number}" for number in range(1, 5)}  # told before they answer, from every process
        assert "working" not in (out / "metrics.jsonl").read_text()
        finals[workers, together] = load_tree(out / "final.safetensors")[0].flat
    assert np.array_equal(finals[1, 2], finals[2, 2])
    assert np.linalg.norm(finals[1, 2] - finals[1, 1]) <= 1e-5 * np.linalg.norm(finals[1, 1])


def test_workers_that_wait_for_a_job_that_never_comes_are_ended(tmp_path):
    """They start before the rows are read, and here the rows cannot be dealt."""
    base = tiny_world.save_base(tmp_path / "bert", "bert")
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(3))
    settings = tiny_world.config(base, rows, data={"clients": 9}, engine={"workers": 2})
    before = children()
    with pytest.raises(DataError):
        simulate(settings, tmp_path / "run")
    assert children() == before


def test_frames():
    stream = io.BytesIO()
    write_frame(stream, [b"", b"abc"])
    write_frame(stream, [])
    whole = stream.getvalue()
    stream.seek(0)
    assert read_frame(stream) == [b"", b"abc"]
    assert read_frame(stream) == []
    assert read_frame(stream) is None
    for cut in range(1, 15):
        with pytest.raises(EOFError):
            read_frame(io.BytesIO(whole[:cut]))
