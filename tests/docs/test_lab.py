"""The how-to of a lab works as typed in three terminals: every line, in its order, with real processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_world
import yaml
from lab import free_ports, left_over
from typer.testing import CliRunner

from molehill.cli import app
from molehill.config import load

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/lab.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```sh (terminal|host|lab)([ 123]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TYPED = [
    (terminal, line)
    for kind, terminals, text in FENCE.findall(PAGE)
    if kind == "terminal"
    for line in text.splitlines()
    for terminal in terminals.split()
]
HOST = [line for kind, _, text in FENCE.findall(PAGE) if kind == "host" for line in text.splitlines()]
READY = {"server": "nodes come in at", "client": "has joined"}


class Terminal:
    """A shell with job control, in which lines are typed."""

    def __init__(self, folder, name):
        self.log, self._folder = folder / f"terminal-{name}.log", folder
        lines, self._pipe = os.pipe()
        script = f'set -m; while IFS= read -r -u {lines} line; do eval "$line"; echo "[ended $?]"; done'
        tools = Path(sys.executable).parent
        with self.log.open("wb") as out:
            self._shell = subprocess.Popen(
                ["bash", "-c", script],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=[lines],
                env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        os.close(lines)

    def said(self):
        return self.log.read_text(encoding="utf-8")

    def type(self, line, seconds=240):
        """Type a line and wait for the prompt; it must end well. Returns what it said."""
        at = len(self.said())
        os.write(self._pipe, f"{line}\n".encode())
        self.wait_for("[ended", at, seconds)
        said = self.said()[at:]
        assert "[ended 0]" in said, f"{line}\n{said}"
        if line.endswith("&"):
            self.wait_for(READY[line.split()[1]], at, 90)
        return said

    def wait_for(self, text, at=0, seconds=90):
        end = time.monotonic() + seconds
        while text not in self.said()[at:]:
            assert time.monotonic() < end, f"no {text!r} in\n{self.said()[at:]}"
            time.sleep(0.1)

    def close(self):
        os.close(self._pipe)
        self._shell.terminate()
        self._shell.wait(10)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone in which the run takes seconds: a tiny base, tiny rows, one round."""
    base = tiny_world.save_base(tmp_path / "base", "bert")
    monkeypatch.setenv("MOLEHILL_BASE", str(base))  # no machine takes a folder from a coordinator
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60))
    tiny = (
        f"base.model={base}",
        f"data.source={source}",
        "run.rounds=1",
        "train.steps=1",
        "base.device=cpu",
        "evaluate.baselines=false",
    )
    (tmp_path / "clone/configs").mkdir(parents=True)
    text = load(ROOT / "configs/lab.toml", tiny).to_toml()
    (tmp_path / "clone/configs/lab.toml").write_text(text, encoding="utf-8")
    return tmp_path / "clone"


@pytest.fixture
def terminals(clone):
    found = {name: Terminal(clone, name) for name in "123"}
    yield found
    subprocess.run([Path(sys.executable).parent / "molehill", "server", "stop"], cwd=clone, check=False)
    for folder in clone.glob("node-*"):
        if (folder / "joined.json").exists():
            os.kill(json.loads((folder / "joined.json").read_text())["pid"], 15)
    for terminal in found.values():
        terminal.close()
    end = time.monotonic() + 30
    while any(left_over(folder) for folder in (clone / "coordinator", *clone.glob("node-*"))):
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_the_page_works_as_typed(clone, terminals):
    port, exchange_port = free_ports(2)
    said = {}
    for terminal, line in TYPED:
        if line.startswith(". "):
            continue  # the environment of the tests is active already
        typed = line.replace(":9440", f":{port}")
        if "server up" in line:
            typed = typed.replace("server up", f"server up --port {port} --exchange-port {exchange_port}")
        said[line] = terminals[terminal].type(typed)
        if line.startswith("cp ") and "molehill pki revoke lab-2 --ca ca" in said:
            terminals["3"].wait_for("the coordinator refuses this machine")
    assert "lab-1  " in said["molehill server status"]
    assert "online" in said["molehill server status"]
    assert "Report: runs/lab/report.html" in said["molehill server run configs/lab.toml"]
    assert (clone / "runs/lab/report.html").is_file()
    for line, text in said.items():
        if "client evaluate" in line:
            assert "personalised" in text
    assert "forgot lab" in said["molehill client forget --state node-1"]
    assert not list((clone / "node-1/runs").glob("*"))
    assert "the coordinator has ended" in said["molehill server stop"]
    audit = subprocess.run(
        [Path(sys.executable).parent / "molehill", "audit", "verify", "runs/lab/audit.jsonl"],
        cwd=clone, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert audit.returncode == 0, audit.stderr


def test_the_readme_shows_lines_of_the_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for kind, _, text in FENCE.findall(readme) if kind == "lab" for line in text.splitlines()]
    assert lines
    run = {line for _, line in TYPED}
    assert [line for line in lines if line not in run] == []


def options(line):
    return [word for word in shlex.split(line) if word.startswith("--")]


def require_options(text, line):
    """Options that a program's help does not know."""
    assert [option for option in options(line) if option not in text] == [], line


def require_molehill(words):
    """A command of ours that is there, with options that it has."""
    known = CliRunner().invoke(app, [*words[:2], "--help"], env={"COLUMNS": "200"})
    assert known.exit_code == 0, words
    require_options(known.output, shlex.join(words))


@pytest.mark.parametrize("line", HOST)
def test_lines_for_other_programs_name_what_is_there(line):
    words = shlex.split(line)
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    if words[:2] == ["sudo", "cp"]:
        assert (ROOT / words[2]).is_file()
    elif words[:2] == ["sudo", "systemctl"]:
        assert list((ROOT / "deploy/systemd").glob(f"{re.sub(r'@.*', '@', words[-1])}.service"))
    elif words[:3] == ["sudo", "-u", "molehill"]:
        require_molehill(words[words.index("/opt/molehill/bin/molehill") + 1 :])
    elif words[0] == "pip":
        help_ = [sys.executable, "-m", "pip", words[1], "--help"]
        done = subprocess.run(help_, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip("needs pip")
        require_options(done.stdout, line)
    else:
        at = words.index("compose")
        assert words[at - 1] == "docker"
        if words[at + 1] == "exec":
            assert words[at + 2] in services
            assert words[at + 3] == "molehill"
            require_molehill(words[at + 4 :])
        elif words[at + 1] == "cp":
            assert words[at + 2].partition(":")[0] in services
        elif shutil.which("docker"):
            help_ = ["docker", "compose", words[at + 1], "--help"]
            done = subprocess.run(help_, capture_output=True, text=True, check=False)
            if "docker compose" in done.stdout:
                require_options(done.stdout, line)
