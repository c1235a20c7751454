"""One process at a time in a folder, and looking does not get in its way."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
import time

import pytest

from molehill import locks
from molehill.errors import DeployError


def hold(folder):
    return locks.hold(folder, "another one is here", "Let it end.")


def test_a_folder_is_for_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 0.2)
    assert not locks.held(tmp_path / "none")
    assert not locks.held(tmp_path)
    with hold(tmp_path):
        assert locks.held(tmp_path)
        with pytest.raises(DeployError, match=r"another one is here\. Let it end\.") as caught:
            hold(tmp_path)
        assert caught.value.where == str(tmp_path)
    assert not locks.held(tmp_path)
    hold(tmp_path).close()


def test_a_process_that_is_killed_holds_nothing(tmp_path):
    code = f"import time; from pathlib import Path; from molehill import locks; f = locks.hold(Path({str(tmp_path)!r}),"
    code += " '', ''); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert locks.held(tmp_path)
        process.kill()
    assert not locks.held(tmp_path)


def test_who_only_looks_does_not_keep_others_out(tmp_path):
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # a look that takes long
        threading.Timer(0.3, file.close).start()
        began = time.monotonic()
        with hold(tmp_path):
            assert time.monotonic() - began > 0.2


def test_looks_without_end_do_not_either(tmp_path):
    done = threading.Event()

    def look():
        while not done.is_set():
            locks.held(tmp_path)

    (tmp_path / "lock").touch()
    looking = [threading.Thread(target=look) for _ in range(2)]
    for each in looking:
        each.start()
    try:
        for _ in range(10):
            hold(tmp_path).close()
    finally:
        done.set()
        for each in looking:
            each.join()
