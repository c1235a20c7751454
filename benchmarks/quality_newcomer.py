"""What an owner gains that comes after the last round: the quality study's default without it, then its own rows.

    python benchmarks/quality_newcomer.py                      # one owner of every kind, two tasks
    python benchmarks/quality_newcomer.py --tasks reviews --out runs/quality
    python benchmarks/quality_newcomer.py --table              # of what has finished

Every run leaves one owner out; `molehill personalise` then makes its model of the final one and of its own rows.
Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import markdown  # finds the packages

# isort: split

import quality_data as data
from quality import RATES, TASKS, Job
from rich.console import Console

from molehill_simulation.newcomer import personalise
from molehill_simulation.simulate import simulate

OWNERS = {
    "reviews": ("amazon-1", "movie-1", "nyt-1", "tweets-1"),
    "disagreement": ("polarity-1", "strict-1", "strength-1"),
}
HEAD = ["owner", "the frozen base", "shared model", "its own", "points over the shared model", "what it chose"]


@dataclass(frozen=True)
class Absent:
    """An owner that the run does not have."""

    task: str
    owner: str
    seed: int

    @property
    def name(self) -> str:
        """Of the run folder."""
        return f"{self.task}-without-{self.owner}-{self.seed}"

    def found(self, folder: Path) -> Path:
        """What came of it."""
        return folder / f"{self.name}-{self.owner}.json"

    def run(self, folder: Path) -> None:
        """Train without it, then let it come."""
        apart = {
            mine: data.write(
                (row for row in TASKS[self.task].rows() if (row["owner"] == self.owner) == mine),
                folder / "data" / f"{self.task}-{'only' if mine else 'without'}-{self.owner}.jsonl",
            )
            for mine in (False, True)
        }
        config = Job(self.task, "clusters", self.seed, RATES[self.task]["clusters"]).config(folder)
        dealt = config.data.model_copy(update={"source": str(apart[False]), "clients": config.data.clients - 1})
        out = folder / self.name
        if not (out / "summary.json").exists():
            simulate(config.model_copy(update={"data": dealt}), out)
        shutil.rmtree(folder / f"{self.name}-late", ignore_errors=True)  # of a call that was broken off
        made = personalise(out, apart[True], "late", folder / f"{self.name}-late")
        self.found(folder).write_text(json.dumps(made.as_dict()), encoding="utf-8")


def row(absent: Absent, folder: Path) -> list[str]:
    """Of the table."""
    made = json.loads(absent.found(folder).read_text(encoding="utf-8"))
    stages = (made["stages"][stage]["accuracy"] for stage in ("base", "global", "personalised"))
    figure = made["gains"]["accuracy"]
    gain, low, high = (100 * value for value in (figure["value"], *figure["interval"]))
    told = f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"
    return [f"{absent.owner} ({absent.task})", *(f"{value:.3f}" for value in stages), told, made["chosen"]]


def wanted(tasks: list[str], seed: int) -> Iterator[Absent]:
    """One owner of every kind."""
    yield from (Absent(task, owner, seed) for task in tasks for owner in OWNERS[task])


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--tasks", nargs="+", choices=OWNERS, default=list(OWNERS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    rows = []
    for absent in wanted(arguments.tasks, arguments.seed):
        if not absent.found(arguments.out).exists():
            if arguments.table:
                continue
            absent.run(arguments.out)
        rows.append(row(absent, arguments.out))
    Console(width=200).print(markdown(HEAD, rows))


if __name__ == "__main__":
    main()
