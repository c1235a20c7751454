"""What the number of clients costs a whole run: the server's time, the files, and the report.

    python benchmarks/many_clients.py [--counts 200 2000] [--rounds 3]

A tiny random BERT, ten rows a client and one step a round, so that little of a run is training. Each count runs in a
process of its own on one thread; figures are processor time. "Clients" is what runs inside their app, "server" all
else from the first message to the last event, "after it" summary, report and adapter. A column that grows faster than
the clients do is what keeps a federation small.
"""

from __future__ import annotations

from common import in_own_process, show

# Above torch, since common sets the number of threads.
# isort: split

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import tiny_world
import torch

from molehill_server.events import read
from molehill_simulation import conclude, simulate
from molehill_simulation.stage import Stage

ROWS = 10


def run(clients: int, rounds: int) -> dict[str, float]:
    """One run, and what it took."""
    spent: dict[str, float] = {}

    def timed(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return inner(*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - start

        setattr(module, name, call)

    for module, name in (
        (Stage, "perform"),
        (simulate, "run_local"),
        (simulate, "conclude"),
        (conclude, "write_report"),
    ):
        timed(module, name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = tiny_world.save_base(folder / "base", "bert")
        source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(ROWS * clients))
        config = tiny_world.config(
            base,
            source,
            run={"rounds": rounds},
            data={"clients": clients},
            train={"steps": 1, "batch_size": 4},
            personal={"steps": 1},
        )
        out = folder / "run"
        start = time.process_time()
        simulate.simulate(config, out)
        whole = time.process_time() - start
        last = max((out / "checkpoints").glob("round-*"))
        page = out / "report.html"
        return {
            "all": whole,
            "set-up": whole - spent["run_local"] - spent["conclude"],
            "clients": spent["perform"],
            "server": spent["run_local"] - spent["perform"],
            "after it": spent["conclude"],
            "report": spent["write_report"],
            "metrics": (out / "metrics.jsonl").stat().st_size,
            "checkpoint": sum(path.stat().st_size for path in last.rglob("*") if path.is_file()),
            "page": page.stat().st_size,
            "elements": page.read_text().count("<"),
            "events": len(read(out / "metrics.jsonl")),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print("\n" + json.dumps(run(given.counts[0], given.rounds)))
        return
    found = {
        n: json.loads(in_own_process("--one", "--counts", str(n), "--rounds", str(given.rounds)).splitlines()[-1])
        for n in given.counts
    }
    units = {"metrics": 1e3, "checkpoint": 1e3, "page": 1e3, "elements": 1, "events": 1}
    names = {"metrics": "metrics.jsonl, kB", "checkpoint": "checkpoint, kB", "page": "report.html, kB"}
    rows = []
    for what in next(iter(found.values())):
        label = names.get(what, what if what in units else f"{what}, s")
        rows.append([label] + [f"{found[n][what] / units.get(what, 1):.4g}" for n in given.counts])
        if what in {"clients", "server"}:
            each = [f"{1e3 * found[n][what] / n / given.rounds:.3g}" for n in given.counts]
            rows.append([f"{what}, ms per client and round", *each])
    show(f"{given.rounds} rounds", ["clients", *map(str, given.counts)], rows)


if __name__ == "__main__":
    main()
