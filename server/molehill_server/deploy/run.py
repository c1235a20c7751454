"""Run a federation on the machines that have joined: from a configuration to a finished run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import molehill
from molehill.config import Config
from molehill.errors import ConfigError, DeployError, FederationError, ResumeError
from molehill.tasks.adapted import Adapted, open_model
from molehill.wire.store import load_tree, save_tree
from molehill_server.check import require
from molehill_server.deploy.control import Control, RunStatus
from molehill_server.deploy.up import LOOPBACK, running
from molehill_server.folder import write_config

_POLL = 1.0  # seconds between two looks at the events
_CRASHES = 5  # times a server process that was killed is started again


def run(config: Config, state: Path, out: Path, observe: Callable[[dict[str, Any]], None]) -> Adapted:
    """Run, or go on with, a federation.

    Args:
        config: The run; ``data.clients`` nodes are waited for.
        state: Folder of the coordinator that is up.
        out: Run folder; a run that is there goes on from its last committed round.
        observe: Called with every event.

    Returns:
        The model, with the start values.

    Raises:
        DeployError: No coordinator is up, or its server process ends again and again.
        FederationError: The run cannot go on; the folder can be resumed.
        ConfigError: The configuration does not fit a deployment.
    """
    require(config)
    if config.task.kind == "classification" and not config.task.labels:
        raise ConfigError(
            "the class names are missing", where="task.labels", mend="Nobody here sees the rows; list the classes."
        )
    up = running(state)
    if up is None:
        raise DeployError("no coordinator is up", where=str(state), mend="Start it: molehill server up.")
    if (out / "config.toml").exists():
        write_config(config, out)  # refuses another configuration before anything is loaded
    adapted = open_model(config)
    path = write_config(config, out)
    _initial(adapted, out)
    introduction = {"config": config.to_toml(), "exchange_port": up.exchange_port, "version": molehill.__version__}
    given = {
        "config": str(path),
        "out": str(out.resolve()),
        "exchange": f"folder:{(state / 'exchange').resolve()}",
        "introduction": json.dumps(introduction),
        "clients": str(config.data.clients),
    }
    control = Control(f"{LOOPBACK}:{up.superlink}", Path(up.identity) / "ca.pem")
    try:
        _follow(control, given, out, observe)
    finally:
        control.close()
    return adapted


def _follow(control: Control, given: dict[str, str], out: Path, observe: Callable[[dict[str, Any]], None]) -> None:
    """Start the server process, start it again when it was killed, and pass its events on."""
    error = out / "error.json"
    events = _tail(out / "metrics.jsonl")
    for _ in range(_CRASHES):
        error.unlink(missing_ok=True)
        number = control.start(given)
        try:
            status = _wait(control, number, events, observe)
        except BaseException:
            control.stop(number)
            raise
        if error.exists():
            said = json.loads(error.read_text(encoding="utf-8"))
            raise FederationError(said["text"])
        if status.outcome == "completed":
            return
    raise DeployError(
        f"the server process ended {_CRASHES} times, last: {status.details}",
        mend="See logs/superexec.log of the coordinator.",
    )


def _wait(
    control: Control, number: int, events: Iterator[list[dict[str, Any]]], observe: Callable[[dict[str, Any]], None]
) -> RunStatus:
    while True:
        status = control.runs()[number]
        for event in next(events):
            observe(event)
        if status.status == "finished":
            return status
        time.sleep(_POLL)


def _tail(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield what was appended to an event file since the last time."""
    at = path.stat().st_size if path.exists() else 0
    while True:
        found = []
        if path.exists():
            at = min(at, path.stat().st_size)  # a resume cuts off what came after the last commit
            with path.open("rb") as file:
                file.seek(at)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    at += len(line)
                    found.append(json.loads(line))
        yield found


def _initial(adapted: Adapted, out: Path) -> None:
    """Write the adapter that everybody starts from, or check that the folder's belongs to this base."""
    path = out / "initial.safetensors"
    if not path.exists():
        initial = adapted.model.tree(lambda key: not key.residual)
        save_tree(path, initial, {"base": adapted.base.digest})
        return
    _, meta = load_tree(path)
    if meta.get("base") != adapted.base.digest:
        raise ResumeError(
            f"the run was started on a base with weight digest {meta.get('base', '')[:12]}, "
            f"{adapted.base.id} has {adapted.base.digest[:12]}",
            where=str(out),
            mend="Resume with the same base model, or start a new run in another folder.",
        )
