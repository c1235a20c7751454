"""Compose file and systemd units: their very commands, run without docker and systemd, finish a run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_world
import yaml
from lab import MOLEHILL, Lab

from molehill.config import load
from molehill_simulation.data import deal_to

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy/systemd"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
LABS = ("lab-1", "lab-2")


class Machines(Lab):
    """Runs commands that were written for other paths, hosts and ports."""

    def rewritten(self, words, paths):
        """Words with the paths of containers or units mapped into our folder, and the network to loopback."""

        def mapped(word):
            inside = next((path for path in paths if word == path or word.startswith(f"{path}/")), None)
            return word if inside is None else f"{paths[inside]}{word.removeprefix(inside)}"

        hosts = re.compile(r"^(coordinator|fed\.example\.org):9440$")
        result = [hosts.sub(f"localhost:{self.port}", mapped(word)) for word in words]
        if "up" in result:
            result = [word.replace("0.0.0.0", "127.0.0.1") for word in result]
            result += ["--port", str(self.port), "--exchange-port", str(self.exchange_port)]
        return result

    def until_said(self, name, text):
        self.until(lambda: text in self.said(name), self.processes[name])

    def command(self, words, program=MOLEHILL, **variables):
        """A command that ends, and must end well."""
        done = subprocess.run(
            [str(program), *words],
            cwd=self.folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{self.story()}"
        return done.stdout


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """A folder as the how-to leaves it: identities and rows, and its configuration made tiny."""
    base = tiny_world.save_base(tmp_path / "base", "bert")
    monkeypatch.setenv("MOLEHILL_BASE", str(base))  # no machine takes a folder from a coordinator
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60))
    config = load(
        ROOT / "configs/lab.toml",
        (
            *(f"base.model={base}", f"data.source={source}", "base.device=cpu"),
            *("run.rounds=1", "train.steps=1", "evaluate.baselines=false"),
        ),
    )
    lab = Machines(tmp_path, config, LABS)
    (tmp_path / "configs").mkdir()
    shutil.copy(lab.file, tmp_path / "configs/lab.toml")
    deal_to(config, [tmp_path / "rows" / name for name in LABS])
    yield lab
    lab.close()


# ---- compose -----------------------------------------------------------------------------------------------------


def environment_of_the_image():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    return dict(word.split("=", 1) for word in shlex.split(line))


def mounts(service, folder):
    """Where the mounts of a service lie here."""
    found = {}
    for mount in service["volumes"]:
        if isinstance(mount, dict):
            assert mount["read_only"]
            found[mount["target"]] = folder / mount["source"]
            assert found[mount["target"]].is_dir()
        else:
            volume, inside = mount.split(":")
            assert volume in COMPOSE["volumes"]
            found[inside] = folder / "volumes" / volume
            found[inside].mkdir(parents=True, exist_ok=True)
    return found


@pytest.mark.slow
def test_the_commands_of_the_compose_file_finish_a_run(machines, monkeypatch):
    inside = {name: mounts(service, machines.folder) for name, service in SERVICES.items()}
    image = environment_of_the_image()
    variables = {
        name: dict(zip(image, machines.rewritten(image.values(), inside[name]), strict=True)) for name in SERVICES
    }
    for name, service in SERVICES.items():
        for key, value in variables[name].items():
            monkeypatch.setenv(key, value)
        machines.start(name, *machines.rewritten(service["command"], inside[name]))
        machines.until_said(name, "nodes come in" if name == "coordinator" else "has joined")
        assert (machines.folder / "volumes" / name / "state").is_dir()  # nothing is written elsewhere
    run = ["server", "run", "/configs/lab.toml", "--out", "/var/lib/molehill/runs/lab", "--json"]
    summary = machines.command(machines.rewritten(run, inside["coordinator"]), **variables["coordinator"])
    assert [client["id"] for client in json.loads(summary)["clients"]] == list(LABS)
    assert (machines.folder / "volumes/coordinator/runs/lab/report.html").is_file()
    for name, service in SERVICES.items():
        kind, program, *words = service["healthcheck"]["test"]
        assert kind == "CMD"
        words = [word.replace("9440", str(machines.port)) for word in words]
        machines.command(words, program={"molehill": MOLEHILL, "python": sys.executable}[program], **variables[name])


def test_containers_can_do_no_more_than_they_need():
    for service in SERVICES.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] != "root"
        assert service["restart"] == "unless-stopped"
        assert service["mem_limit"]
        assert service["pids_limit"]
        assert int(service["stop_grace_period"].removesuffix("s")) > 30  # what a coordinator may take to end
    assert SERVICES["coordinator"]["ports"] == ["9440:9440", "9441:9441"]
    assert not any("ports" in SERVICES[name] for name in LABS)
    for name in LABS:  # no machine sees the key or the rows of another
        assert all(name in str(mount) for mount in SERVICES[name]["volumes"])


def test_the_compose_file_has_nothing_that_docker_compose_1_refuses():
    """Its schema is closed: `apt install docker-compose` still brings 1.29.2."""
    assert all(key in {"services", "volumes"} or key.startswith("x-") for key in COMPOSE)
    mounts = [mount for service in SERVICES.values() for mount in service["volumes"] if isinstance(mount, dict)]
    assert mounts
    assert all(set(mount) <= {"type", "source", "target", "read_only"} for mount in mounts)


@pytest.mark.skipif(
    subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0
    if shutil.which("docker")
    else True,
    reason="needs docker compose",
)
def test_docker_accepts_the_compose_file():
    subprocess.run(["docker", "compose", "config", "--quiet"], cwd=ROOT, check=True)


# ---- the image ---------------------------------------------------------------------------------------------------


def test_the_image_is_made_of_what_is_there():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    packages = {name.partition("/")[0] for name in _wheel()["packages"]}
    assert {*packages, "pyproject.toml", "constraints.txt", "requirements", "README.md", "LICENSE"} == sent
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    users = [line for line in lines if line.startswith("USER")]
    assert users
    assert "root" not in users[-1]
    installs = [line for line in text.splitlines() if re.search(r"\bpip (install|wheel)\b", line)]
    assert all("--no-cache-dir" in line and "--no-deps" in line for line in installs)
    for line in installs:  # by hash, but for our own wheel and for torch, of which every index has builds of its own
        assert "--require-hashes" in line or "/wheels" in line or "TORCH_INDEX" in line, line
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
    assert (ROOT / "requirements" / f"{extras.replace(',', '-')}.txt").is_file()


@pytest.mark.parametrize(
    ("base", "right"),
    [
        (f"python@sha256:{'0' * 64}", True),
        (f"docker.io/library/python:3.11-slim@sha256:{'a1' * 32}", True),
        ("python:3.11-slim", False),
        ("python@sha256:12", False),
        (f"python@sha256:{'0' * 64}0", False),
        ("", False),
    ],
)
def test_the_image_is_built_on_a_digest_only(base, right):
    """The very check of the Dockerfile, since a build would need Docker and a registry."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}
    (check,) = re.findall(r"^RUN (echo \"\$\{BASE\}\" .*)$", text, re.MULTILINE)
    done = subprocess.run(
        ["sh", "-c", check], env={**os.environ, "BASE": base}, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) is right
    assert right or "no digest: give --build-arg BASE=" in done.stderr
    assert COMPOSE["x-machine"]["build"]["args"]["BASE"] == "${MOLEHILL_IMAGE_BASE:-python:3.11-slim}"


def _wheel():
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]


# ---- systemd -----------------------------------------------------------------------------------------------------


def unit(name):
    """Settings of a unit by key; the last one counts."""
    lines = (UNITS / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line))


@pytest.mark.parametrize("name", sorted(path.name for path in UNITS.glob("*.service")))
def test_a_unit_cannot_take_all_of_its_machine(name):
    settings = unit(name)
    assert 0 < int(settings["MemoryMax"].removesuffix("%")) < 100
    assert int(settings["TasksMax"]) > 0


def variables_of(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def words_of(line, instance, variables):
    """A command line as systemd reads it: ${X} is one word, $X as many as it holds."""
    words = []
    for word in shlex.split(line.replace("%i", instance)):
        if word.startswith("$") and not word.startswith("${"):
            words += variables[word[1:]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], word))
    return words


@pytest.mark.slow
def test_the_commands_of_the_units_join_a_coordinator(machines, monkeypatch):
    folder = machines.folder
    coordinator = {"/etc/molehill": folder / "identities", "/var/lib/molehill": folder / "state"}
    variables = variables_of(UNITS / "client.env")
    names = {"coordinator": ("molehill-coordinator.service", "", coordinator)}
    for name in LABS:
        names[name] = ("molehill-client@.service", name, {**coordinator, "/srv/molehill": folder / "rows" / name})
    for name, (file, instance, paths) in names.items():
        program, *words = words_of(unit(file)["ExecStart"], instance, variables)
        assert program == "/opt/molehill/bin/molehill"
        own = folder / "state" / unit(file)["StateDirectory"].replace("%i", instance).removeprefix("molehill/")
        own.mkdir(parents=True)
        monkeypatch.setenv("HOME", str(own))
        machines.start(name, *machines.rewritten(words, paths))
        machines.until_said(name, "nodes come in" if name == "coordinator" else "has joined")
    state = str(folder / "state/coordinator")

    def online():
        nodes = json.loads(machines.command(["server", "status", "--state", state, "--json"]))["nodes"]
        return {node["name"] for node in nodes if node["status"] == "online"} == set(LABS)

    machines.until(online)
    assert json.loads(machines.command(["client", "status", "--state", str(folder / "state/lab-1"), "--json"]))
    machines.command(["server", "stop", "--state", state])
    assert machines.processes["coordinator"].wait(60) == 0  # so Restart=on-failure lets it be


@pytest.mark.parametrize("path", sorted(UNITS.glob("*.service")), ids=lambda path: path.name)
def test_a_machine_that_died_is_not_started_before_its_lease_can_end(path):
    settings = unit(path.name)
    assert settings["Restart"] == "on-failure"
    assert int(settings["RestartSec"]) >= 15
    assert int(settings["TimeoutStopSec"]) > 30


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("path", sorted(UNITS.glob("*.service")), ids=lambda path: path.name)
def test_systemd_accepts_a_unit(path, tmp_path):
    text = path.read_text(encoding="utf-8").replace("/opt/molehill/bin/molehill", str(Path(sys.executable)))
    (tmp_path / path.name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / path.name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert path.name not in done.stderr, done.stderr
