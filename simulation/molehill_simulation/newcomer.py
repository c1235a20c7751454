"""An owner that comes after the last round: it makes its personal model of the final one, in a folder of its own."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molehill import files, registry
from molehill.config import Config, MethodRef, load, parse
from molehill.errors import AdapterError, ConfigError, DataError, ResumeError
from molehill.plan import Figure, Scores
from molehill.tasks.kind import kind_of
from molehill.tasks.measures import Measure
from molehill.tasks.outcomes import gains
from molehill.wire.local import MemoryExchange
from molehill.wire.store import load_tree
from molehill.words import counted
from molehill_client.baselines import base_of
from molehill_client.client import Client
from molehill_client.workbench import Workbench
from molehill_server.broadcast import Broadcast, tree_patches
from molehill_server.check import Conflict, check
from molehill_server.folder import require_base
from molehill_server.planning.assigning import Leaning
from molehill_server.planning.planner import Planner, shares
from molehill_server.records import Global
from molehill_simulation.source import finished
from molehill_simulation.world import World, open_world, store_of

HOLDOUT = 0.2
ENOUGH = 10  # units to choose on: on fewer a standard error says little, and a worse model may win

_NAME = re.compile(r"[^\W_][\w.@-]{0,127}")  # as a client says it, see `molehill.plan.Hello`
_MEANT = ("global", "base", "state.key")  # these mean something else where clients are named
_NEEDED = ("config.toml", "final.safetensors", "adapter/molora.json")


@dataclass(frozen=True)
class Newcomer:
    """What an owner has made of the final model of a run.

    Attributes:
        name: Its name in the folder.
        out: The folder, which is one of a run with this owner alone.
        n_train: Rows that the personal model was made with.
        aside: Of these, rows that candidates were tried on before; 0 where there was no choice.
        n_test: Held-out rows.
        cut: What of the rows was lost since they are too long, in words; empty when nothing was.
        candidates: What could be chosen, in the order of preference.
        chosen: What was.
        why: How that came, in a sentence.
        stages: Scores on the held-out rows of ``base``, the frozen base with the owner's head, ``global``, the final
            model as it is, and ``personalised``.
        gains: How much better the personalised model is than the global one on the same rows, by measure.
        measures: What is measured.
    """

    name: str
    out: Path
    n_train: int
    aside: int
    n_test: int
    cut: str
    candidates: tuple[str, ...]
    chosen: str
    why: str
    stages: Mapping[str, Scores]
    gains: Mapping[str, Figure]
    measures: Sequence[Measure]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "out": str(self.out),
            "n_train": self.n_train,
            "aside": self.aside,
            "n_test": self.n_test,
            "candidates": list(self.candidates),
            "chosen": self.chosen,
            "why": self.why,
            "stages": {stage: scores.model_dump(mode="json") for stage, scores in self.stages.items()},
            "gains": {name: gain.model_dump(mode="json") for name, gain in self.gains.items()},
        }


def personalise(
    run: Path, data: Path, name: str, out: Path | None = None, *, candidates: Sequence[str] = (),
    base: str | None = None,
) -> Newcomer:  # fmt: skip
    """Make the personal model of an owner that took no part in a run, and write it as a run folder of its own.

    The rows are dealt as those of an owner of the run. What is made, and how it is chosen, is said in
    `molehill_client.choosing`; but below `ENOUGH` units to choose on the first candidate is taken. Nothing of the run's
    folder is changed, and no other owner's state is copied.

    Args:
        run: Folder of a finished run, or its adapter in there. Of it ``config.toml``, ``final.safetensors`` and
            ``adapter/`` are needed.
        data: The owner's rows, with the columns of the run's.
        name: What the owner is called.
        out: The folder, where nothing may be yet; beside the run's when None.
        candidates: Names of what may be made, in the order of preference; those of the run when empty, or else
            the usual ones (`molehill_client.making.Candidate`).
        base: Where the base is, when it is not where the run had it.

    Raises:
        AdapterError: A part of the run is not there, or damaged.
        ConfigError: The name or a candidate cannot be had, or the run shares no model.
        DataError: The rows cannot be read, do not fit, or are too few.
        DeployError: The folder cannot be written.
        ModelError: The base cannot be loaded.
        ResumeError: The base is another, or there is something in the folder.
        TrainingError: Nothing can be made.
    """
    run = _run_of(run)
    name = _named(name, run)
    out = run.with_name(f"{run.name}-{name}") if out is None else out
    if not data.exists():
        raise DataError("there is no such file", where=str(data), mend="Give the owner's rows with --data.")
    with files.private(), files.told("the owner", out, "try again"), _made(out) as folder:
        config = _config(run, data, name, candidates, base)
        world = _world(config, data)
        made = _personalised(run, folder, world)
        _write(run, folder, world.config, made)
    return replace(made, out=out)


def _run_of(path: Path) -> Path:
    """The run folder that is meant, with all that is needed of it."""
    path = path if path.name else path.resolve()
    if not (path / "config.toml").is_file() and (path.parent / "config.toml").is_file():
        path = path.parent if path.parent.name else path.parent.resolve()
    lacking = [part for part in _NEEDED if not (path / part).is_file()]
    if not lacking:
        return path
    if lacking[0] == _NEEDED[0]:
        mend = (
            "Name the run folder, or bring of it config.toml, final.safetensors, initial.safetensors and adapter/: "
            "an adapter alone, or a bundle, does not say how the run trains."
        )
        raise AdapterError(f"this is no run folder: {_NEEDED[0]} is not there", where=str(path), mend=mend)
    mend = f"Finish the run (molehill simulate --out {path} --resume), or bring that part of its folder, too."
    raise AdapterError(f"this run has no final model: {lacking[0]} is not there", where=str(path), mend=mend)


def _named(name: str, run: Path) -> str:
    """The owner's name in its usual form, if it can have it."""
    name = unicodedata.normalize("NFC", name)
    if not _NAME.fullmatch(name) or name in _MEANT:
        mend = "Give letters, digits and ._@-, and a letter or digit first."
        what = f"{name!r:.60} means something else" if name in _MEANT else f"an owner cannot be called {name!r:.60}"
        raise ConfigError(what, where="--name", mend=mend if name not in _MEANT else "Give another name.")
    files.require_name(name, ConfigError)
    if (run / "clients" / name).exists():
        raise ConfigError(f"the run has an owner called {name!r}", where="--name", mend="Give another name.")
    return name


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """A folder beside it that becomes ``out`` when all has gone well, and goes otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResumeError("there is something already", where=str(out), mend="Choose another --out.")
    files.make_folder(out.parent)
    part = out.with_name(f".{out.name}.{secrets.token_hex(8)}.part")
    part.mkdir()
    try:
        yield part
        part.replace(out)
        files.sync(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _config(run: Path, data: Path, name: str, candidates: Sequence[str], base: str | None) -> Config:
    """The run's configuration with this owner alone, and with what it chooses from."""
    given = load(run / "config.toml")
    for each in candidates:
        try:
            registry.get("candidate", each)
        except ConfigError as error:
            raise ConfigError(error.what, where="--candidate", mend=error.mend) from None
    known = {ref.name: ref for ref in given.personal.candidates}
    names = candidates or tuple(known)
    wanted = [known.get(each, MethodRef(name=each)) for each in names or _usual()]

    def having(refs: Sequence[MethodRef]) -> Config:
        values = tomllib.loads(given.to_toml())
        values["data"] |= {"source": str(data.resolve()), "clients": 1, "partition": {"name": "iid", "names": [name]}}
        values["personal"] |= {
            "holdout": given.personal.holdout or HOLDOUT,
            "candidates": [ref.model_dump(mode="json") for ref in refs],
        }
        if base is not None:
            values["base"] |= {"model": base}
            values["base"].pop("revision", None)
        return parse(values)

    if not names:  # what the run cannot have is none of the usual ones
        refused = {ref.name: _refused(having([ref])) for ref in wanted}
        wanted = [ref for ref in wanted if refused[ref.name] is None] or wanted
    config = having(wanted)
    if (conflict := _refused(config)) is not None:
        later = "That is for another run: this one has nothing for owners that come later."
        mend = "Give other candidates." if names else later
        raise ConfigError(conflict.why, where=" with ".join(conflict.keys), mend=mend)
    return config


def _usual() -> list[str]:
    """Candidates that are tried where nobody says which, the preferred first."""
    places = {each.name: registry.declared(each, "usual") for each in registry.methods("candidate")}
    return sorted((name for name, place in places.items() if place is not None), key=lambda name: places[name])


def _refused(config: Config) -> Conflict | None:
    """Why the candidates cannot be had; None where they can."""
    conflicts = (each for each in check(config) if each.verdict == "refuse" and "personal.candidates" in each.keys)
    return next(conflicts, None)


def _world(config: Config, data: Path) -> World:
    try:
        return open_world(config)
    except DataError as error:
        if not error.where.startswith("data."):
            raise
        # Keys of a configuration that the owner has not written.
        raise DataError(error.what, where=str(data), mend="Give more rows.") from None


def _personalised(run: Path, folder: Path, world: World) -> Newcomer:
    """Choose, make, keep and score it."""
    tree, about = load_tree(run / "final.safetensors")
    require_base(about, world.base, run)
    start, _ = (
        load_tree(run / "initial.safetensors") if (run / "initial.safetensors").is_file() else (world.initial, {})
    )
    patches = tree_patches(tree.select(lambda key: key.role.startswith("patch.")))
    glob = Global(tree.select(lambda key: not key.role.startswith("patch.")), patches, round=int(about["round"]))

    config, exchange = world.config, MemoryExchange()
    codecs = (each.name for each in registry.methods("codec") if registry.declared(each, "exact"))
    exact = MethodRef(name=next(codecs))  # it is what clients decoded: encoded once more it would be something else
    config = config.model_copy(
        update={
            "wire": config.wire.model_copy(update={"down": exact, "max_bytes": 2**48}),
            "evaluate": config.evaluate.model_copy(update={"baselines": False, "generate": 0, "probes": ()}),
        }
    )
    broadcast = Broadcast(exchange, exact, config.wire.max_bytes)
    broadcast.publish(glob)
    bench = Workbench(config, world.model, world.task, world.base.digest, start, exchange)
    owner, (train, test) = world.owners[0], world.examples[0]
    store = store_of(world, folder, owner.name)
    client = Client(bench, owner.name, train, test, store)
    aside, why = _aside(client)
    if not aside:  # on so few nothing is tried
        part = config.personal.model_copy(update={"holdout": 0.0})
        bench = replace(bench, config=config.model_copy(update={"personal": part}))
        client = Client(bench, owner.name, train, test, store)
    # No assignment knows it: it leans on nothing, and has the model that all have.
    decided = shares(config, glob.round)
    each = decided.ranks or decided.ks
    plan = Planner(config, world.base.digest).plan(
        owner.name,
        glob.round,
        glob.tree.layout,
        broadcast.digests(),
        each.index(max(each)) if each else 0,  # where owners get more or less of the model, the most
        leaning=Leaning(),
    )
    reply = client.evaluate(plan)
    rows, measures = store.load_row_scores(), kind_of(config.task).measures
    stages = {"base": base_of(client, plan).scores(), **reply.stages}
    return Newcomer(
        name=owner.name,
        out=folder,
        n_train=len(train),
        aside=aside,
        n_test=len(test),
        cut=client.lengths.loss,
        candidates=tuple(ref.name for ref in config.personal.candidates),
        chosen=store.before(glob.round + 1).chosen,
        why=why,
        stages=stages,
        gains=gains(rows.stages["global"], rows.stages["personalised"], measures, rows.units),
        measures=measures,
    )


def _aside(client: Client) -> tuple[int, str]:
    """How many rows an owner chooses on, 0 for too few; and that in a sentence."""
    rows, train = client.aside_rows, client.train_rows
    units = len(set(rows.units))
    every = counted(len(train), "training row")
    if units >= ENOUGH:
        return len(rows), f"chosen on {len(rows)} of {every}, then made with all of them"
    first = client.bench.config.personal.candidates[0].name
    part = counted(units, "unit") if units != len(rows) else counted(units, "row")
    return 0, (
        f"not chosen: {part} of {every} could be set aside to choose on, and fewer than {ENOUGH} say little, "
        f"so the first candidate, {first}, was taken"
    )


def _write(run: Path, folder: Path, config: Config, made: Newcomer) -> None:
    """Write beside the owner's state what verbs read of a run."""
    shutil.copytree(run / "adapter", folder / "adapter", copy_function=shutil.copyfile)
    for name in ("initial.safetensors", "final.safetensors"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    files.write(folder / "config.toml", config.to_toml().encode())
    ended, rounds, epsilon = int(time.time()), config.run.rounds, 0.0
    if (run / "metrics.jsonl").is_file():  # of it what names nobody
        ended, rounds, epsilon = finished(run)
    report = {"epsilon": epsilon} if epsilon else {}
    events = [{"event": "round", "round": rounds, "report": report, "time": ended}, {"event": "end", "time": ended}]
    files.write(folder / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in events).encode())
    told = {key: value for key, value in made.as_dict().items() if key != "out"}
    files.write(folder / "personalised.json", (json.dumps({**told, "run": config.run.name}, indent=1) + "\n").encode())
