"""The audit log: nothing in it changes unnoticed, and a run tells it everything that matters."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading

import pytest
from toy_federation import client_name, config, killed_at
from typer.testing import CliRunner

from molehill.cli import app
from molehill.errors import DataError, FederationError, ResumeError
from molehill.wire.store import load_tree
from molehill_server import checkpoint
from molehill_server.audit import START, AuditLog, verify


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture
def written(path):
    log = AuditLog(path)
    for number in range(5):
        log.append("version", round=number, digest="ab" * 32, note="Müller \n \ud800")
    return path


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_chain_of_entries(written):
    found = entries(written)
    assert [set(entry) for entry in found] == [{"sequence", "time", "event", "fields", "previous", "hash"}] * 5
    assert [entry["sequence"] for entry in found] == [1, 2, 3, 4, 5]
    assert [entry["previous"] for entry in found] == [START, *(entry["hash"] for entry in found[:-1])]
    assert verify(written).entries == 5
    assert verify(written).head == AuditLog(written).head == found[-1]["hash"]


def test_a_log_goes_on_where_it_ended(written):
    AuditLog(written).append("end")
    assert verify(written).entries == 6


def test_an_empty_log(path):
    path.touch()
    assert verify(path).entries == 0
    with pytest.raises(DataError, match="cannot read the audit log: No such file"):
        verify(path.with_name("other"))


def test_any_changed_byte_is_found_in_its_line(path):
    log = AuditLog(path)
    for number in range(2):
        log.append("version", round=number)
    whole = path.read_bytes()
    for spot, byte in enumerate(whole):
        path.write_bytes(whole[:spot] + bytes([byte ^ (1, 32, 128)[spot % 3]]) + whole[spot + 1 :])
        number = whole[:spot].count(b"\n") + 1
        with pytest.raises(DataError, match=rf"audit\.jsonl:{number}: "):
            verify(path)


def test_removed_and_reordered_lines_are_found(written):
    lines = written.read_bytes().splitlines(keepends=True)
    for number in range(4):
        written.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        with pytest.raises(DataError, match=rf":{number + 1}: the entry does not follow"):
            verify(written)
        swapped = [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]]
        written.write_bytes(b"".join(swapped))
        with pytest.raises(DataError, match=rf":{number + 1}: the entry does not follow"):
            verify(written)
    written.write_bytes(b"".join([*lines, lines[-1]]))
    with pytest.raises(DataError, match=":6: the entry does not follow"):
        verify(written)


@pytest.mark.parametrize("line", ["{}", "[]", "1", '"x"', "null", "{", "", "[" * 100_000, '{"hash": 1}'], ids=range(9))
def test_nonsense_is_found(written, line):
    with written.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=":6: "):
        verify(written)


def test_a_changed_line_whose_hash_was_mended_breaks_the_next(written):
    lines = written.read_bytes().splitlines(keepends=True)
    other = written.with_name("other.jsonl")
    log = AuditLog(other)
    for number in (0, 1):
        log.append("version", round=number, digest="ff" * 32)
    forged = other.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join([*forged, *lines[2:]]))
    with pytest.raises(DataError, match=":3: the entry does not follow"):
        verify(written)


def test_an_end_that_was_cut_off_is_found_by_a_hash_noted_before(written):
    head = verify(written).head
    assert verify(written, head).entries == 5
    AuditLog(written).append("end")
    assert verify(written, head).entries == 6
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:4]))
    assert verify(written).entries == 4
    with pytest.raises(DataError, match=f"no entry has the hash {head}"):
        verify(written, head)


def test_a_line_that_a_crash_cut_off_is_removed_and_noted(written):
    whole = written.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in {start + 1, start + 40, len(whole) - 1}:
        written.write_bytes(whole[:end])
        with pytest.raises(DataError, match=":5: the line is cut off"):
            verify(written)
        AuditLog(written).append("end")
        assert [entry["event"] for entry in entries(written)] == [*["version"] * 4, "recovered", "end"]
        assert entries(written)[4]["fields"] == {"bytes_cut": end - start}
        assert verify(written).entries == 6


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("stuck", [False, True])
def test_a_full_disk_leaves_no_half_line(path, monkeypatch, before, stuck):
    """``stuck``: at first the file cannot even be cut back."""
    log = AuditLog(path)
    for number in range(before):
        log.append("version", round=number)
    whole = path.read_bytes() if before else b""

    def full(handle):
        os.truncate(path, len(whole) + 40)  # what a write that did not fit leaves
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def nor_this(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        real = os.truncate
        patch.setattr("os.fsync", full)
        if stuck:
            patch.setattr("os.truncate", lambda at, size: real(at, size) if size > len(whole) else nor_this())
        with pytest.raises(OSError, match="No space left"):
            log.append("lost")
    assert (path.read_bytes() == whole) is not stuck
    log.append("end")
    assert verify(path, log.head).entries == before + 1
    assert [entry["event"] for entry in entries(path)] == [*["version"] * before, "end"]


def test_a_disk_that_is_really_full(path, monkeypatch):
    """The kernel's own half write, under a limit on the size of files."""
    log = AuditLog(path)
    log.append("start")
    size = path.stat().st_size
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, old[1]))
        with pytest.raises(OSError, match="File too large"):
            log.append("lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == size
    log.append("end")
    assert verify(path).entries == 2


def test_nothing_is_appended_to_a_log_that_was_changed(written):
    whole = written.read_bytes().replace(b"ab", b"cd", 1)
    written.write_bytes(whole)
    with pytest.raises(ResumeError, match=r"audit\.jsonl:1: the audit log was changed: .* move it away"):
        AuditLog(written)
    assert written.read_bytes() == whole


def test_threads_that_write_at_once(path):
    log = AuditLog(path)
    threads = [threading.Thread(target=lambda: [log.append("joined") for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(path).entries == 80


WRITER = """
import sys
from pathlib import Path
from molehill_server.audit import AuditLog
log = AuditLog(Path(sys.argv[1]))
while True:
    log.append("version", text="x" * 5000)
    print(log.head, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_what_was_acknowledged_survives_a_kill(path, seed):
    """A process that is killed while it writes; entries it had acknowledged are there, and the chain goes on."""
    wait = random.Random(seed).randrange(5, 60)
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        seen = [process.stdout.readline().strip() for _ in range(wait)]
        os.kill(process.pid, signal.SIGKILL)
    log = AuditLog(path)
    log.append("resume")
    assert verify(path, seen[-1]).entries > wait


# A run


def facts(run, event):
    return [entry["fields"] for entry in entries(run.out / "audit.jsonl") if entry["event"] == event]


def test_a_run_notes_every_version_and_every_delta(toy):
    run = toy(config(run={"rounds": 2}))
    final = run.run()
    found = entries(run.out / "audit.jsonl")
    assert [entry["event"] for entry in found] == ["start", "version", "round", "version", "round", "version", "end"]
    assert verify(run.out / "audit.jsonl").entries == 7
    assert facts(run, "start")[0]["clients"] == [client_name(n) for n in range(4)]
    initial, _ = load_tree(run.out / "initial.safetensors")
    versions = facts(run, "version")
    assert [version["round"] for version in versions] == [0, 1, 2]
    assert versions[0]["digest"] == initial.digest
    assert versions[2]["digest"] == final.digest
    for number, fields in enumerate(facts(run, "round"), start=1):
        assert fields["round"] == number
        assert fields["accepted"] == list(fields["deltas"]) == [client_name(n) for n in range(4)]
        assert len(set(fields["deltas"].values())) == 4


def test_what_was_refused_and_why(toy):
    run = toy(config(run={"rounds": 1}, round={"retries": 0, "quorum": 0.75}))

    def fault(client, plan, reply):
        if client.number == 0:
            return None
        return RuntimeError("disk full") if client.number == 1 else reply.model_dump_json()

    with pytest.raises(FederationError):
        run.run(fault)
    (retry,) = facts(run, "retry")
    assert retry["missing"] == ["client-0"]
    assert retry["quarantined"] == {"client-1": "disk full."}
    (stopped,) = facts(run, "stopped")
    assert "below its quorum" in stopped["reason"]


def test_a_client_that_comes_later_is_noted(toy):
    run = toy(config(run={"rounds": 2}))
    late = {}

    def arrives(client, plan, reply):
        run.transport.clients |= late
        return reply.model_dump_json()

    coordinator = run.start(arrives)
    late |= {13: run.transport.clients.pop(13)}
    coordinator.run()
    assert facts(run, "start")[0]["clients"] == [client_name(n) for n in range(3)]
    assert facts(run, "joined") == [{"client": client_name(3)}]


@pytest.mark.parametrize("kill", [1, 6, 11])
def test_a_run_that_was_killed_goes_on_with_its_chain(toy, kill):
    run = toy(config())
    with pytest.raises(KeyboardInterrupt):
        run.run(killed_at(kill))
    path = run.out / "audit.jsonl"
    head = verify(path).head
    run.run()
    verify(path, head)
    done = (kill - 1) // 4
    assert facts(run, "resume")[0]["round"] == done
    assert [version["round"] for version in facts(run, "version")] == [*range(done + 1), *range(done, 4)]
    assert len({version["digest"] for version in facts(run, "version")}) == 4


def test_a_kill_between_commit_and_note_hides_no_version(toy, monkeypatch):
    run = toy(config())
    real = checkpoint.save

    def dies(folder, state):
        real(folder, state)
        if state.glob.round == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            run.run()
    assert [version["round"] for version in facts(run, "version")] == [0, 1]
    run.run()
    assert [version["round"] for version in facts(run, "version")] == [0, 1, 2, 3]


def test_a_run_whose_log_was_changed_is_not_resumed(toy):
    run = toy(config())
    run.run()
    path = run.out / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b"client-2", b"client-9", 1))
    before = (run.out / "metrics.jsonl").read_bytes()
    with pytest.raises(ResumeError, match="the audit log was changed"):
        run.run()
    assert (run.out / "metrics.jsonl").read_bytes() == before


# The command


def call(*arguments):
    return CliRunner().invoke(app, ["audit", "verify", *map(str, arguments)])


def test_audit_verify(written):
    head = verify(written).head
    assert f"5 entries, all whole; the last one has the hash {head}" in call(written).stdout
    assert json.loads(call(written, "--json", "--head", head).stdout) == {"entries": 5, "head": head}
    assert call(written, "--head", "0a").exit_code == 3
    written.write_bytes(written.read_bytes().replace(b'"round":2', b'"round":9'))
    result = call(written)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith(f"error: {written}:3: the entry was changed")
    error = json.loads(call(written, "--json").stdout)["error"]
    assert (error["kind"], error["where"]) == ("DataError", f"{written}:3")
