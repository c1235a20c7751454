"""From a configuration to a finished run folder: the one call behind ``molehill simulate``."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from molehill import files
from molehill.config import Config, Engine, load
from molehill.errors import ConfigError, ResumeError
from molehill.extras import needs
from molehill.tasks.lengths import Lengths, together
from molehill.tasks.schema import class_counts, load_rows
from molehill.wire.store import load_tree, save_tree
from molehill_server.app import app as server_app
from molehill_server.check import require
from molehill_server.folder import require_base, working, write_config
from molehill_simulation.conclude import conclude
from molehill_simulation.data import names_of
from molehill_simulation.engine import Observer, crew_of, machine_of, run_local, run_ray, sure_workers
from molehill_simulation.summary import Summary
from molehill_simulation.workers import Workers
from molehill_simulation.world import World, app, store_of, world_of

IMPORTABLE = "molehill_simulation.world:app"


def simulate(
    config: Config | Path | str,
    out: Path | str,
    *,
    engine: Literal["local", "ray"] = "local",
    observer: Observer | None = None,
) -> Summary:
    """Run a federation and write the run folder: adapter, summary and report.

    Args:
        config: The run, or the TOML file that says it.
        out: Run folder; a run that is there goes on from its last committed round.
        engine: In this process, or Flower's Ray engine.
        observer: Called with every event.

    Returns:
        What the run came to; also in ``summary.json``.

    Raises:
        MolehillError: Bad input, a federation that cannot go on, or another process in the folder; it can be resumed.
    """
    if engine not in {"local", "ray"}:
        raise ConfigError(f"there is no engine {engine!r:.40}", mend="Give local or ray.")
    if engine == "ray":
        with needs("ray"):
            import_module("ray")
    if not isinstance(config, Config | Path | str):
        what = f"a run is said by a Config or by its TOML file, not by {type(config).__name__} {config!r:.40}"
        raise ConfigError(what, mend="See molehill.Config, or molehill init.")
    config, out = config if isinstance(config, Config) else load(config), Path(out)
    require(config)
    with files.private(), files.told("the run", out), working(out), ExitStack() as stack:
        workers = sure_workers(config) if engine == "local" else 1
        # They import what they need, which takes seconds, while this process reads rows and base.
        crew = stack.enter_context(crew_of(workers, IMPORTABLE)) if workers > 1 else None
        return _simulate(config, out, engine, observer, crew)


def _simulate(
    config: Config, out: Path, engine: Literal["local", "ray"], observer: Observer | None, crew: Workers | None
) -> Summary:
    _, task = load_rows(config.data, config.task)
    config = config.model_copy(update={"task": task})
    if (out / "config.toml").exists():
        write_config(config, out)  # refuses another configuration before anything is loaded
    world = world_of(config.to_toml())
    _known_clients(world)
    if observer is not None:
        observer({"event": "rows", **_about_rows(world)})
    write_config(config, out)  # only now, so that a mistake leaves no run folder behind
    names = names_of(world.owners)
    if names:
        files.write(out / "owners.json", json.dumps(names, ensure_ascii=False, indent=2).encode())
    _initial(world, out)
    if observer is not None:
        for remark in world.model.remarks:
            observer({"event": "remark", "text": remark})
    machine = None
    if engine == "local":
        machine = machine_of(config, world.model, world.kernels, _lengths(world), len(world.owners))
        chosen = Engine(workers=machine.workers, together=machine.together)
        run_local(config.model_copy(update={"engine": chosen}), out, app, server_app, observer, IMPORTABLE, crew)
    else:
        run_ray(config, out, app, server_app, observer)
    classes, lengths = _classes(world), _lengths(world).quantiles
    findings = {owner.name: store_of(world, out, owner.name).load_findings() for owner in world.owners}
    return conclude(config, world.model, world.base, out, classes, lengths, machine, findings)


def _about_rows(world: World) -> dict[str, Any]:
    """Classes with their counts and lengths in tokens, of all rows that are trained on or held out."""
    counts = Counter[str]()
    for owner in world.owners:
        for rows in (owner.train, owner.test):
            counts.update(class_counts(rows, world.config.task))
    lengths = _lengths(world)
    names = names_of(world.owners)
    told = {"lengths": lengths.quantiles, "cut": lengths.loss, "enough": lengths.enough}
    return {"classes": dict(counts), "names": names, **told}


def _lengths(world: World) -> Lengths:
    return together([part.lengths for parts in world.examples for part in parts])


def _classes(world: World) -> dict[str, dict[str, tuple[int, int]]]:
    """Rows of every class that each client trains on and holds out; empty for causal LM."""
    counts = {o.name: [class_counts(rows, world.config.task) for rows in (o.train, o.test)] for o in world.owners}
    return {
        name: {label: (count, test[label]) for label, count in train.items()}
        for name, (train, test) in counts.items()
        if train
    }


def _known_clients(world: World) -> None:
    """Refuse a scenario for clients that do not exist.

    Raises:
        ConfigError: Names the first one.
    """
    names = [owner.name for owner in world.owners]
    scenario = world.config.scenario
    for key, wanted in (("garbage", scenario.garbage), ("poison", scenario.poison)):
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise ConfigError(
                f"there is no client {unknown[0]!r}", where=f"scenario.{key}", mend=f"Clients: {', '.join(names)}."
            )


def _initial(world: World, out: Path) -> None:
    """Write the adapter that everybody starts from, or check that the folder's belongs to this base and these rows."""
    path, rows = out / "initial.safetensors", _digest(world)
    if not path.exists():
        save_tree(path, world.initial, {"base": world.base.digest, "rows": rows})
        return
    _, meta = load_tree(path)
    require_base(meta, world.base, out)
    if meta.get("rows") != rows:
        raise ResumeError(
            f"the rows of {world.config.data.source} are not those the run was started with",
            where=str(out),
            mend="Bring the old rows back, or start a new run in another folder.",
        )


def _digest(world: World) -> str:
    """SHA-256 of every client's rows."""
    total = hashlib.sha256()
    for owner in world.owners:
        for rows in (owner.train, owner.test):
            total.update(json.dumps([owner.name, dict(rows.columns)], default=str).encode())
    return total.hexdigest()
