"""What baselines scored that were trained on this machine before.

Baselines do not depend on the federation, so runs that differ in its rules or codecs alone need not train them anew.
Kept is what a client's held-out rows were scored, with which class each has and got, by a digest of all that it follows
from, rows included: who guesses them all can see that they were right, and nothing of a text can be read there. The
files are for their owner's eyes only.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files as files_of
from pathlib import Path

import numpy as np

from molehill import files, registry
from molehill.config import method_refs
from molehill.plan import ClientPlan, Scores
from molehill.tasks.outcomes import Outcomes
from molehill.tasks.task import Example
from molehill_client.participant import Participant

# Sections that a model which is trained alone follows from by nothing but its rows, or not at all.
_ELSEWHERE = frozenset({"data", "engine", "evaluate", "federation", "privacy", "round", "scenario", "wire"})

_STAGES = ("base", "local")


@dataclass(frozen=True)
class Baseline:
    """What a model that was trained alone scored.

    Attributes:
        scores: Over all held-out rows.
        rows: Of each of them, in their order.
    """

    scores: Scores
    rows: Outcomes


_log = logging.getLogger(__name__)


def key_of(client: Participant, plan: ClientPlan, steps: int) -> str:
    """SHA-256 (hex) of what a client's baselines follow from.

    Args:
        client: The client, with its rows.
        plan: Gives the seed.
        steps: Steps that the model is trained alone for.
    """
    bench = client.bench
    weight = next(bench.model.base.parameters())
    config = {name: part for name, part in bench.config.model_dump(mode="json").items() if name not in _ELSEWHERE}
    config["run"] = {**config["run"], "name": ""}
    used = [ref for ref in method_refs(bench.config) if ref[0].partition(".")[0] not in _ELSEWHERE]
    others = tuple(sorted({registry.get(axis, ref.name).target.__module__ for _, axis, ref in used}))
    facts = [config, bench.base_digest, plan.seed, plan.k, steps, str(weight.dtype), weight.device.type, _code(others)]
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    total.update(bench.initial.flat.tobytes())
    for rows in (client.train_rows, client.test_rows):
        total.update(f"{len(rows)} rows".encode())
        total.update(np.asarray(rows.units, np.int64).tobytes())  # what is chosen on folds follows from them
        for row in rows:
            _add(total, row)
    return total.hexdigest()


def recall(folder: Path, key: str) -> dict[str, Baseline] | None:
    """The baselines by stage; None where there are none."""
    try:
        found = json.loads((folder / f"{key}.json").read_bytes())
        parts = {stage: (found[stage]["scores"], found[stage]["rows"]) for stage in _STAGES}
        return {
            stage: Baseline(Scores.model_validate(scores), Outcomes.of_json(rows))
            for stage, (scores, rows) in parts.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # there is none, or it is damaged
        return None


def keep(folder: Path, key: str, stages: dict[str, Baseline]) -> None:
    """Remember baselines; a folder that cannot be written is no reason to stop."""
    content = {
        stage: {"scores": each.scores.model_dump(), "rows": each.rows.as_json()} for stage, each in stages.items()
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write(folder / f"{key}.json", json.dumps(content).encode(), mode=0o600)
    except OSError as error:
        _log.debug("baselines cannot be remembered: %s", error)


def _add(total: hashlib._Hash, row: Example) -> None:
    for part in (getattr(row, each.name) for each in fields(row)):
        numbers = np.atleast_1d(np.asarray(-1 if part is None else part))
        numbers = numbers.astype(np.float64 if numbers.dtype.kind == "f" else np.int64)
        total.update(len(numbers).to_bytes(8, "little"))
        total.update(numbers.tobytes())


@cache
def _code(modules: tuple[str, ...]) -> str:
    """SHA-256 (hex) of the code that trains, methods of other packages included: another may give other scores."""
    total = hashlib.sha256(" ".join(version(name) for name in ("torch", "transformers")).encode())
    for package in ("molehill", "molehill_client"):
        for path in sorted(Path(str(files_of(package))).rglob("*.py")):
            total.update(path.read_bytes())
    for name in modules:
        total.update(Path(str(import_module(name).__file__)).read_bytes())
    return total.hexdigest()
