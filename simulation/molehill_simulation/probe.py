"""How long a run takes, from a few steps that were really trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch

from molehill.config import Config
from molehill.tasks.adapted import Adapted
from molehill.words import counted
from molehill_server.check.conflict import asked
from molehill_simulation.engine import cores
from molehill_simulation.pace import Work
from molehill_simulation.rehearsal import Actor, Owner, Rehearsal, rehearsal
from molehill_simulation.summary import Machine
from molehill_simulation.text import clean, duration


@dataclass(frozen=True)
class Estimate:
    """The time of a run, in seconds.

    Attributes:
        step: Of one step of one client, its part of the passes it shares.
        steps: That were trained to tell.
        clients: Who trained them, in the same passes.
        rounds: Of the run.
        asked: Clients of a round.
        each: Steps of a client in a round.
        processes: That work at once.
        training: Of all rounds.
        whole: With baselines and scores.
    """

    step: float
    steps: int
    clients: tuple[str, ...]
    rounds: int
    asked: int
    each: int
    processes: int
    training: float
    whole: float

    @property
    def words(self) -> Iterator[tuple[str, str]]:
        """Labelled facts."""
        sum_ = f"{counted(self.rounds, 'round')} x {counted(self.asked, 'client')} x {counted(self.each, 'step')}"
        by = f" / {counted(self.processes, 'process')}" if self.processes > 1 else ""
        whole = f"about {duration(self.whole)} with baselines and scores"
        yield "time", f"about {duration(self.training)} of training: {sum_} x {self.step:.3g} s{by}; {whole}"
        who = ", ".join(clean(name, 40) for name in self.clients)
        alone = ", in one process: others beside it may slow it down" if self.processes > 1 else ""
        left = "not counted: to start, to merge, to write answers"
        yield "measured", f"{counted(self.steps, 'step')} of {who}{alone}; {left}"

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return asdict(self)


def estimate(
    config: Config, adapted: Adapted, machine: Machine, owners: Sequence[Owner], held_out: Sequence[int], steps: int
) -> Estimate:
    """Train some steps as the run would, and work out from them how long it takes.

    Args:
        config: The run, with the task's labels known.
        adapted: Base and adapter; its values are others afterwards.
        machine: How this machine computes it.
        owners: Names of the clients with their encoded training rows.
        held_out: Rows that each is scored on.
        steps: To train.

    Raises:
        TrainingError: A loss is not finite, or there is nothing to predict.
    """
    with rehearsal(config, adapted) as stage, _threads(machine.workers):
        actors = _typical(stage, owners, machine.together)
        took = stage.train(actors, steps)
    one = median(took[1:] or took) / len(actors)  # the first step also prepares
    count = asked(config)
    processes = max(1, min(machine.workers, -(-count // len(actors))))
    training = config.run.rounds * count * config.train.steps * one / processes
    rows = {"rows": round(fmean(len(rows) for _, rows in owners)), "test_rows": round(fmean(held_out))}
    work = Work.of(config.model_copy(update={"data": config.data.model_copy(update=rows)}))
    beside = len(owners) * (work.baseline + work.evaluate) * config.train.steps * one / work.train
    return Estimate(
        step=one,
        steps=steps,
        clients=tuple(actor.name for actor in actors),
        rounds=config.run.rounds,
        asked=count,
        each=config.train.steps,
        processes=processes,
        training=training,
        whole=training + beside / max(1, min(machine.workers, len(owners))),
    )


def _typical(stage: Rehearsal, owners: Sequence[Owner], together: int) -> list[Actor]:
    """So many clients that may be in the same passes, those whose rows are nearest to the usual length."""
    means = [fmean(len(row.input_ids) for row in rows) for _, rows in owners]
    usual = median(means)
    near = sorted(range(len(owners)), key=lambda i: abs(means[i] - usual))
    actors = stage.actors([owners[i] for i in near])
    return stage.company(actors)[:together]


@contextmanager
def _threads(workers: int) -> Iterator[None]:
    """Compute with as many threads as one of so many processes has."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(max(1, cores() // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
