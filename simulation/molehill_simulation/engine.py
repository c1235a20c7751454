"""Runs the same ServerApp and ClientApp on this machine, or on Flower's Ray engine."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from molehill.config import Config, load
from molehill.errors import ResumeError
from molehill_server.events import listening
from molehill_simulation.flower import (
    SERVER_NODE,
    ClientApp,
    RunConfig,
    ServerApp,
    context_of,
    ray_engine,
)
from molehill_simulation.grid import LocalGrid
from molehill_simulation.scenario import Reported, ScenarioApp
from molehill_simulation.worker import Job
from molehill_simulation.workers import Workers

RUN = 1  # the only run of a grid

Observer = Callable[[dict[str, Any]], None]


def run_local(
    config: Config,
    out: Path,
    client_app: ClientApp,
    server_app: ServerApp,
    observer: Observer | None = None,
    importable: str | None = None,
) -> None:
    """Run a federation on this machine, from the start or from the last checkpoint in ``out``.

    Args:
        config: The run; where ``engine`` says ``auto``, all is done in this process, one client at a time.
        out: Run folder; must hold ``initial.safetensors``.
        client_app: The clients.
        server_app: The server.
        observer: Called with every event.
        importable: The clients as ``module:name``, by which worker processes find them.

    Raises:
        MolehillError: Whatever stops a run; the folder can be resumed.
    """
    workers = 1 if config.engine.workers == "auto" else config.engine.workers
    together = 1 if config.engine.together == "auto" else config.engine.together
    nodes = config.data.clients
    with _observed(observer), ExitStack() as stack:
        if workers == 1 or importable is None:
            run_config = _run_config(config, out, f"memory:{out.resolve()}")
            grid = LocalGrid(client_app, nodes, run_config, together=together)
            grid.stage.client_app = ScenarioApp(client_app, config, grid.late)
        else:
            exchange = out.resolve() / "exchange"
            run_config = _run_config(config, out, f"folder:{exchange}")
            stack.callback(shutil.rmtree, exchange, ignore_errors=True)
            job = Job(importable, nodes, run_config, RUN, sys.path)
            crew = stack.enter_context(Workers(workers, job, max(1, cores() // workers)))
            grid = LocalGrid(client_app, nodes, run_config, together=together, crew=crew)
        server_app(grid, context_of(RUN, SERVER_NODE, {}, run_config))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_ray(
    config: Config,
    out: Path,
    client_app: ClientApp,
    server_app: ServerApp,
    observer: Observer | None = None,
    resources: Mapping[str, float] | None = None,
) -> None:
    """Run a federation on Flower's Ray engine, whose actors may sit on many machines that share a file system.

    Clients take turns on few actors, so one that waits for its turn is no straggler: a round ends when all have
    answered or at its deadline, and ``round.grace`` does not count.

    Args:
        config: The run.
        out: Run folder; must hold ``initial.safetensors``.
        client_app: The clients; importable in the actors.
        server_app: The server.
        observer: Called with every event.
        resources: ``num_cpus`` and ``num_gpus`` of one client; one CPU when omitted.

    Raises:
        MolehillError: Whatever stops a run; the folder can be resumed.
    """
    exchange = out.resolve() / "exchange"
    run_config = _run_config(config, out, f"folder:{exchange}")
    clients = Reported(ScenarioApp(client_app, config, time.sleep))
    patient: RunConfig = {**run_config, "grace": config.round.deadline}
    try:
        with _observed(observer):
            ray_engine(server_app, clients, config.data.clients, patient, run_config, resources or {"num_cpus": 1})
    finally:
        shutil.rmtree(exchange, ignore_errors=True)


def write_config(config: Config, out: Path) -> Path:
    """Write the resolved configuration into the run folder, once; both apps read it from there.

    Returns:
        The absolute path of the file.

    Raises:
        ResumeError: The folder holds a run with another configuration.
    """
    path = out.resolve() / "config.toml"
    if path.exists():
        differ = _differences(load(path).substance, config.substance)
        if differ:
            raise ResumeError(
                f"the run was started with another configuration, {', '.join(differ[:5])} differ",
                where=str(out),
                mend="Resume with the configuration it was started with, or start a new run in another folder.",
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(".config.toml.new")
    scratch.write_text(config.to_toml(), encoding="utf-8")
    return scratch.replace(path)


def _run_config(config: Config, out: Path, exchange: str) -> RunConfig:
    return {"config": str(write_config(config, out)), "out": str(out.resolve()), "exchange": exchange}


def _differences(before: Any, now: Any, at: str = "") -> list[str]:
    """Dotted keys under which two nested configurations differ."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [at]
    keys = sorted({*before, *now})
    return [path for key in keys for path in _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)]


def _observed(observer: Observer | None) -> ExitStack:
    stack = ExitStack()
    if observer is not None:
        stack.enter_context(listening(observer))
    return stack
