"""Runs the same ServerApp and ClientApp in this process, or on Flower's Ray engine."""

from __future__ import annotations

import shutil
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
from molehill_simulation.scenario import ScenarioApp

Observer = Callable[[dict[str, Any]], None]


def run_local(
    config: Config, out: Path, client_app: ClientApp, server_app: ServerApp, observer: Observer | None = None
) -> None:
    """Run a federation in this process, from the start or from the last checkpoint in ``out``.

    Args:
        config: The run.
        out: Run folder; must hold ``initial.safetensors``.
        client_app: The clients.
        server_app: The server.
        observer: Called with every event.

    Raises:
        MolehillError: Whatever stops a run; the folder can be resumed.
    """
    run_config = _run_config(config, out, f"memory:{out.resolve()}")
    grid = LocalGrid(client_app, config.data.clients, run_config)
    grid.stage.client_app = ScenarioApp(client_app, config, grid.late)
    with _observed(observer):
        server_app(grid, context_of(1, SERVER_NODE, {}, run_config))


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
    clients = ScenarioApp(client_app, config, time.sleep)
    patient: RunConfig = {**run_config, "grace": config.round.deadline}
    with _observed(observer):
        ray_engine(server_app, clients, config.data.clients, patient, run_config, resources or {"num_cpus": 1})
    shutil.rmtree(exchange)


def write_config(config: Config, out: Path) -> Path:
    """Write the resolved configuration into the run folder, once; both apps read it from there.

    Returns:
        The absolute path of the file.

    Raises:
        ResumeError: The folder holds a run with another configuration.
    """
    path = out.resolve() / "config.toml"
    if path.exists():
        differ = _differences(load(path).model_dump(mode="json"), config.model_dump(mode="json"))
        if differ:
            raise ResumeError(
                f"the run was started with another configuration, {', '.join(differ[:5])} differ",
                where=str(out),
                mend="Resume with the configuration it was started with, or start a new run in another folder.",
            )
        return path
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
