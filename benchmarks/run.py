"""All measurements of speed in one command: `make benchmarks` fills docs/reference/speed.md.

    python benchmarks/run.py [--only NAME ...] [--quick] [--out FOLDER]

Takes an hour on two cores, and wants the machine for itself. What each measures is said at the top of its file. With
``--quick`` inputs are small, which tells that all of it works and nothing else, and the page stays as it is; the output
of every one is kept in the folder either way.
"""

from __future__ import annotations

import common

# isort: split

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.ticker import LogLocator
from rich.console import Console

from molehill import __version__
from molehill.tasks import kernels

mpl.use("svg")
from matplotlib import pyplot as plt  # once it is known where to draw

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "reference" / "speed.md"


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        name: Its mark in the page.
        command: Script and arguments.
        quick: Further arguments for small inputs.
        plot: Title, label of the horizontal and of the vertical axis; the script then prints JSON, values by way by
            count.
        per: Whether a plotted value is shared by the count.
    """

    name: str
    command: tuple[str, ...]
    quick: tuple[str, ...] = ()
    plot: tuple[str, str, str] | None = None
    per: bool = False


PARTS = (
    Part("step", ("train_step.py",), ("--quick",)),
    Part("parts", ("train_step.py", "--parts", "--reps", "5"), ("--quick",)),
    Part("presets", ("train_step.py", "--preset", "all", "--model", "minilm", "--reps", "5"), ("--quick",)),
    Part(
        "experts", ("experts.py", "--json"), ("--counts", "2", "4", "--reps", "1"),
        ("A training step of MiniLM, fp32, one thread", "experts", "ms of processor time"),
    ),
    Part("simulation", ("simulation.py", "--reps", "3"), ("--quick", "--reps", "1")),
    Part(
        "clients", ("clients.py", "--json"), ("--counts", "2", "4", "--reps", "1"),
        ("A round of a trivial model", "clients", "ms a client"), per=True,
    ),
    Part("grid", ("grid.py",), ("memory",)),
    Part("memory", ("grid.py", "memory")),
    Part("many", ("many_clients.py",), ("--counts", "4", "8", "--rounds", "1")),
    Part("aggregation", ("aggregation.py",), ("--quick",)),
    Part("exchange", ("exchange.py", "speed"), ("--mb", "4", "--rounds", "1")),
)  # fmt: skip


def processor() -> str:
    """What was measured on."""
    able = torch.backends.cpu.get_cpu_capability()
    cores = os.cpu_count()
    name = kernels.processor() or platform.machine()
    return f"{name} ({able}), {cores} cores; Molehill {__version__}, torch {torch.__version__}, {platform.system()}"


def run(part: Part, out: Path, *, quick: bool) -> str:
    """Measure and return what the page is to show."""
    command = [sys.executable, str(HERE / part.command[0]), *part.command[1:], *(part.quick if quick else ())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    (out / f"{part.name}.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    shown = f"`python benchmarks/{' '.join(part.command)}` on {processor()}"
    if part.plot is None:
        printed = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        return f"{shown}\n\n```measured\n{printed}\n```"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    ways = list(next(iter(found.values())))
    divisors = {count: int(count) if part.per else 1 for count in found}
    values = {way: [found[count][way] / divisors[count] for count in found] for way in ways}
    drawing = (out if quick else PAGE.parent) / f"speed-{part.name}.svg"
    draw(part, [int(count) for count in found], values, drawing)
    rows = [[count, *(f"{values[way][at]:.3g}" for way in ways)] for at, count in enumerate(found)]
    title, across, up = part.plot
    return f"{shown}\n\n![{title}]({drawing.name})\n\n{common.markdown([f'{across}; {up}', *ways], rows)}"


def draw(part: Part, counts: list[int], values: dict[str, list[float]], path: Path) -> None:
    """A line for every way, on logarithmic axes."""
    assert part.plot is not None
    title, across, up = part.plot
    mpl.rcParams["svg.hashsalt"] = part.name  # the same figures give the same file
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way, heights in values.items():
        axes.plot(counts, heights, marker="o", label=way, linewidth=2.5 if way.startswith("molehill") else 1.2)
    axes.set(title=title, xlabel=across, ylabel=up, xscale="log", yscale="log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure, and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="some of them")
    parser.add_argument("--quick", action="store_true", help="small inputs; the page stays as it is")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if not given.only or part.name in given.only:
            Console(stderr=True).print(f"{part.name} ...")
            text = run(part, given.out, quick=given.quick)
            if not given.quick:
                common.fill(PAGE, part.name, text)


if __name__ == "__main__":
    main()
