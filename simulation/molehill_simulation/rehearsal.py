"""A few steps of a run's own training before there is a run: nothing is sent, and nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from molehill.config import Config
from molehill.plan import Scope, scope_of
from molehill.tasks.adapted import Adapted
from molehill.tasks.batches import Batch, Example
from molehill.tasks.lengths import Examples
from molehill.wire.keys import Key
from molehill.wire.local import MemoryExchange
from molehill_client.participant import Participant
from molehill_client.state import StateStore
from molehill_client.together import fit, may_share, stacked
from molehill_client.workbench import Workbench
from molehill_server.planning.planner import Planner, scopes, seed

Owner = tuple[str, Examples]  # name, and encoded rows to train on


class Actor(Participant):
    """A client that trains on its rows, or on the same few in every step.

    Attributes:
        rows: These few; empty for its batches as they come.
        took: Seconds of every step.
    """

    rows: Sequence[Example] = ()

    def batches(self, rows: Examples, seed: int) -> Iterator[Batch]:
        """See `Participant.batches`."""
        if not self.rows:
            yield from super().batches(rows, seed)
        device = self.bench.model.flat.device
        while True:
            yield self.bench.task.collate(self.rows).to(device)


class Rehearsal:
    """The clients of a run that is not begun, on one bench. Use `rehearsal`.

    Args:
        config: The run, with the task's labels known.
        adapted: Base and adapter; training changes its values.
        folder: For what clients would keep.
    """

    def __init__(self, config: Config, adapted: Adapted, folder: Path) -> None:
        initial = adapted.model.tree(lambda key: not key.residual)
        self._config, self._folder = config, folder
        self._planner = Planner(config, adapted.base.digest)
        self._bench = Workbench(config, adapted.model, adapted.task, adapted.base.digest, initial, MemoryExchange())

    def actors(self, owners: Sequence[Owner]) -> list[Actor]:
        """The clients with these names and rows."""
        run, base = self._config.run.name, self._bench.base_digest
        return [
            Actor(self._bench, name, rows, Examples([], rows.lengths, []), StateStore(self._folder / name, run, base))
            for name, rows in owners
        ]

    def company(self, actors: Sequence[Actor]) -> list[Actor]:
        """Those of them that may be in the same passes as the first."""
        layout = self._bench.model.layout
        plans = [self._planner.plan(actor.name, 1, layout, {}, 0) for actor in actors]
        equal = [i for i, actor in enumerate(actors) if may_share([actors[0], actor], [plans[0], plans[i]])]
        return [actors[i] for i in equal] or list(actors[:1])

    def train(self, actors: Sequence[Actor], steps: int) -> list[float]:
        """Train in the same passes, from the start, as in the first round.

        Returns:
            Seconds of every step.

        Raises:
            TrainingError: A loss is not finite, or there is nothing to predict.
        """
        config, model = self._config, self._bench.model
        patterns = scopes(config, 1)
        times = [time.perf_counter()]

        def scope(key: Key) -> Scope:
            return "frozen" if key.residual else scope_of(patterns, key)

        def observe(step: int, steps: int) -> None:  # noqa: ARG001 - see `Observer`
            times.append(time.perf_counter())

        with stacked(model, len(actors)):
            for number, actor in enumerate(actors):
                model.select(number)
                actor.start_over()
                actor.observe = observe if number == 0 else None
            model.use_personal(gate=False, head=False)
            times[0] = time.perf_counter()
            where = f"client {', '.join(actor.name for actor in actors)}, before the run"
            seeds = [seed(config, 1, actor.name) for actor in actors]
            fit(
                actors, [actor.round_rows for actor in actors], seeds, scope, steps, (0.0, 1 / config.run.rounds), where
            )
        return [end - begin for begin, end in pairwise(times)]


@contextmanager
def rehearsal(config: Config, adapted: Adapted) -> Iterator[Rehearsal]:
    """A rehearsal with a folder for as long as the context is open; see `Rehearsal`."""
    with TemporaryDirectory() as folder:
        yield Rehearsal(config, adapted, Path(folder))
