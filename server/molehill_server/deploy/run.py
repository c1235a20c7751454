"""Run a federation on the machines that have joined: from a configuration to a finished run folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from molehill import __version__, errors, files, locks
from molehill.config import Config
from molehill.errors import ConfigError, DeployError, ResumeError
from molehill.supervise import complaint, works
from molehill.tasks.adapted import Adapted, open_model
from molehill.tasks.kind import kind_of
from molehill.wire.store import load_tree, save_tree
from molehill_server.check import require
from molehill_server.deploy.control import RunStatus
from molehill_server.deploy.office import START, Office
from molehill_server.deploy.up import Running, exchange_folder, require_running
from molehill_server.folder import elsewhere, require_base, write_config

_DETECTION = 120.0  # seconds of a round in which a machine that died is noticed and the round still goes on
_POLL = 1.0  # seconds between two looks at the events
_CRASHES = 20  # times a server process that was killed is started again
_VAIN = 3  # times in a row, when nothing happens in between
_START = 180.0  # seconds for a server process to begin
_GONE = 3  # looks without a server process that make it a dead one,
_NONE = 15  # and that make it one that ended before it had begun
_PROCESS = "flwr-serverapp"
_MEND = "Mend it, then go on with: molehill server run --resume"
_AWAY = 300.0  # seconds to wait for a coordinator that is started again

_log = logging.getLogger(__name__)

Observer = Callable[[Mapping[str, Any]], None]


def run(config: Config, state: Path, out: Path, observe: Observer) -> Adapted:
    """Run, or go on with, a federation.

    Args:
        config: The run; ``data.clients`` nodes are waited for.
        state: Folder of the coordinator that is up.
        out: Run folder; a run that is there goes on from its last committed round.
        observe: Called with every event.

    Returns:
        The model, with the start values.

    Raises:
        DeployError: No coordinator is up, it works on another run, or its server process ends again and again.
        MolehillError: The run cannot go on; the folder can be resumed.
    """
    require(config)
    if missing := kind_of(config.task).missing(config.task):
        mend = f"Nobody here sees the rows; set task.{missing}."
        raise ConfigError(f"task.{missing} is missing", where=f"task.{missing}", mend=mend)
    if config.round.deadline < _DETECTION:
        text = "round.deadline is %g s: Flower takes up to 70 s to notice that a machine is gone, so give %g or more"
        _log.warning(text, config.round.deadline, _DETECTION)
    up, office = require_running(state), Office(state, observe)
    mend = "Wait for it, or stop it: molehill server stop --run"
    with (
        files.private(),
        locks.hold(state, "another `server run` is at work", mend, "run.lock"),
        files.told("the run", out),
    ):
        _require_idle(office, out)
        if (out / "config.toml").exists():
            write_config(config, out)  # refuses another configuration before anything is loaded
        adapted = open_model(config)
        write_config(config, out)
        instance = _initial(adapted, out)
        for remark in adapted.model.remarks:
            observe({"event": "remark", "text": remark})
        with _resumable(out):
            _follow(office, _given(config, up, state, out, instance), state, out, observe)
    return adapted


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say of a coordinator that does not come back how the run goes on once it does."""
    try:
        yield
    except DeployError as error:
        if error.mend != START:
            raise
        mend = f"{START}; then go on: molehill server run --resume --out {out}"
        raise DeployError(f"{error.what} for {_AWAY:.0f} s", where=error.where, mend=mend) from None


def _require_idle(office: Office, out: Path) -> None:
    job = office.job()
    if job is not None and job.out != str(out.resolve()):
        status = office.status(job.number)
        if status is not None and status.unfinished:
            mend = "Wait for it, or stop it: molehill server stop --run"
            raise DeployError("the coordinator works on another run", where=job.out, mend=mend)
    if (job is None or job.out != str(out.resolve())) and locks.held(out):
        raise elsewhere(out)  # a simulation, or the run of another coordinator
    office.stop_others(_AWAY)


def _given(config: Config, up: Running, state: Path, out: Path, instance: str) -> dict[str, str | int]:
    """What the server process is told."""
    folder = exchange_folder(state.resolve())
    introduction = {"config": config.to_toml(), "exchange_port": up.exchange_port, "version": __version__}
    introduction["instance"] = instance
    return {
        "config": str(out.resolve() / "config.toml"),
        "out": str(out.resolve()),
        "exchange": up.blobs,
        "grants": str(folder / "grants"),
        "introduction": json.dumps(introduction),
        "clients": config.data.clients,
    }


def _follow(office: Office, given: dict[str, str | int], state: Path, out: Path, observe: Observer) -> None:
    """Start the server process, start it again when it was killed, and pass its events on."""
    error = out / "error.json"
    events = _tail(out / "metrics.jsonl")
    next(events)  # what is there was told before
    status: RunStatus | None = None
    last = 0  # of the server processes the last with which anything happened
    for count in range(1, _CRASHES + 1):

        def seen(event: Mapping[str, Any], count: int = count) -> None:
            nonlocal last
            last = count
            observe(event)

        job = office.job()
        under_way = job is not None and not job.stopped and office.status(job.number, _AWAY)
        if job is None or not under_way or not under_way.unfinished or job.out != given["out"]:
            error.unlink(missing_ok=True)
            job = office.start(given, out, _AWAY)
        try:
            status = _wait(office, job.number, state, out, events, seen)
        except KeyboardInterrupt:
            office.stop()
            raise
        for event in next(events):
            seen(event)
        if error.exists():
            raise _said(error)
        if status is not None and status.outcome == "completed":
            return
        _require_wanted(office, out)
        if count - last == _VAIN:
            raise _unable(state)
    details = status.details if status and status.details else "Flower does not know why"
    what = f"the server process ended {_CRASHES} times, last: {details}"
    raise DeployError(what, where=str(state / "logs" / "superexec.log"), mend=_MEND)


def _require_wanted(office: Office, out: Path) -> None:
    noted = office.job()
    if noted is not None and noted.stopped:
        raise DeployError("the run was stopped", where=str(out), mend="Go on with: molehill server run --resume")


def _unable(state: Path) -> DeployError:
    last = complaint(state.resolve(), _PROCESS)
    what = f"{_PROCESS} ended {_VAIN} times before anything had begun: {last}"
    return DeployError(what, where=str(state / "logs" / "superexec.log"), mend=_MEND)


def _said(path: Path) -> errors.MolehillError:
    """The error with which the server process ended."""
    try:
        return errors.from_dict(files.parse_json(path.read_bytes()))
    except (ValueError, KeyError, TypeError):
        return DeployError("the server process ended, and what it said is damaged", where=str(path), mend=_MEND)


def _wait(
    office: Office, number: int, state: Path, out: Path, events: Iterator[list[dict[str, Any]]], observe: Observer
) -> RunStatus | None:
    """Pass events on until the run has ended.

    Flower notices only after a minute that a server process was killed; its lock on the folder tells at once, and
    before there is one the list of processes.
    """
    seen = gone = 0  # looks at which the server process was there, and in a row at which it was not
    late = time.monotonic() + _START
    while True:
        status = office.status(number, _AWAY)
        for event in next(events):
            observe(event)
        if status is None or not status.unfinished:
            return status
        there = locks.held(out)
        seen += there
        gone = 0 if there or (not seen and _begins(state.resolve())) else gone + 1
        if not seen and time.monotonic() > late:
            office.call(lambda control: control.stop(number), _AWAY)
            raise DeployError(f"no server process has started within {_START:.0f} s", where=str(state), mend=_MEND)
        if gone > (_GONE if seen else _NONE):
            office.call(lambda control: control.stop(number), _AWAY)
            return office.status(number, _AWAY)
        time.sleep(_POLL)


def _begins(state: Path) -> bool:
    """Whether a server process may be there, or may come yet."""
    return works(state, _PROCESS) is not False or not works(state, "flower-superexec")


def _tail(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the events that were written since the last time.

    A run that goes on cuts off the end of the file, at a mark, and writes on from there; by the next look the file may
    be longer than it was. So what is new is what follows the lines that are still those that were read.
    """
    known = _lines(path)
    while True:
        lines = _lines(path)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(known, lines, strict=False)))
        found = []
        with contextlib.suppress(ValueError):  # it is being cut this moment: the rest comes at the next look
            for line in lines[same:]:
                found.append(files.parse_json(line))  # noqa: PERF401 - those before a line that fails are kept
        known = lines[: same + len(found)]
        yield found


def _lines(path: Path) -> list[bytes]:
    """All whole lines of a file; none when it is not there."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def _initial(adapted: Adapted, out: Path) -> str:
    """Write the adapter that everybody starts from, or check that the folder's belongs to this base.

    Returns:
        What tells this run from others of its name.

    Raises:
        ResumeError: It belongs to another one, or is gone from a run that has begun: machines would take a new one for
            that of another run, and give up what they kept.
    """
    path = out / "initial.safetensors"
    if not path.exists():
        if any((out / "checkpoints").glob("round-*")):
            mend = "Restore it from a copy, or begin a new run in another --out."
            raise ResumeError("it is gone, and the run has begun from it", where=str(path), mend=mend)
        initial = adapted.model.tree(lambda key: not key.residual)
        save_tree(path, initial, {"base": adapted.base.digest, "instance": secrets.token_hex(8)})
    _, meta = load_tree(path)
    require_base(meta, adapted.base, out)
    return meta.get("instance", "")
