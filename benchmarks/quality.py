"""Accuracy on `sample:reviews`: base, local-only, FedIT, MoLoRA global and personalised, over several seeds.

Settings were chosen on seeds 0 and 1, so the study counts seeds from 2.

    python benchmarks/quality.py --out runs/quality --seeds 3      # trains, then writes docs/reference/results.md
    python benchmarks/quality.py --out runs/quality --table        # only rewrites the table from finished runs
    python benchmarks/quality.py --out runs/quality --compeft      # and MoLoRA with ComPEFT deltas at 20%

Every run keeps its folder, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import fill, markdown  # finds the packages

# isort: split

from rich.console import Console

from molehill.config import Config, load
from molehill_simulation.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "results.md"
DEMO = ROOT / "configs" / "demo.toml"
FEDIT, LOCAL = (ROOT / "configs" / "baselines" / f"{name}.toml" for name in ("fedit", "local"))
# More rows than in the demo, to learn from and for figures with a smaller error; one epoch for what is personal.
STUDY = ("data.rows=1000", "data.test_rows=600", "train.steps=13", "train.lr=4e-3", "personal.steps=64")
METHODS = {  # FedIT's personal head takes no part in its rounds: what it is fitted to is plain FedIT
    "fedit": (FEDIT, ("evaluate.baselines=false", "personal.head=anchored", "personal.head_lr=3e-3")),
    "fedit-long": (FEDIT, ("evaluate.baselines=false", "train.steps=24")),
    "molora": (DEMO, ()),
    # Nobody averages out what a high rate does to one client, so alone it needs a lower one.
    "local": (LOCAL, ("evaluate.baselines=false", "train.steps=24", "train.lr=1e-3")),
}
COMPEFT = {  # to cost no more than 1 point of accuracy; not run unless asked for
    "molora-compeft": (DEMO, ("evaluate.baselines=false", 'wire.up={name="compeft", density=0.2}')),
}
ROWS = (  # name in the table, run it comes from, stage of that run
    ("base (head only)", "molora", "base"),
    ("local only, the same MoLoRA", "molora", "local"),
    ("local only, one LoRA at a lower rate", "local", "personalised"),
    ("FedIT (one LoRA, averaged)", "fedit", "global"),
    ("FedIT with a personal head", "fedit", "personalised"),
    ("FedIT, 24 steps per round", "fedit-long", "global"),
    ("MoLoRA, global", "molora", "global"),
    ("MoLoRA, personalised", "molora", "personalised"),
    ("MoLoRA, global, ComPEFT at 20%", "molora-compeft", "global"),
    ("MoLoRA, personalised, ComPEFT at 20%", "molora-compeft", "personalised"),
)


def study(seed: int, method: str, overrides: list[str]) -> Config:
    """The configuration of one run."""
    path, settings = {**METHODS, **COMPEFT}[method]
    return load(path, [*STUDY, *settings, f"run.seed={seed}", *overrides])


def run(config: Config, out: Path) -> None:
    """Run, or go on with, one study."""
    if not (out / "summary.json").exists():
        simulate(config, out)


def scores(out: Path, stage: str, what: str) -> list[float]:
    """One figure of every client."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [e["stages"][stage][what] for e in events if e["event"] == "evaluation"]


def table(folder: Path, seeds: Iterable[int], methods: Iterable[str]) -> list[list[str]]:
    """Rows of the table, of these methods."""
    seeds, methods = list(seeds), set(methods)
    rows = []
    for name, method, stage in ROWS:
        if method not in methods:
            continue
        outs = [folder / f"{method}-{seed}" for seed in seeds]
        accuracy = [scores(out, stage, "accuracy") for out in outs]
        f1 = [scores(out, stage, "macro_f1") for out in outs]
        summaries = [json.loads((out / "summary.json").read_text(encoding="utf-8")) for out in outs]
        alone = stage in {"base", "local"}
        rows.append(
            [
                name,
                over(map(statistics.mean, accuracy)),
                over(map(min, accuracy)),
                over(map(statistics.mean, f1)),
                over(map(min, f1)),
                "0" if alone else megabytes(summaries, "bytes_up"),
                "0" if alone else megabytes(summaries, "bytes_down"),
            ]
        )
    return rows


def over(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds."""
    figures = list(values)
    spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
    return f"{statistics.mean(figures):.3f} ± {spread:.3f}"


def megabytes(summaries: list[dict[str, Any]], key: str) -> str:
    """Mean over seeds, in MB (10^6 bytes)."""
    return f"{statistics.mean(summary[key] for summary in summaries) / 1e6:.2f}"


def main() -> None:
    """Parse the command line and run."""
    echo = Console().print
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--compeft", action="store_true", help="also MoLoRA with ComPEFT deltas")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    seeds = range(2, 2 + arguments.seeds)
    methods = [*METHODS, *(COMPEFT if arguments.compeft else ())]
    for seed in seeds:
        for method in methods:
            if not arguments.table:
                echo(f"{method}, seed {seed}")
                run(study(seed, method, arguments.overrides), arguments.out / f"{method}-{seed}")
    head = ["", "accuracy", "worst client", "macro-F1", "worst client", "MB up", "MB down"]
    text = markdown(head, list(table(arguments.out, seeds, methods)))
    fill(PAGE, "quality", text)
    echo(text)


if __name__ == "__main__":
    main()
