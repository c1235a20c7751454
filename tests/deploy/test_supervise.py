"""Children of a supervisor: started again, given up, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time

import pytest

from molehill import supervise
from molehill.errors import DeployError


def keep(code, tmp_path, seconds=10.0, **options):
    """Keep a child running until it is given up, or for some seconds."""

    async def run():
        words = [sys.executable, "-c", code]
        variables = supervise.environment(tmp_path)
        async with supervise.child("it", words, tmp_path, variables, **options) as task:
            await asyncio.wait_for(task, seconds)

    asyncio.run(run())


def test_a_child_that_ends_again_and_again_is_given_up_with_its_last_words(tmp_path):
    limits = (supervise.Limit(ends=5, pause=0.0),)
    with pytest.raises(DeployError, match=r"it\.log: it ended 5 times, last with code 3: no luck"):
        keep("print('no luck'); raise SystemExit(3)", tmp_path, limits=limits)


def test_ends_for_another_reason_do_not_count(tmp_path):
    limits = (supervise.Limit(ends=2, pause=0.0, said="twin", what="there are two", mend="Make it one."),)
    with pytest.raises(TimeoutError):
        keep("print('away')", tmp_path, 1.0, limits=limits)
    with pytest.raises(DeployError, match=r"there are two\. Make it one"):
        keep("print('twin')", tmp_path, limits=limits)


def test_a_child_that_lived_is_started_again_however_often_it_ends(tmp_path):
    with pytest.raises(TimeoutError):
        keep("print('well')", tmp_path, 1.0, limits=(supervise.Limit(ends=2, young=0.0, pause=0.0),))


def test_a_child_that_the_system_refuses_is_no_traceback(tmp_path):
    async def start(command, logs):
        async with supervise.child("it", [command], logs, supervise.environment(tmp_path)) as task:
            await task

    with pytest.raises(DeployError, match=r"no-such-command: it cannot be started: No such file or directory"):
        asyncio.run(start("no-such-command", tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(DeployError, match=r"file.*: it cannot be started: "):
        asyncio.run(start("true", tmp_path / "file"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent died")
def test_children_end_with_a_supervisor_that_is_killed(tmp_path):
    code = (
        "import asyncio, sys; from pathlib import Path; from molehill import supervise\n"
        f"async def run():\n async with supervise.child('it', ['sleep', '60'], Path({str(tmp_path)!r}),"
        f" supervise.environment(Path({str(tmp_path)!r}))) as t:\n  print('up', flush=True); await t\n"
        "asyncio.run(run())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"up\n"
        until(lambda: marked(tmp_path))  # before it is the program, nothing ties it to its parent
        parent.kill()
    until(lambda: not marked(tmp_path))


def test_what_was_left_behind_is_killed(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        subprocess.Popen(["sleep", "60"], env=supervise.environment(one)) as left,
        subprocess.Popen(["sleep", "60"], env=supervise.environment(two)) as other,
    ):
        until(lambda: marked(one) == [left.pid])
        supervise.reap(one)
        assert left.wait(5) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


def test_it_is_known_what_works_in_a_folder_and_what_a_command_complains_of(tmp_path):
    with subprocess.Popen(["sleep", "60"], env=supervise.environment(tmp_path)) as child:
        until(lambda: supervise.works(tmp_path, "sleep"))
        assert not supervise.works(tmp_path, "leep")
        assert not supervise.works(tmp_path / "other", "sleep")
        child.kill()
    assert "No such file" in supervise.complaint(tmp_path, "no-such-command")
    assert supervise.complaint(tmp_path, "true") == "it said nothing"
    bad = tmp_path / "bad"
    bad.write_text("#!/bin/sh\necho one; echo two >&2; exit 3\n")
    bad.chmod(0o755)
    assert supervise.complaint(tmp_path, str(bad)) == "two"


def marked(folder):
    from lab import left_over

    return [pid for pid in left_over(folder) if b"sleep" in cmdline(pid)]


def cmdline(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123 - it may vanish
        return file.read()
    return b""


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
