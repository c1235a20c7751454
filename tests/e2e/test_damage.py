"""What a machine does to a run folder: full disks, damage at rest, lost files, other processes, other users."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from io import StringIO

import pytest
import tiny_world
from rich.console import Console

from molehill.errors import AdapterError, DeployError, MolehillError, ResumeError
from molehill_server.audit import verify
from molehill_simulation.simulate import simulate
from molehill_simulation.summary import read_summary
from molehill_simulation.ui import show_summary

PERSONAL = {"gate": "personal", "head": "personal"}


def stop_at(event, number):
    """An observer that ends the run as Ctrl-C does, at an event of a round."""

    def watch(seen):
        if (seen["event"], seen.get("round")) == (event, number):
            raise KeyboardInterrupt

    return watch


def interrupted(settings, out, number=2):
    """A run that was stopped when a round had been committed and the next one was under way."""
    with pytest.raises(KeyboardInterrupt):
        simulate(settings, out, observer=stop_at("round", number))
    tiny_world.forget()
    return out


def end_of(out):
    names = ["final.safetensors", *(str(path.relative_to(out)) for path in (out / "adapter").rglob("*.safetensors"))]
    figures = [(client.id, client.row) for client in read_summary(out / "summary.json").clients]
    return {name: (out / name).read_bytes() for name in names}, figures


def said_at_the_end(out):
    console = Console(file=StringIO(), width=400)
    show_summary(read_summary(out / "summary.json"), console)
    return console.file.getvalue(), (out / "report.html").read_text(encoding="utf-8")


# Damage at rest


DAMAGES = {
    "lost": lambda path, data: path.unlink(),
    "empty": lambda path, data: path.write_bytes(b""),
    "halved": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "zeroed": lambda path, data: path.write_bytes(bytes(len(data))),
}


@pytest.fixture(scope="module")
def stopped(bert, source, tmp_path_factory):
    """A run to copy: one round is committed."""
    settings = tiny_world.config(bert, source)
    return settings, interrupted(settings, tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("name", "error"), [("metrics.jsonl", ResumeError), ("initial.safetensors", MolehillError)])
def test_a_damaged_file_of_a_run_is_refused_by_name(stopped, tmp_path, name, error, damage):
    if (name, damage) == ("initial.safetensors", "lost"):
        pytest.skip("it is made again, from the seed")
    settings, folder = stopped
    out = shutil.copytree(folder, tmp_path / "out")
    DAMAGES[damage](out / name, (out / name).read_bytes())
    with pytest.raises(error, match=rf"{name}: .*(Bring|Restore) the"):
        simulate(settings, out)


def test_start_values_with_another_number_are_refused(stopped, tmp_path):
    settings, folder = stopped
    out = shutil.copytree(folder, tmp_path / "out")
    path = out / "initial.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"initial\.safetensors: the file was damaged"):
        simulate(settings, out)


def test_an_audit_log_whose_end_was_cut_off_is_refused_and_one_that_is_gone_is_told(stopped, tmp_path):
    settings, folder = stopped
    out = shutil.copytree(folder, tmp_path / "out")
    path = out / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    with pytest.raises(ResumeError, match=r"no entry has the hash .* move it away to go on with a new one"):
        simulate(settings, out)
    path.unlink()
    with pytest.raises(KeyboardInterrupt):  # once more before anything is committed
        simulate(settings, out, observer=stop_at("resume", 1))
    tiny_world.forget()
    simulate(settings, out)
    assert b'"event":"lost"' in path.read_bytes().splitlines()[0]
    verify(path)


def test_checkpoints_that_are_gone_are_no_new_run(stopped, tmp_path):
    settings, folder = stopped
    out = shutil.copytree(folder, tmp_path / "out")
    shutil.rmtree(out / "checkpoints")
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ResumeError, match=r"checkpoints: there is no checkpoint any more, and round 1 was committed"):
        simulate(settings, out)
    assert (out / "metrics.jsonl").read_bytes() == before


# What clients keep


def test_state_that_is_gone_is_told_in_terminal_summary_and_report(config, tmp_path):
    settings = config(run={"rounds": 3}, personal=PERSONAL)
    out = interrupted(settings, tmp_path / "out", 3)
    shutil.rmtree(out / "clients" / "client-2")
    seen = []
    summary = simulate(settings, out, observer=seen.append)
    assert summary.anew == ("client-2",)
    facts = [{k: e[k] for k in ("client", "round", "kept", "accepted")} for e in seen if e["event"] == "anew"]
    assert facts == [{"client": "client-2", "round": 3, "kept": 0, "accepted": 2}]
    assert '"event":"anew"' in (out / "audit.jsonl").read_text()
    for said in said_at_the_end(out):
        assert "personal state was lost and begun anew" in said
        assert "client-2" in said


def test_state_that_cannot_be_read_is_told_in_terminal_summary_and_report(config, tmp_path):
    settings = config(personal=PERSONAL)

    def damage(event):
        if event["event"] == "stage":
            path = out / "clients" / "client-2" / "round-000002.sealed"
            path.write_bytes(path.read_bytes()[:-1])

    out = tmp_path / "out"
    summary = simulate(settings, out, observer=damage)
    assert "damaged" in summary.unscored["client-2"]
    assert len(summary.complete) == 2
    for said in said_at_the_end(out):
        assert "mean and worst are over the 2 of 3 clients that have all figures; client-2: " in said


# Disks and other processes


def test_a_disk_that_is_full_at_any_write_is_told_and_the_run_goes_on_to_the_same_end(config, tmp_path, monkeypatch):
    settings = config(wire={"up": {"name": "compeft", "density": 0.2}})
    simulate(settings, tmp_path / "whole")
    end, syncs = end_of(tmp_path / "whole"), []
    monkeypatch.setattr("os.fsync", syncs.append)
    tiny_world.forget()
    simulate(settings, tmp_path / "counted")
    for left in range(0, len(syncs), max(1, len(syncs) // 6)):
        tiny_world.forget()
        count = iter(range(len(syncs)))

        def sync(handle, count=count, left=left):
            if next(count) >= left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        out = tmp_path / str(left)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", sync)
            with pytest.raises(DeployError, match=r"cannot go on: No space left on device\. Make room there") as caught:
                simulate(settings, out)
        assert caught.value.exit_code == 11
        tiny_world.forget()
        simulate(settings, out)
        assert end_of(out) == end, left
        verify(out / "audit.jsonl")


@pytest.mark.parametrize("size", [30, 90, 180])
def test_a_small_disk(config, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        with pytest.raises(DeployError, match=r"cannot go on: No space left on device\. Make room there"):
            simulate(config(), disk / "run")
        tiny_world.forget()
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        simulate(config(), disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_second_process_in_the_folder_is_refused_before_it_writes(config, tmp_path):
    settings = config()
    refused = []

    def second(event):
        if event["event"] in {"start", "round", "end"}:
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            with pytest.raises(DeployError, match="another process works in this run folder") as caught:
                simulate(settings, tmp_path)
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
            refused.append(caught.value.where)

    simulate(settings, tmp_path, observer=second)
    assert refused == [str(tmp_path)] * 4
    verify(tmp_path / "audit.jsonl")


def test_a_mistake_leaves_no_folder_behind_and_none_changed(config, tmp_path):
    settings = config(scenario={"garbage": {"nobody": "nan"}})
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "a" / "b", tmp_path / "there"):
        with pytest.raises(MolehillError, match="there is no client 'nobody'"):
            simulate(settings, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_nobody_else_can_read_a_run_and_equal_runs_are_equal_files(config, tmp_path):
    before = os.umask(0)
    try:
        (tmp_path / "runs" / "b").mkdir(parents=True, mode=0o777)
        for name in ("a", "b"):
            simulate(config(federation={"preset": "fedex"}), tmp_path / "runs" / name)
            tiny_world.forget()
    finally:
        os.umask(before)
    for path in (tmp_path / "runs").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert end_of(tmp_path / "runs" / "a") == end_of(tmp_path / "runs" / "b")
