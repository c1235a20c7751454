"""What the benchmarks share: where the packages are, alternating measurement, peak memory of a process, and a table.

Two ways to do a thing are compared by running them in turns and taking medians, so that a machine that
gets slower or faster in between does so for both.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# What is measured is this checkout, be it installed or not, here and in processes that are started.
ROOT = Path(__file__).resolve().parent.parent
_PARTS = (".", "protos", "server", "client", "simulation", "edge", "tests/support")
_PATHS = [str((ROOT / part).resolve()) for part in _PARTS]
sys.path[1:1] = _PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*_PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds per call, taken in turns after one turn to warm up.

    The order changes from turn to turn, since who comes after one that took much memory pays for it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            start = clock()
            calls[name]()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def require_command() -> None:
    """End with a sentence where processes are started by a command that only an installation has."""
    if not (Path(sys.executable).parent / "molehill").exists():
        sys.exit("This one starts the command molehill. Install it first: pip install -e '.[dev]'")


def clock_for(threads: int) -> Callable[[], float]:
    """Processor time for one thread, which other programs do not disturb; wall time for several."""
    return time.process_time if threads == 1 else time.perf_counter


def in_own_process(*arguments: str, returning: bool = True) -> str:
    """Run the calling script again with ``arguments`` and return what it prints.

    Args:
        arguments: Of the script.
        returning: The allocator gives large blocks back at once there, so that a peak is what was held and not what it
            kept, which takes time.
    """
    command = [sys.executable, sys.argv[0], *arguments]
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(2**16)} if returning else {})
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def grown_by(call: Callable[[], Any]) -> float:
    """MiB by which this process grows at most while ``call`` runs (Linux)."""
    before = resident("VmRSS")
    reset_peak()
    call()
    return (resident("VmHWM") - before) / 2**20


def resident(field: str, process: int | str = "self") -> int:
    """Bytes of memory that a process has (``VmRSS``) or had at most (``VmHWM``; Linux)."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if field in line) * 1024


def reset_peak() -> None:
    """Let ``VmHWM`` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def fill(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a page."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{start}\n{text}\n\n{end}{after}", encoding="utf-8")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def tell(found: Mapping[int, Mapping[str, float]], title: str, label: str, *, as_json: bool, shared: bool) -> None:
    """Print what every way takes by count, as JSON or as a table.

    Args:
        found: Values by way, by count.
        title: Of the table.
        label: What is counted.
        as_json: Print JSON.
        shared: The table shows a value over its count, since so many share it.
    """
    if as_json:
        print(json.dumps(found))
        return
    ways = list(next(iter(found.values())))
    rows = [[str(n), *(f"{times[way] / (n if shared else 1):.3g}" for way in ways)] for n, times in found.items()]
    show(title, [label, *ways], rows)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; all columns but the first are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 132).print(table)  # a page has room
