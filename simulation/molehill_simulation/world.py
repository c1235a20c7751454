"""The data owners of a simulation, in one process: the base once in memory, one model, rows dealt from one source."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from molehill.cache import cache_folder
from molehill.config import Config, parse
from molehill.molora.model import MoLoRAModel
from molehill.tasks.adapted import open_model
from molehill.tasks.base_model import BaseInfo
from molehill.tasks.kernels import Kernels
from molehill.tasks.lengths import Examples
from molehill.tasks.schema import load_rows
from molehill.tasks.task import Task
from molehill.wire.connect import connect
from molehill.wire.store import load_tree
from molehill.wire.tree import Tree
from molehill_client.client import Client
from molehill_client.flower import Context, make_app
from molehill_client.state import StateStore
from molehill_client.workbench import Workbench
from molehill_simulation import pulse
from molehill_simulation.data import ClientRows, deal


@dataclass(frozen=True)
class World:
    """What all clients of a simulation share.

    Attributes:
        config: The run, with the task's labels known.
        model: Base and adapter.
        base: Which base.
        task: Encodes rows.
        kernels: How the model is computed on this machine.
        owners: Every client's rows.
        examples: The same encoded: those to train on, and those held out.
        initial: The adapter that everybody starts from; the model's own values are those of whoever used it last.
    """

    config: Config
    model: MoLoRAModel
    base: BaseInfo
    task: Task
    kernels: Kernels
    owners: list[ClientRows]
    examples: list[tuple[Examples, Examples]]
    initial: Tree


def open_world(config: Config) -> World:
    """Load base model and rows.

    Raises:
        ModelError: The base cannot be loaded, or the targets do not fit it.
        DataError: The rows cannot be read or dealt.
        ConfigError: Parts of the adapter do not fit each other.
    """
    rows, task_config = load_rows(config.data, config.task)
    config = config.model_copy(update={"task": task_config})
    owners = deal(config.data, rows, config.run.seed, config.evaluate.split)
    model, base, task, computed = open_model(config)
    initial = model.tree(lambda key: not key.residual)
    # All at once and first of all: a bad row is found with its place, before anybody has trained.
    examples = [(task.encode(owner.train), task.encode(owner.test)) for owner in owners]
    return World(config, model, base, task, computed, owners, examples, initial)


@lru_cache(maxsize=1)
def world_of(text: str) -> World:
    """The world of a configuration, given as TOML; cached, so that engine and clients of a process share it."""
    return open_world(parse(tomllib.loads(text)))


@lru_cache(maxsize=1)
def _clients(text: str, out: str, exchange: str) -> list[Client]:
    """All clients of a run folder; cached, since a worker process answers many messages of one run."""
    world = world_of(text)
    initial, _ = load_tree(Path(out) / "initial.safetensors")
    remembered = cache_folder() / "baselines"
    bench = Workbench(world.config, world.model, world.task, world.base.digest, initial, connect(exchange), remembered)
    return [
        Client(
            bench,
            owner.name,
            *examples,
            store_of(world, Path(out), owner.name),
            pulse.of(owner.name),
        )
        for owner, examples in zip(world.owners, world.examples, strict=True)
    ]


def store_of(world: World, out: Path, client: str) -> StateStore:
    """Where a client of a run folder keeps what is its own."""
    return StateStore(out / "clients" / client, world.config.run.name, world.base.digest)


def _open_client(context: Context) -> Client:
    given = context.run_config
    text = Path(str(given["config"])).read_text(encoding="utf-8")  # the same path may hold another run tomorrow
    clients = _clients(text, str(given["out"]), str(given["exchange"]))
    return clients[int(context.node_config["partition-id"])]


app = make_app(_open_client)
