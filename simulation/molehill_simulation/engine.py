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

import torch

from molehill.config import Config
from molehill.molora.model import MoLoRAModel
from molehill.tasks.base_model import stored_bytes, width_of
from molehill.tasks.kernels import Kernels, company, measured
from molehill.tasks.lengths import Lengths
from molehill_server.events import listening
from molehill_server.folder import write_config
from molehill_simulation import pulse
from molehill_simulation.flower import (
    SERVER_NODE,
    ClientApp,
    RunConfig,
    ServerApp,
    context_of,
    ray_engine,
)
from molehill_simulation.grid import LocalGrid
from molehill_simulation.pulse import Parts
from molehill_simulation.scenario import Reported, ScenarioApp
from molehill_simulation.summary import Machine
from molehill_simulation.worker import Job, Program
from molehill_simulation.workers import Workers

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time in so many of wall time
RUN = 1  # the only run of a grid
_ON_A_GPU = 4  # clients in the same passes, where nothing is measured
_WIDEST = 4  # bytes of a parameter as it is stored
SMALL = 5_000_000  # parameters of a base whose clients are done before worker processes have started

Observer = Callable[[dict[str, Any]], None]


def run_local(
    config: Config,
    out: Path,
    client_app: ClientApp,
    server_app: ServerApp,
    observer: Observer | None = None,
    importable: str | None = None,
    crew: Workers | None = None,
) -> None:
    """Run a federation on this machine, from the start or from the last checkpoint in ``out``.

    Args:
        config: The run; where ``engine`` says ``auto``, all is done in this process, one client at a time.
        out: Run folder; must hold ``initial.safetensors``.
        client_app: The clients.
        server_app: The server.
        observer: Called with every event, and a few times a second with ``working``, which no file holds: ``parts`` of
            their work that the clients have done.
        importable: The clients as ``module:name``, by which worker processes find them.
        crew: Processes that have imported them already, as many as ``engine.workers``; they stay the caller's.

    Raises:
        MolehillError: Whatever stops a run; the folder can be resumed.
    """
    workers = 1 if config.engine.workers == "auto" else config.engine.workers
    together = 1 if config.engine.together == "auto" else config.engine.together
    nodes = config.data.clients

    def working(parts: Parts) -> None:
        if observer is not None:
            observer({"event": "working", "parts": parts})

    with _observed(observer), ExitStack() as stack:
        if workers == 1 or importable is None:
            run_config = _run_config(config, out, f"memory:{out.resolve()}")
            grid = LocalGrid(client_app, nodes, run_config, together=together)
            grid.stage.client_app = ScenarioApp(client_app, config, grid.late)
            stack.enter_context(pulse.listening(working))
        else:
            exchange = out.resolve() / "exchange"
            run_config = _run_config(config, out, f"folder:{exchange}")
            stack.callback(shutil.rmtree, exchange, ignore_errors=True)
            crew = crew or stack.enter_context(crew_of(workers, importable))
            crew.employ(Job(nodes, run_config, RUN, measured()), working)
            grid = LocalGrid(client_app, nodes, run_config, together=together, crew=crew)
        server_app(grid, context_of(RUN, SERVER_NODE, {}, run_config))


def crew_of(workers: int, importable: str) -> Workers:
    """So many processes, which import the clients at once; use inside ``with``."""
    return Workers(workers, Program(importable, sys.path), max(1, cores() // workers))


def sure_workers(config: Config) -> int:
    """How many processes will share the clients' work, where that is sure before anything is loaded; else 1."""
    large = (stored_bytes(config.base) or 0) >= _WIDEST * SMALL
    on_cpu = config.base.device == "cpu" or (config.base.device == "auto" and not torch.cuda.is_available())
    return _workers(config, config.data.clients, alone=not (large and on_cpu))


def _workers(config: Config, clients: int, *, alone: bool) -> int:
    given = config.engine.workers
    return given if given != "auto" else 1 if alone else min(cores(), clients)


def machine_of(config: Config, model: MoLoRAModel, kernels: Kernels, lengths: Lengths, clients: int) -> Machine:
    """How this machine computes a run, with what ``engine`` leaves to us decided.

    Args:
        config: The run.
        model: Base and adapter.
        kernels: How the base is computed.
        lengths: Of all rows.
        clients: Number of clients.
    """
    given, small, gpu = config.engine, model.base_parameters < SMALL, model.flat.is_cuda
    alone = small or gpu  # one GPU holds one base
    workers = _workers(config, clients, alone=alone)
    together, why = given.together, ""
    if together == "auto":
        most = 1 if small else _ON_A_GPU
        if not alone:
            seen = sum(min(count, config.task.max_length) for count in lengths.tokens) / len(lengths.tokens)
            most, why = company(kernels, width_of(model.base.config), round(config.train.batch_size * seen))
        together = min(most, -(-clients // workers))  # while every worker has a group
    return Machine(
        precision=kernels.precision,
        products=kernels.products,
        attention=kernels.attention,
        workers=workers,
        together=together,
        why="; ".join(filter(None, (kernels.why, why))),
    )


def cores() -> int:
    """Processor cores that this process may use, also where a container shows more of them than it gives."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(seen, round(int(quota) / int(period))))
    except (OSError, ValueError):  # there is none, or it says "max"
        return seen


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


def _run_config(config: Config, out: Path, exchange: str) -> RunConfig:
    return {"config": str(write_config(config, out)), "out": str(out.resolve()), "exchange": exchange}


def _observed(observer: Observer | None) -> ExitStack:
    stack = ExitStack()
    if observer is not None:
        stack.enter_context(listening(observer))
    return stack
