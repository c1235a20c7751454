"""``molehill edge personalise``: a gate that is fitted to texts of this device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molehill.errors import DataError
from molehill.rowfiles import pairs
from molehill.rowfiles.reading import read_texts
from molehill.rowfiles.values import Record
from molehill.terminal import Json, explained, print_json
from molehill_edge.commands.opening import GateOption, Insecure, Memory, Name, Spin, StoreFolder, Threads, opened, who

if TYPE_CHECKING:
    from molehill.outputs import About, Reading
    from molehill_edge.personalise import Outcome


def personalise(
    name: Name,
    rows: Annotated[
        Path,
        typer.Option(
            "--rows",
            metavar="FILE",
            help='JSON lines, JSON, CSV, TSV or Parquet with "text" and, unless the bundle writes, what it should say '
            'of it ("label" or "labels"), which only classes can do without; or one text a line.',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The gate file to write, for --gate.", show_default=False)
    ],
    gate: GateOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the search.")] = 0,
    budget: Annotated[int, typer.Option(min=1, help="How many times the texts may be read.")] = 80,
    threads: Threads = None,
    spin: Spin = None,
    memory_mb: Memory = None,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Fit which experts are chosen to a few texts of yours; nothing leaves this device.

    About a third of the texts is held out, and says whether the result is kept.
    """
    with explained(as_json):
        read = list(read_texts(rows))
        with opened(
            name, insecure=insecure_local, store=store, threads=threads, spin=spin, memory_mb=memory_mb, gate=gate
        ) as bundle:
            from molehill_edge import gates
            from molehill_edge.manifest import about, reading

            labels = _labels(read, reading(bundle.manifest.task), about(bundle.manifest.task))
            texts = [pairs.of_row(row, where) for where, row in read]
            found = bundle.personalise(texts, labels, seed=seed, budget=budget)

            gates.write(out, found.gate, bundle.manifest)
            told = {"bundle": who(bundle), "gate": str(out)}
        if as_json:
            figures = {key: value for key, value in dataclasses.asdict(found).items() if key != "gate"}
            print_json({**told, **figures})
        else:
            _show_outcome(found, out)


def _labels(rows: Sequence[Record], reading: Reading, about: About) -> list[Any] | None:
    """The labels of rows, each of which fits the bundle; None where there are none.

    Raises:
        DataError: Some rows have one and others not, or one is none of the bundle's kind.
    """
    found = [row.get(reading.column) for _, row in rows]
    bare = [where for (where, _), label in zip(rows, found, strict=True) if label is None]
    if len(bare) == len(rows):
        return None
    if bare:
        raise DataError("some rows have a label, and this one has none", where=bare[0], mend="Give all of them one.")
    for (where, _), label in zip(rows, found, strict=True):
        reading.target(label, about, where)  # which names the row
    return found


def _show_outcome(found: Outcome, out: Path) -> None:
    typer.echo(f"fitted to {found.fitted} texts, judged on {found.held_out} others, {found.evaluations} readings")
    typer.echo(f"loss      {found.before.loss:8.4f} -> {found.after.loss:8.4f}")
    if found.before.accuracy is not None and found.after.accuracy is not None:
        typer.echo(f"accuracy  {found.before.accuracy:8.1%} -> {found.after.accuracy:8.1%}")
    if found.dropped:
        typer.echo(f"never chosen: {', '.join(found.dropped)}")
    what = "the fitted gate" if found.kept else "no gain on the texts held out: the gate as it was"
    typer.echo(f"{out}: {what}")
