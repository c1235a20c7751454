"""How long a run will still take, from how long it took so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from molehill.config import Config

_STEP = 3.0  # passes over the rows that a training step costs: forward, and backward for the activations
_SURE = 5.0  # seconds before which nothing is foretold


@dataclass(frozen=True)
class Work:
    """What one client has to do in every stage, in passes over one row.

    Attributes:
        rounds: Rounds of the run.
        train: In one round.
        baseline: For its baselines; 0 when none are asked for.
        evaluate: For its scores with the final model.
    """

    rounds: int
    train: float
    baseline: float
    evaluate: float

    @classmethod
    def of(cls, config: Config) -> Self:
        """The work of a run; rows of unknown number count for nothing."""
        step = _STEP * config.train.batch_size * config.train.accumulation
        train, personal = config.train.steps * step, config.personal.steps * step
        rows, held_out = config.data.rows or 0, config.data.test_rows or 0
        alone = config.run.rounds * train + personal + rows + 2 * held_out
        after = personal + (rows if config.personal.head_residual == "computed" else 0) + 2 * held_out
        tried = [ref.build("candidate").steps(config) * step for ref in config.personal.candidates]
        after += sum(tried) + max(tried, default=0.0)  # and what is chosen is made again
        return cls(config.run.rounds, train, alone if config.evaluate.baselines else 0.0, after)


class Pace:
    """Reckons the time that is left over all stages, so that it does not jump where one stage ends.

    Args:
        work: The run's.
        now: The clock, in seconds.
    """

    def __init__(self, work: Work, now: Callable[[], float] = time.monotonic) -> None:
        self._work = work
        self._now = now
        self._began = now()
        self._clients = 1
        self._first = 0.0  # work that was done before this process began
        self._done = 0.0

    def start(self, clients: int, round_: int) -> None:
        """The run begins, or goes on after a round."""
        self._began, self._clients = self._now(), clients
        self._first = self._done = round_ * clients * self._work.train

    def at(self, stage: str, done: float) -> None:
        """So much of a stage is done: rounds, or clients of a later stage."""
        work, clients = self._work, self._clients
        before = {
            "train": 0.0,
            "baseline": work.rounds * clients * work.train,
            "evaluate": clients * (work.rounds * work.train + work.baseline),
        }
        each = {"train": clients * work.train, "baseline": work.baseline, "evaluate": work.evaluate}
        if stage in before:
            self._done = max(self._done, before[stage] + done * each[stage])

    @property
    def left(self) -> float | None:
        """Seconds left; None while there is nothing to tell it from."""
        spent = self._now() - self._began
        whole = self._clients * (self._work.rounds * self._work.train + self._work.baseline + self._work.evaluate)
        done = self._done - self._first
        if spent < _SURE or done <= 0:
            return None
        return max(0.0, spent / done * (whole - self._done))


def in_words(seconds: float | None) -> str:
    """A time that is left, no finer than it is known: ``25 s left``, ``3 min left``; empty for None."""
    if seconds is None:
        return ""
    if seconds < 55:
        return f"{max(5, 5 * math.ceil(seconds / 5))} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 90 else f"{seconds / 3600:.1f} h left"
