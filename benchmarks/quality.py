"""What owners gain: base, alone, FedIT, FedSA and MoLoRA on four tasks, over seeds, with paired intervals.

    python benchmarks/quality.py --tune                 # learning rates, on validation rows that no test ever sees
    python benchmarks/quality.py                        # the study; then writes docs/reference/results.md
    python benchmarks/quality.py --table                # only rewrites the tables from finished runs
    python benchmarks/quality.py --tasks reviews --methods fedit clusters --seeds 2

Every run keeps its folder, so an interrupted study goes on where it stopped. Runs of one seed have the same rows,
steps and, but for FedSA, about the same bytes. The personalised heads of all but FedSA, which trains them in the
rounds, are of the same kind.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from common import ROOT, fill, markdown  # finds the packages

# isort: split

import numpy as np
import quality_data as data
from paired import Difference, Scores, differences, means
from quality_base import build
from rich.console import Console

from molehill.config import Config, parse
from molehill.tasks.answers import exact
from molehill.tasks.measures import LOSS
from molehill.tasks.outcomes import Parts
from molehill.words import counted
from molehill_client.state import store_in
from molehill_simulation.simulate import simulate

PAGE = ROOT / "docs" / "reference" / "results.md"
SEEDS = 5
FEW = (25, 50, 100)
EXACT = "exact_match"
TARGETS = ("query", "value", "intermediate.dense")


@dataclass(frozen=True)
class Task:
    """Rows, and what a run of them is.

    Attributes:
        title: What sets its owners apart.
        rows: Makes the rows.
        sections: Of the configuration.
        measures: What is compared: the first by differences, too.
        answers: Whether models write answers.
        same_owners: Whether an owner is the same with every seed.
        methods: Those that it is for; all when empty.
        rates: Learning rates to choose from, where these are not the methods'.
        seeds: The study's first so many.
    """

    title: str
    rows: Callable[[], Iterator[data.Row]]
    sections: Mapping[str, Any]
    measures: tuple[str, str] = ("accuracy", "macro_f1")
    answers: bool = False
    same_owners: bool = True
    methods: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    seeds: int = SEEDS

    def has(self, method: str) -> bool:
        """Whether it is for that method."""
        return not self.methods or method in self.methods


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
        same_owners=False,
    ),
    "disagreement": Task("three opinions on what labels mean", data.disagreement, {"data": _owners(6)}),
    "answers": Task(
        "a causal model, feature shift",
        data.answers,
        {
            "data": _owners(8),
            "task": {"kind": "causal-lm", "max_length": 64},
            "molora": {"targets": ("q_proj", "v_proj", "up_proj"), "layers": None},
            "evaluate": {"generate": 250},
        },
        (EXACT, LOSS.name),
        answers=True,
        methods=("base", "alone", "fedit", "clusters"),
        rates=(2e-3, 4e-3, 8e-3),
        seeds=2,
    ),
    **{
        f"rows{few}": Task(
            f"feature shift, at most {few} training rows an owner",
            data.reviews,
            {"data": _owners(8) | {"rows": few}},
            methods=("base", "alone", "fedit", "clusters"),
            seeds=1,
        )
        for few in FEW
    },
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
WHERE = {"targets": TARGETS, "layers": (3, 4, 5), "scope": None, "selector": None}


@dataclass(frozen=True)
class Method:
    """How a run trains.

    Attributes:
        title: In the tables.
        sections: Of the configuration, for a learning rate.
        shares: Whether owners share anything.
        as_of: The method whose rate it takes, where it does not choose.
        rates: Learning rates to choose from.
        seeds: The study's first so many.
    """

    title: str
    sections: Callable[[float], Mapping[str, Any]]
    shares: bool = True
    as_of: str = ""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    seeds: int = SEEDS


STEPS = 66  # of everybody


def _by_themselves(*candidates: Any) -> dict[str, Any]:
    """Owners who share a round of one step, and then make something of their own that has nothing of it."""
    return {
        "run": {"rounds": 1},
        "molora": ONE,
        "train": {"steps": 1},
        "personal": {"gate": "global", "head": "convex", "candidates": candidates},
    }


def _alone(rate: float) -> dict[str, Any]:
    return {"name": "trained_alone", "steps": STEPS, "lr": rate}


def _published(name: str, assign: Any, **molora: Any) -> Callable[[float], dict[str, Any]]:
    """Adapter and federation as published, on our layers and with our head."""
    return lambda _: {
        "molora": WHERE | {"preset": name} | molora,
        "personal": {"gate": "split", "head": "convex"},
        "federation": {"preset": name, "assign": assign},
    }


CHOSEN = ("fitted_model", "frozen_base", "own_adapter", _alone(1e-3))
METHODS = {
    "base": Method("the frozen base", lambda _: _by_themselves("frozen_base"), shares=False, rates=(1e-3,)),
    "alone": Method(
        "one LoRA, alone",
        lambda rate: _by_themselves(_alone(rate)),
        shares=False,
        rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    ),
    "fedit": Method(
        "FedIT",
        lambda _: {"molora": ONE, "federation": {"preset": "fedit"}, "personal": {"gate": "global", "head": "convex"}},
    ),
    "fedsa": Method(
        "FedSA, its own head",
        lambda _: {"molora": ONE, "federation": {"preset": "fedsa"}, "personal": {"gate": "global"}},
        seeds=2,
    ),
    "dense": Method("MoLoRA, no owner leans", lambda _: {"molora": FOUR, "personal": CONVEX}, seeds=2),
    "clusters": Method(
        "MoLoRA", lambda _: {"molora": FOUR | LEANING, "personal": CONVEX, "federation": {"assign": "clusters"}}
    ),
    "chosen": Method(
        "MoLoRA, owners choose",
        lambda _: {
            "molora": FOUR | LEANING,
            "personal": CONVEX | {"holdout": 0.2, "candidates": CHOSEN},
            "federation": {"assign": "clusters"},
        },
        as_of="clusters",
        seeds=1,
    ),
    "fedlease": Method(
        "FedLEASE, our head",
        _published("fedlease", {"name": "lease", "warmup": 2, "most": 4}, rank=8, alpha=32.0),
        seeds=1,
    ),
    "fedamole": Method("FedAMoLE, our head", _published("fedamole", None), seeds=1),
    "fedrouter": Method("FedRouter, our head", _published("fedrouter", None), seeds=1),
}
# Chosen with --tune: the best mean of the personalised models on validation rows, with a seed that no table has.
# Those of the published ones, of FedSA and without leaning are of disagreement, among 2e-3 and 4e-3; owners of few rows
# take what was chosen on reviews among these.
_BEST = {
    "base": 1e-3, "alone": 1e-3, "fedit": 4e-3, "fedsa": 2e-3, "dense": 4e-3, "clusters": 4e-3, "fedlease": 4e-3,
    "fedamole": 2e-3, "fedrouter": 4e-3,
}  # fmt: skip
RATES: Mapping[str, Mapping[str, float]] = {
    **dict.fromkeys(TASKS, _BEST),
    "reviews": _BEST | {"alone": 2e-3, "fedit": 8e-3, "clusters": 4e-3},
    "skew": _BEST | {"alone": 5e-4, "fedit": 2e-3, "clusters": 2e-3},
    "disagreement": _BEST | {"alone": 5e-4, "fedit": 8e-3, "clusters": 4e-3},
    "answers": {"base": 1e-3, "alone": 8e-3, "fedit": 2e-3, "clusters": 4e-3},
}


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

    def done(self, folder: Path) -> bool:
        """Whether it has finished."""
        return (self.out(folder) / "summary.json").exists()

    def config(self, folder: Path) -> Config:
        """Its configuration."""
        task = TASKS[self.task]
        source = source_of(self.task, folder)
        ours: dict[str, dict[str, Any]] = {
            "run": {"name": f"{self.task}-{self.method}", "seed": self.seed},
            "data": {"source": str(source)},
            "train": {"lr": self.rate},
            "evaluate": {"split": self.split},
        }
        values: dict[str, dict[str, Any]] = {}
        method = {name: dict(part) for name, part in METHODS[self.method].sections(self.rate).items()}
        if task.answers:
            method.get("personal", {}).pop("head", None)
            ours["base"] = {"model": str(base_of(folder))}
        for sections in (EVERYWHERE, task.sections, method, ours):
            for name, section in sections.items():
                values[name] = {**values.get(name, {}), **section}
        return parse({name: {k: v for k, v in part.items() if v is not None} for name, part in values.items()})


def source_of(task: str, folder: Path) -> Path:
    """Write the rows of a task, and the base that it needs."""
    known = TASKS[task]
    if known.answers:
        base_of(folder)
    return data.write(known.rows(), folder / "data" / f"{task}.jsonl")


def base_of(folder: Path) -> Path:
    """The causal base, made once."""
    return build(list(data.apart()), folder / "data")


def jobs(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], *, tune: bool) -> Iterator[Job]:
    """All runs, the first seed's first."""
    for seed in seeds:
        for task in tasks:
            for method in methods:
                known = METHODS[method]
                if seed > min(known.seeds, TASKS[task].seeds) or not TASKS[task].has(method):
                    continue
                if not tune:
                    yield Job(task, method, seed, RATES.get(task, {}).get(known.as_of or method, known.rates[0]))
                elif not known.as_of:
                    yield from (
                        Job(task, method, seed, rate, "validation") for rate in TASKS[task].rates or known.rates
                    )


def run_all(wanted: Sequence[Job], folder: Path, workers: int, tell: Any) -> int:
    """Run what has not finished, each in a process of its own; returns how many failed."""
    left = [job for job in wanted if not job.done(folder)]

    def one(job: Job) -> tuple[bool, str]:
        words = [job.task, job.method, str(job.seed), str(job.rate), job.split]
        command = [sys.executable, __file__, "--out", str(folder), "--one", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = "" if done.returncode == 0 else f": {done.stderr[-500:]}"
        return done.returncode != 0, f"{job.out(folder).name}{said}"

    for job in left:
        source_of(job.task, folder)
    with ThreadPoolExecutor(workers) as pool:
        failed = 0
        for number, (bad, line) in enumerate(pool.map(one, left), start=1):
            tell(f"{number} of {len(left)}: {line}")
            failed += bad
    return failed


@cache
def _groups() -> Mapping[str, str]:
    """Documents of questions."""
    return {row["instruction"].strip(): row["group"] for row in data.answers()}


def scores(job: Job, folder: Path, stage: str, measure: str) -> Scores:
    """Parts of a measure by seed and owner, with the units of the rows."""
    found = {}
    groups = _groups() if measure == EXACT else {}
    for client in sorted(path.name for path in (job.out(folder) / "clients").iterdir() if path.is_dir()):
        store = store_in(job.out(folder), client)
        if measure == EXACT:  # of the personalised model alone
            samples = sorted(store.load_findings().samples, key=lambda each: (each.question, each.reference))
            parts = Parts.of_rows([float(exact(each.answer, each.reference)) for each in samples])
            units = [zlib.crc32(groups[each.question].encode()) for each in samples]
            found[job.seed, client] = (parts, np.array(units))
        else:
            rows = store.load_row_scores()
            found[job.seed, client] = (rows.stages[stage].parts[measure], np.asarray(rows.units))
    return found


def choose(
    tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], folder: Path
) -> dict[str, dict[str, float]]:
    """The best rate of every method on the validation rows."""
    best: dict[str, dict[str, float]] = {}
    for task in tasks:
        for method in (name for name in methods if TASKS[task].has(name) and not METHODS[name].as_of):
            by_rate = {}
            for rate in TASKS[task].rates or METHODS[method].rates:
                found: Scores = {}
                for seed in seeds:
                    job = Job(task, method, seed, rate, "validation")
                    found |= scores(job, folder, "personalised", TASKS[task].measures[0])
                by_rate[rate] = means(found)[0]
            best.setdefault(task, {})[method] = max(by_rate, key=lambda rate: by_rate[rate])
    return best


def table(task: str, methods: Sequence[str], seeds: Sequence[int], folder: Path) -> list[list[str]]:
    """Rows of one task's table."""
    wanted: dict[str, list[Job]] = {}
    for job in jobs([task], methods, seeds, tune=False):
        wanted.setdefault(job.method, []).append(job)
    first, second = TASKS[task].measures
    most = max(map(len, wanted.values()))

    def of(method: str, stage: str, what: str = first) -> Scores:
        return {key: value for job in wanted[method] for key, value in scores(job, folder, stage, what).items()}

    def compared(found: Scores, other: str, *, same: bool) -> str:
        if same or other not in methods:
            return ""
        theirs = {key: value for key, value in of(other, "personalised").items() if key in found}
        return _told(differences(found, theirs, same_owners=TASKS[task].same_owners))

    rows = []
    for method in methods:
        known = METHODS[method]
        stages = ["global", "personalised"] if known.shares and not TASKS[task].answers else ["personalised"]
        for stage in stages:
            found = of(method, stage)
            numbers = [*means(found), *_second(of(method, stage, second), second)]
            up = [
                json.loads((job.out(folder) / "summary.json").read_text(encoding="utf-8"))["bytes_up"]
                for job in wanted[method]
            ]
            title = known.title if len(stages) == 1 else f"{known.title}, {stage}"
            rows.append([
                title if len(wanted[method]) == most else f"{title} ({counted(len(wanted[method]), 'seed')})",
                *(f"{number:.3f}" if number < 2 else f"{number:.2f}" for number in numbers),
                compared(found, "alone", same=method == "alone"),
                compared(found, "fedit", same=(method, stage) == ("fedit", "personalised")),
                f"{float(np.mean(up)) / 1e6 if known.shares else 0.0:.1f}",
            ])  # fmt: skip
    return rows


def otherwise(tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], folder: Path) -> list[list[str]]:
    """Rows of the table of what owners of the default would have otherwise: alone, with the base, or with no gate."""
    rows = []
    for task in tasks:
        if not {"clusters", "alone", "base"} <= {*methods} or TASKS[task].answers:
            continue

        def of(method: str, stage: str, task: str = task) -> Scores:
            wanted = jobs([task], [method], seeds, tune=False)
            return {key: value for job in wanted for key, value in scores(job, folder, stage, "accuracy").items()}

        ours = of("clusters", "personalised")
        others = [of("alone", "personalised"), of("base", "personalised"), of("clusters", "global")]
        same = TASKS[task].same_owners
        rows.append([task, *(_told(differences(ours, other, same_owners=same)) for other in others)])
    return rows


def _second(found: Scores, name: str) -> tuple[float, float]:
    """Mean and worst of the second measure; of a loss the perplexity."""
    mean, worst = means(found, lower=name == LOSS.name)
    return (math.exp(mean), math.exp(worst)) if name == LOSS.name else (mean, worst)


def _told(found: Difference) -> str:
    mean, low, high, worst = (100 * number for number in found[:4])
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}), worst {worst:+.1f}, {found.losers} of {found.owners} lose"


OTHERWISE = ["MoLoRA, personalised", "points over alone", "points over the frozen base", "points over the shared model"]


def head(task: Task) -> list[str]:
    """Of a task's table."""
    first, second = ("exact match", "perplexity") if task.answers else ("accuracy", "macro-F1")
    return ["", first, "worst owner", second, "worst owner", "points over alone", "points over FedIT", "MB up"]


def main() -> None:
    """Parse the command line and run."""
    echo = Console(width=200).print
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--tune", action="store_true", help="choose learning rates on validation rows")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        task, method, seed, rate, split = arguments.one
        job = Job(task, method, int(seed), float(rate), split)
        simulate(job.config(arguments.out), job.out(arguments.out))
        return
    seeds = range(1) if arguments.tune else range(1, 1 + arguments.seeds)
    wanted = list(jobs(arguments.tasks, arguments.methods, seeds, tune=arguments.tune))
    if not arguments.table:
        failed = run_all(wanted, arguments.out, arguments.jobs, echo)
        if failed:
            sys.exit(f"{counted(failed, 'run')} failed; the others are kept")
    if arguments.tune:
        echo(json.dumps(choose(arguments.tasks, arguments.methods, seeds, arguments.out), indent=1))
        return
    parts = []
    for task in arguments.tasks:
        of_it = list(jobs([task], arguments.methods, seeds, tune=False))
        left = {job.method for job in of_it if not job.done(arguments.out)}
        if left:
            echo(f"{task}: without {', '.join(sorted(left))}, of which not all runs are there")
        methods = [method for method in dict.fromkeys(job.method for job in of_it) if method not in left]
        if methods:
            rows = table(task, methods, seeds, arguments.out)
            parts.append(f"**{task}** ({TASKS[task].title})\n\n{markdown(head(TASKS[task]), rows)}")
    echo("\n\n".join(parts))
    ready = [
        task
        for task in arguments.tasks
        if all(job.done(arguments.out) for job in jobs([task], ("base", "alone", "clusters"), seeds, tune=False))
    ]
    others = markdown(OTHERWISE, otherwise(ready, arguments.methods, seeds, arguments.out))
    echo(others)
    if {*arguments.tasks} == {*TASKS} and {*arguments.methods} == {*METHODS} and arguments.seeds == SEEDS:
        fill(PAGE, "quality", "\n\n".join(parts))
        fill(PAGE, "otherwise", others)


if __name__ == "__main__":
    main()
