"""What conducts a run on the coordinator: the office that starts and stops it, its events, its start, its process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

import molehill
from molehill import files, locks, loopback, supervise
from molehill.cli import app as cli
from molehill.errors import DeployError, ResumeError
from molehill.pki import Authority, Certificate, Identity, install, request
from molehill_server.deploy.office import Job, Office
from molehill_server.deploy.run import _initial, _tail
from molehill_server.deploy.up import Running


def test_a_run_that_cannot_be_stopped_is_told_and_a_coordinator_is_ended_all_the_same(tmp_path):
    """Its SuperLink does not answer; ``stop --run`` has nothing else to do, so it must not end as if it had done it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with contextlib.closing(locks.hold(tmp_path, "", "")) as lock:
            loopback.renew(tmp_path)
            up = Running(child.pid, molehill.__version__, "127.0.0.1", 1, 2, supervise.free_port(), "folder:here")
            files.write(tmp_path / "up.json", json.dumps(asdict(up)).encode())
            Office(tmp_path).note(Job(1, str(tmp_path / "out")))
            stopped = CliRunner().invoke(cli, ["server", "stop", "--run", "--state", str(tmp_path)])
            assert (stopped.exit_code, "Flower does not answer" in stopped.stderr) == (11, True)
            assert child.poll() is None
            threading.Thread(target=lambda: (child.wait(), lock.close())).start()  # as the coordinator would
            ended = CliRunner().invoke(cli, ["server", "stop", "--state", str(tmp_path)])
            assert (ended.exit_code, "the coordinator has ended" in ended.stderr) == (0, True)
    finally:
        child.kill()


def test_events_are_told_once_and_whole_also_where_a_run_that_goes_on_has_cut_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    events = _tail(path)
    assert next(events) == []  # there is no such file yet
    old, new = ([json.dumps({"event": "progress", "time": t + n}) + "\n" for n in range(5)] for t in (0, 1000))
    path.write_text(old[0] + old[1] + old[2][:9])
    assert [event["time"] for event in next(events)] == [0, 1]
    path.write_text("".join(old[:3]))
    assert [event["time"] for event in next(events)] == [2]
    path.write_text("".join([old[0], *new]))  # cut after the first one, and longer than before at the next look
    assert [event["time"] for event in next(events)] == [1000, 1001, 1002, 1003, 1004]
    path.write_text(old[0] + "half of one and half of another\n" + old[1])
    assert next(events) == []
    path.write_text(old[0])
    assert next(events) == []
    path.write_text(old[0] + new[0])
    assert [event["time"] for event in next(events)] == [1000]


def test_a_run_that_has_begun_gets_no_new_start(tmp_path):
    """Its machines would take it for another run of the name and give up what they kept."""
    (tmp_path / "checkpoints" / "round-00001").mkdir(parents=True)
    with pytest.raises(ResumeError, match=r"initial\.safetensors: it is gone, and the run has begun from it"):
        _initial(None, tmp_path)


def test_a_full_disk_is_no_traceback(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "final.safetensors")
    words = r"final\.safetensors: the server cannot go on: No space left.*Make room"
    with pytest.raises(DeployError, match=words), files.told("the server", tmp_path):
        raise full


def test_an_identity_with_a_passphrase_makes_tls_without_asking(tmp_path):
    authority = Authority.create(tmp_path / "ca")
    _, bundle = authority.sign(request(tmp_path / "own", "lab-1", passphrase=b"secret"))
    identity = install(bundle, tmp_path / "own", passphrase=b"secret")
    assert identity.tls().get_ca_certs()
    assert Identity.load(tmp_path / "own", passphrase=b"secret").tls(server=True).verify_mode.name == "CERT_REQUIRED"
    assert isinstance(identity.certificate, Certificate)
