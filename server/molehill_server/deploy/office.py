"""The run that a coordinator works on, and how it stands; imports neither torch nor a model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from molehill import files, loopback
from molehill.errors import DeployError
from molehill_server.deploy.control import Control, RunStatus
from molehill_server.deploy.up import running

START = "Start it: molehill server up"

_POLL = 1.0  # seconds between two tries

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """The run that a coordinator works on, in ``run.json`` of its folder.

    Attributes:
        number: Flower's number.
        out: Run folder.
        stopped: Whether it was stopped on purpose.
    """

    number: int
    out: str
    stopped: bool = False


class Office:
    """The runs of a coordinator that is up.

    Args:
        state: Its folder.
        observe: Called with an event when a coordinator is waited for that is away, and when it is back.
    """

    def __init__(self, state: Path, observe: Callable[[Mapping[str, Any]], None] = lambda _: None) -> None:
        self._state = state
        self._observe = observe

    def job(self) -> Job | None:
        """The run that was started last.

        Raises:
            DeployError: The note of it is damaged.
        """
        try:
            return Job(**files.parse_json((self._state / "run.json").read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            mend = "Remove it, and go on with: molehill server run --resume"
            raise DeployError(
                "the note of the run is damaged", where=str(self._state / "run.json"), mend=mend
            ) from None

    def note(self, job: Job) -> None:
        """Write down what is worked on."""
        files.write(self._state / "run.json", json.dumps(asdict(job)).encode(), mode=files.PRIVATE)

    def call(self, what: Callable[[Control], T], patience: float = 0.0) -> T:
        """Ask the SuperLink.

        Args:
            what: The call.
            patience: Seconds to wait for a coordinator that is not up, or is being started again.

        Raises:
            DeployError: It does not answer.
        """
        end = time.monotonic() + patience
        away = False
        while True:
            up = running(self._state)
            try:
                if up is not None:
                    with Control(f"{loopback.LOOPBACK}:{up.superlink}", loopback.pair(self._state).cert) as control:
                        answer = what(control)
                    if away:
                        self._observe({"event": "back"})
                    return answer
                reason = "no coordinator is up"
            except Exception as error:  # noqa: BLE001 - Flower's client has no error class of its own for this
                reason = f"Flower does not answer ({error})"
            if time.monotonic() >= end:
                raise DeployError(reason, where=str(self._state), mend=START)
            if not away:
                away = True
                self._observe({"event": "away", "reason": reason, "state": str(self._state), "patience": patience})
            time.sleep(_POLL)

    def start(self, given: dict[str, str | int], out: Path, patience: float) -> Job:
        """Start a run, once, whatever happens to the SuperLink meanwhile.

        Args:
            given: The run configuration.
            out: Run folder.
            patience: See `call`.
        """
        known = set(self.call(lambda control: control.runs(), patience))

        def once(control: Control) -> int:
            # One that is there now was started by a call whose answer was lost.
            lost = [number for number, run in control.runs().items() if number not in known and run.unfinished]
            return lost[0] if lost else control.start(given)

        job = Job(self.call(once, patience), str(out.resolve()))
        self.note(job)
        return job

    def stop_others(self, patience: float) -> None:
        """Stop runs that nobody follows: whoever started them was killed before it could note them down."""
        job = self.job()

        def stop(control: Control) -> None:
            for number, run in control.runs().items():
                if run.unfinished and (job is None or job.number != number):
                    control.stop(number)

        self.call(stop, patience)

    def status(self, number: int, patience: float = 0.0) -> RunStatus | None:
        """How a run stands; None when it is not known, since the coordinator's folder is a new one."""
        return self.call(lambda control: control.runs().get(number), patience)

    def stop(self) -> Job | None:
        """Stop the run that is under way; returns it."""
        job = self.job()
        if job is None or (status := self.status(job.number)) is None or status.status == "finished":
            return None
        self.note(Job(job.number, job.out, stopped=True))
        self.call(lambda control: control.stop(job.number))
        return job
