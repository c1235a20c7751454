"""Scores of the model as it is, over rows and row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from molehill.molora import probes
from molehill.molora.interfaces import Diagnostic
from molehill.molora.passes import start_of
from molehill.tasks.batches import Batch, eval_batches, eval_order
from molehill.tasks.outcomes import Outcomes
from molehill.tasks.task import Example, Tally
from molehill_client.workbench import Workbench


@torch.no_grad()
def score(bench: Workbench, rows: Sequence[Example], looked: Mapping[str, Diagnostic] | None = None) -> Tally:
    """Score the model as it is on some rows, which diagnostics may look at."""
    looked = looked or {}
    model = bench.model
    model.eval()
    total = bench.tally()
    with probes.looking(model, looked):
        for batch in batches_of(bench, rows):
            forward = model(batch.input_ids, batch.attention_mask, batch.labels, batch.told)
            total.add(forward)
            for probe in looked.values():
                probe.update(forward.records)
    total.scores()  # or an error
    return total


def batches_of(bench: Workbench, rows: Sequence[Example]) -> Iterator[Batch]:
    """All rows once, on the model's device."""
    model, most = bench.model, bench.config.evaluate.batch_size
    return (batch.to(model.flat.device) for batch in eval_batches(rows, most, bench.task, start_of(model)))


def by_row(bench: Workbench, rows: Sequence[Example], total: Tally) -> Outcomes:
    """What each of some rows was scored, in their order.

    Args:
        bench: As for `score`.
        rows: The rows.
        total: What `score` gave of them.
    """
    return total.outcomes().placed([row for batch in placed(bench, rows) for row in batch])


def placed(bench: Workbench, rows: Sequence[Example]) -> list[list[int]]:
    """Places of the rows of every batch of `batches_of`."""
    lengths = [len(row.input_ids) for row in rows]
    return eval_order(lengths, bench.config.evaluate.batch_size, start_of(bench.model))
