"""A whole deployment on this machine: the real commands in processes of their own, over loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tiny_world

from molehill import address, pki
from molehill.config import Config
from molehill_simulation.world import open_world

NAMES = ("client-1", "client-2", "client-3")
MOLEHILL = Path(sys.executable).parent / "molehill"


class Lab:
    """A coordinator and machines in one folder.

    Args:
        folder: For everything.
        config: The run.
        names: Machines.
    """

    def __init__(self, folder: Path, config: Config, names: tuple[str, ...], passphrase: bytes | None = None) -> None:
        self.host, self.variables = "127.0.0.1", None  # the environment of commands; that of the tests when None
        self.folder, self.config, self.names = folder, config, names
        self.passphrase, self.taps = passphrase, {}
        if passphrase is not None:
            self.options = {"passphrase-file": folder / "passphrase"}
            (folder / "passphrase").write_bytes(passphrase)
            (folder / "passphrase").chmod(0o600)
        else:
            self.options = {}
        self.port, self.exchange_port = free_ports(2)
        self.state, self.out = folder / "coordinator", folder / "run"
        self.processes: dict[str, subprocess.Popen] = {}
        self.authority = pki.Authority.create(folder / "ca")
        self.identify("coordinator", hosts=("localhost",))
        for name in names:
            self.identify(name)
        self.file = folder / "run.toml"
        self.file.write_text(config.to_toml(), encoding="utf-8")

    def identify(self, name: str, *, hosts: tuple[str, ...] = (), folder: str = "", **options) -> Path:
        """An identity, made as the how-to says."""
        own = self.folder / "identities" / (folder or name)
        csr = pki.request(own, name, hosts=hosts, passphrase=self.passphrase)
        _, bundle = self.authority.sign(csr, server=bool(hosts), **options)
        pki.install(bundle, own, passphrase=self.passphrase)
        return own

    def deal(self) -> None:
        """Give every machine the rows that its namesake has in a simulation of this configuration."""
        for owner in open_world(self.config).owners:
            for side in ("train", "test"):
                rows = getattr(owner, side)
                values = [record for _, record in rows.records()]
                tiny_world.write_rows(self.folder / f"{owner.name}.{side}.jsonl", values)

    # ---- processes -------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        return self.variables or {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(self, name: str, *words: object) -> subprocess.Popen:
        """A command of Molehill; what it says is in ``NAME.log``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(MOLEHILL), *map(str, words)], stdout=log, stderr=log, cwd=self.folder, env=self.environment()
            )
        self.processes[name] = process
        return process

    def up(self, **options: object) -> subprocess.Popen:
        words = {"identity": self.folder / "identities" / "coordinator", "state": self.state}
        words |= {"port": self.port, "exchange-port": self.exchange_port, "host": self.host} | self.options | options
        before = self.said("coordinator").count("nodes come in at")
        process = self.start("coordinator", "server", "up", *flags(words))
        self.until(lambda: self.said("coordinator").count("nodes come in at") > before, process, 60)
        return process

    def join(self, name: str, *, wait: bool = True, **options: object) -> subprocess.Popen:
        port = self.taps["door"].port if self.taps else self.port
        words: dict[str, object] = {"server": address.join(self.host, port), "state": self.folder / f"{name}.state"}
        words |= {"identity": self.folder / "identities" / name}
        words |= {"data": self.folder / f"{name}.train.jsonl", "test": self.folder / f"{name}.test.jsonl"}
        words["base"] = self.config.base.model  # a folder, which a machine takes from nobody else
        if self.taps:
            words["exchange"] = f"127.0.0.1:{self.taps['data'].port}"
        words |= self.options | options
        before = self.said(name).count("has joined")
        process = self.start(name, "client", "join", *flags(words))
        if wait:
            # Flower keeps the place of a node that was killed for up to a minute.
            self.until(lambda: self.said(name).count("has joined") > before, process, 150)
        return process

    def run(self, *words: object, out: str = "run") -> subprocess.Popen:
        """Start a run in a folder; with ``--resume`` go on with the one that is there."""
        self.out = self.folder / out
        target = () if "--resume" in words else (self.file,)
        return self.start("run", "server", "run", *target, "--state", self.state, "--out", self.out, *words)

    def ask(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [str(MOLEHILL), *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=self.environment(), check=False
        )

    def said(self, name: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / f"{name}.log").read_text(encoding="utf-8")
        return ""

    def join_all(self) -> None:
        processes = [self.join(name, wait=False) for name in self.names]
        for name, process in zip(self.names, processes, strict=True):
            self.until(lambda name=name: "has joined" in self.said(name), process, 90)

    def finish(self, process: subprocess.Popen, seconds: float = 180) -> None:
        """Wait for a run that must succeed."""
        assert process.wait(seconds) == 0, self.story()

    def until(
        self, condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 60
    ) -> None:
        """Wait for something; a process that ends meanwhile is an error."""
        end = time.monotonic() + seconds
        while not condition():
            assert process is None or process.poll() is None, self.story()
            assert time.monotonic() < end, self.story()
            time.sleep(0.1)

    def events(self, kind: str) -> list[dict]:
        if not (self.out / "metrics.jsonl").exists():
            return []
        return tiny_world.events(self.out, kind)

    def story(self) -> str:
        """The ends of all logs, for a test that failed."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*/logs/*.log")])
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in logs)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        for pid in left_over(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def flags(words: dict[str, object]) -> list[str]:
    return [part for name, value in words.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def left_over(folder: Path) -> list[int]:
    """Processes of a deployment in this folder that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"MOLEHILL_STATE={folder}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def pids_of(folder: Path, word: str) -> list[int]:
    """Processes of a deployment whose command line has a word, oldest first."""
    found = []
    for pid in left_over(folder):
        with contextlib.suppress(OSError):
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return sorted(found)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(socket.socket()) for _ in range(count)]
        for trial in trials:
            trial.bind(("127.0.0.1", 0))
        return [trial.getsockname()[1] for trial in trials]


@contextlib.contextmanager
def open_lab(folder: Path, config: Config, names: tuple[str, ...], passphrase: bytes | None = None) -> Iterator[Lab]:
    """A lab that is closed in the end."""
    lab = Lab(folder, config, names, passphrase)
    try:
        lab.deal()
        yield lab
    finally:
        lab.close()
