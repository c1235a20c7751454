"""What owners gain: base, alone, FedIT, FedSA and MoLoRA on four tasks, over seeds, with paired intervals.

    python benchmarks/quality.py --tune                 # learning rates, on validation rows that no test ever sees
    python benchmarks/quality.py                        # the study; then writes docs/reference/results.md
    python benchmarks/quality.py --table                # only rewrites the tables from finished runs
    python benchmarks/quality.py --tasks reviews --methods fedit clusters --seeds 2

Every run keeps its folder, so an interrupted study goes on where it stopped. Runs of one seed have the same rows,
steps and, but for FedSA, about the same bytes; whatever has a head of its own has the same kind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, fill, markdown  # finds the packages

# isort: split

import numpy as np
import quality_data as data
from paired import Scores, differences, means
from rich.console import Console

from molehill.config import Config, parse
from molehill_client.state import row_scores_of
from molehill_simulation.simulate import simulate

PAGE = ROOT / "docs" / "reference" / "results.md"
TARGETS = ("query", "value", "intermediate.dense")


@dataclass(frozen=True)
class Task:
    """Rows, and what a run of them is.

    Attributes:
        title: What sets its owners apart.
        rows: Makes the rows.
        sections: Of the configuration.
        measure: What is compared.
    """

    title: str
    rows: Any
    sections: Mapping[str, Any]
    measure: str = "accuracy"


def _owners(clients: int, **partition: Any) -> dict[str, Any]:
    dealt = partition or {"name": "by_column", "column": "owner"}
    sizes = {"rows": 300, "test_rows": 250, "validation_fraction": 0.2, "test_fraction": 0.35}
    return {"clients": clients, "partition": dealt, "columns": {"group": "group"}, **sizes}


TASKS = {
    "reviews": Task("feature shift: four kinds of text", data.reviews, {"data": _owners(8)}),
    "skew": Task(
        "label skew: Dirichlet, alpha 0.4",
        data.skew,
        {"data": _owners(8, name="dirichlet", alpha=0.4, column="label", min_units=60)},
    ),
    "disagreement": Task("three opinions on what labels mean", data.disagreement, {"data": _owners(6)}),
}
EVERYWHERE: Mapping[str, Any] = {
    "run": {"rounds": 6},
    "task": {"max_length": 48},
    "molora": {"targets": TARGETS, "layers": (3, 4, 5), "scope": "layer", "selector": "dense"},
    "train": {"steps": 11, "batch_size": 16, "schedule": "linear", "head_lr": 8e-3, "router_lr": 3e-4},
    "evaluate": {"baselines": False},
    "engine": {"workers": 1},
}
ONE = {"preset": "lora", "rank": 33, "alpha": 66.0, "selector": None, "scope": None}
FOUR = {"experts": 4, "rank": 8, "alpha": 64.0}
CONVEX = {"head": "convex", "steps": 12, "gate_lr": 3e-3}
LEANING = {"scorer": "leaning", "init": "alike"}


@dataclass(frozen=True)
class Method:
    """How a run trains.

    Attributes:
        title: In the tables.
        sections: Of the configuration.
        rates: Learning rates to choose from.
    """

    title: str
    sections: Mapping[str, Any]
    rates: tuple[float, ...] = (2e-3, 4e-3)


CHOSEN = ("fitted_model", "frozen_base", "own_adapter", "trained_alone")
METHODS = {
    "base": Method(
        "the frozen base",
        {
            "run": {"rounds": 1},
            "molora": ONE,
            "train": {"steps": 1},
            "personal": {"gate": "global", "head": "convex", "candidates": ("frozen_base",)},
        },
        (1e-3,),
    ),
    "alone": Method(
        "one LoRA, alone",
        {"molora": ONE, "federation": {"preset": "local"}, "personal": {"gate": "global", "head": "convex"}},
        (1e-3, 2e-3),
    ),
    "fedit": Method(
        "FedIT", {"molora": ONE, "federation": {"preset": "fedit"}, "personal": {"gate": "global", "head": "convex"}}
    ),
    "fedsa": Method(
        "FedSA", {"molora": ONE, "federation": {"preset": "fedsa"}, "personal": {"gate": "global", "head": "convex"}}
    ),
    "dense": Method("MoLoRA, no owner leans", {"molora": FOUR, "personal": CONVEX}),
    "clusters": Method("MoLoRA", {"molora": FOUR | LEANING, "personal": CONVEX, "federation": {"assign": "clusters"}}),
    "chosen": Method(
        "MoLoRA, owners choose",
        {
            "molora": FOUR | LEANING,
            "personal": CONVEX | {"holdout": 0.2, "candidates": CHOSEN},
            "federation": {"assign": "clusters"},
        },
    ),
}
# Chosen with --tune: the best mean accuracy over seeds 0 and 1 on validation rows, of the personalised models.
RATES: Mapping[str, Mapping[str, float]] = {}


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    task: str
    method: str
    seed: int
    rate: float
    split: str = "test"
    more: tuple[str, ...] = field(default=())

    def out(self, folder: Path) -> Path:
        """Its run folder."""
        name = f"{self.task}-{self.method}-{self.seed}-{self.rate:g}"
        return folder / (name if self.split == "test" else f"{name}-{self.split}")

    def config(self, folder: Path) -> Config:
        """Its configuration."""
        task = TASKS[self.task]
        source = data.write(task.rows(), folder / "data" / f"{self.task}.jsonl")
        ours = {
            "run": {"name": f"{self.task}-{self.method}", "seed": self.seed},
            "data": {"source": str(source)},
            "train": {"lr": self.rate},
            "evaluate": {"split": self.split},
        }
        values: dict[str, dict[str, Any]] = {}
        for sections in (EVERYWHERE, task.sections, METHODS[self.method].sections, ours):
            for name, section in sections.items():
                values[name] = {**values.get(name, {}), **section}
        return parse({name: {k: v for k, v in part.items() if v is not None} for name, part in values.items()})


def jobs(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], *, tune: bool) -> Iterator[Job]:
    """All runs, the first seed's first."""
    for seed in seeds:
        for task in tasks:
            for method in methods:
                rates = METHODS[method].rates
                if tune:
                    yield from (Job(task, method, seed, rate, "validation") for rate in rates)
                else:
                    yield Job(task, method, seed, RATES.get(task, {}).get(method, sorted(rates)[len(rates) // 2]))


def run_all(wanted: Sequence[Job], folder: Path, workers: int, tell: Any) -> None:
    """Run what has not finished, each in a process of its own."""
    left = [job for job in wanted if not (job.out(folder) / "summary.json").exists()]

    def one(job: Job) -> str:
        words = [job.task, job.method, str(job.seed), str(job.rate), job.split]
        command = [sys.executable, __file__, "--out", str(folder), "--one", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return f"{job.out(folder).name}{'' if done.returncode == 0 else ': ' + done.stderr[-500:]}"

    for job in left:
        data.write(TASKS[job.task].rows(), folder / "data" / f"{job.task}.jsonl")
    with ThreadPoolExecutor(workers) as pool:
        for number, line in enumerate(pool.map(one, left), start=1):
            tell(f"{number} of {len(left)}: {line}")


def scores(job: Job, folder: Path, stage: str, measure: str) -> Scores:
    """Parts of a measure by seed and owner, with the units of the rows."""
    found = {}
    for client in sorted(path.name for path in (job.out(folder) / "clients").iterdir() if path.is_dir()):
        rows = row_scores_of(job.out(folder), client)
        found[job.seed, client] = (rows.stages[stage].parts[measure], np.asarray(rows.units))
    return found


def choose(
    tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], folder: Path
) -> dict[str, dict[str, float]]:
    """The best rate of every method on the validation rows."""
    best: dict[str, dict[str, float]] = {}
    for task in tasks:
        for method in methods:
            by_rate = {}
            for rate in METHODS[method].rates:
                found: Scores = {}
                for seed in seeds:
                    job = Job(task, method, seed, rate, "validation")
                    found |= scores(job, folder, "personalised", TASKS[task].measure)
                by_rate[rate] = means(found)[0]
            best.setdefault(task, {})[method] = max(by_rate, key=lambda rate: by_rate[rate])
    return best


def table(task: str, methods: Sequence[str], seeds: Sequence[int], folder: Path) -> list[list[str]]:
    """Rows of one task's table."""
    wanted = {job.method: [] for job in jobs([task], methods, seeds, tune=False)}  # type: dict[str, list[Job]]
    for job in jobs([task], methods, seeds, tune=False):
        wanted[job.method].append(job)
    measure = TASKS[task].measure

    def of(method: str, stage: str, what: str) -> Scores:
        return {key: value for job in wanted[method] for key, value in scores(job, folder, stage, what).items()}

    rows = []
    alone = of("alone", "personalised", measure) if "alone" in methods else None
    fedit = of("fedit", "personalised", measure) if "fedit" in methods else None
    for method in methods:
        stages = ["personalised"] if method == "alone" else ["global", "personalised"]
        for stage in stages:
            found = of(method, stage, measure)
            mean, worst = means(found)
            f1, worst_f1 = means(of(method, stage, "macro_f1"))
            summaries = [
                json.loads((job.out(folder) / "summary.json").read_text(encoding="utf-8")) for job in wanted[method]
            ]
            up = float(np.mean([summary["bytes_up"] for summary in summaries])) / 1e6
            name = METHODS[method].title if method == "alone" else f"{METHODS[method].title}, {stage}"
            rows.append([
                name, f"{mean:.3f}", f"{worst:.3f}", f"{f1:.3f}", f"{worst_f1:.3f}",
                "" if alone is None or method == "alone" else _difference(found, alone),
                "" if fedit is None or (method, stage) == ("fedit", "personalised") else _difference(found, fedit),
                f"{0.0 if method == 'alone' else up:.1f}",
            ])  # fmt: skip
    return rows


def _difference(ours: Scores, theirs: Scores) -> str:
    mean, low, high, worst = differences(ours, theirs)
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), worst {100 * worst:+.1f}"


HEAD = [
    "",
    "accuracy",
    "worst owner",
    "macro-F1",
    "worst owner",
    "points over alone",
    "points over FedIT with a head",
    "MB up",
]


def main() -> None:
    """Parse the command line and run."""
    echo = Console(width=200).print
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--tune", action="store_true", help="choose learning rates on validation rows, seeds 0 and 1")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        task, method, seed, rate, split = arguments.one
        job = Job(task, method, int(seed), float(rate), split)
        simulate(job.config(arguments.out), job.out(arguments.out))
        return
    seeds = range(2) if arguments.tune else range(2, 2 + arguments.seeds)
    wanted = list(jobs(arguments.tasks, arguments.methods, seeds, tune=arguments.tune))
    if not arguments.table:
        run_all(wanted, arguments.out, arguments.jobs, echo)
    if arguments.tune:
        echo(json.dumps(choose(arguments.tasks, arguments.methods, seeds, arguments.out), indent=1))
        return
    parts = []
    for task in arguments.tasks:
        rows = table(task, arguments.methods, seeds, arguments.out)
        parts.append(f"**{task}** ({TASKS[task].title})\n\n{markdown(HEAD, rows)}")
    echo("\n\n".join(parts))
    if {*arguments.tasks} == {*TASKS} and {*arguments.methods} == {*METHODS}:
        fill(PAGE, "quality", "\n\n".join(parts))


if __name__ == "__main__":
    main()
