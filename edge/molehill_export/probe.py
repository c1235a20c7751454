"""Diagnostics of a finished run or an adapter, on rows of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from molehill import registry
from molehill.config import MethodRef
from molehill.errors import ConfigError, DataError
from molehill.molora import probes
from molehill.molora.passes import start_of
from molehill.tasks.batches import eval_batches
from molehill.tasks.kind import make_task
from molehill_export.rows import labelled
from molehill_simulation.source import GLOBAL, Source

_BATCH = 32


@dataclass(frozen=True)
class Looked:
    """What diagnostics say.

    Attributes:
        rows: How many rows they saw.
        figures: By name of the diagnostic and ``site/figure``.
    """

    rows: int
    figures: dict[str, dict[str, float]]


def look(source: Source, names: Sequence[str] = (), gate: str = GLOBAL, file: Path | None = None) -> Looked:
    """Look at the routes of an adapter.

    Args:
        source: The run or adapter.
        names: Diagnostics; when empty those of the run's ``evaluate.probes``, or else all there are.
        gate: Whose gate, and of a run whose held-out rows, as for `Source.client`.
        file: Rows to take instead of those of the run.

    Raises:
        ConfigError: A diagnostic does not exist, or the adapter has no router.
        DataError: There are no rows on this machine, or they do not fit.
    """
    refs: Sequence[MethodRef] = [MethodRef(name=name) for name in dict.fromkeys(names)]
    if not refs:
        refs = source.run.evaluate.probes if source.run is not None else ()
    looked = probes.build(refs or [MethodRef(name=method.name) for method in registry.methods("diagnostic")])
    if not source.model.routers:
        raise ConfigError("its adapter has no router to look at", where=source.name)
    rows = labelled(source, gate, file)
    if not rows:
        raise DataError("the rows of the run are not here", where=source.name, mend="Give a file with rows: --rows.")
    with source.gate(gate) as model, probes.looking(model, looked), torch.no_grad():
        model.eval()
        for batch in eval_batches(rows, _BATCH, make_task(source.task, source.tokenizer), start_of(model)):
            forward = model(batch.input_ids, batch.attention_mask, batch.labels, batch.told)
            for probe in looked.values():
                probe.update(forward.records)
    return Looked(len(rows), {name: probe.report() for name, probe in looked.items()})
