"""``molehill edge bench``: how long a bundle takes on this device, and how much memory."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from molehill.terminal import Json, explained, print_json, show_table
from molehill_edge.commands.opening import (
    GateOption,
    Insecure,
    Memory,
    Name,
    Spin,
    StoreFolder,
    Threads,
    opened,
    who,
)  # fmt: skip


def bench(
    name: Name,
    gate: GateOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=10000, help="How often each thing is done.")] = 10,
    threads: Threads = None,
    spin: Spin = None,
    memory_mb: Memory = None,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle on this device: opening, memory, texts or tokens, and swapping a gate."""
    with explained(as_json):
        begin = time.perf_counter()
        with opened(
            name, insecure=insecure_local, store=store, threads=threads, spin=spin, memory_mb=memory_mb, gate=gate
        ) as bundle:
            took = time.perf_counter() - begin
            from molehill_edge import bench as benches

            after_open = benches.memory()
            figures = benches.measure(bundle, rounds=rounds)
            used = benches.memory()
            files = sum(file.length for file in bundle.manifest.files) / (1 << 20)
            name_of, pool = who(bundle), bundle.pool
        if as_json:
            print_json(
                {
                    "bundle": name_of,
                    "threads": dataclasses.asdict(pool),
                    "open_seconds": took,
                    "files_mib": files,
                    "memory_mib_after_open": after_open,
                    "memory_mib": used,
                    "rounds": rounds,
                    "figures": [dataclasses.asdict(figure) for figure in figures],
                }
            )
            return
        table = Table(box=SIMPLE_HEAD)
        for column in ("", "median", "quartiles", "unit"):
            table.add_column(column, justify="right" if column in {"median", "quartiles"} else "left")
        chosen = f"{pool.threads}, {'spinning' if pool.spin else 'sleeping'}"
        table.add_row("threads", chosen, "", "measured" if pool.measured else "")
        table.add_row("open, with imports", f"{1e3 * took:.0f}", "", "ms")
        table.add_row("files", f"{files:.1f}", "", "MiB")
        for key, value in used.items():
            table.add_row(f"memory, {key}", f"{value:.0f}", "", "MiB")
        for figure in figures:
            table.add_row(figure.name, f"{figure.median:.4g}", f"{figure.low:.4g} - {figure.high:.4g}", figure.unit)
        show_table(table)
