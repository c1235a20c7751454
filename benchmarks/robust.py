"""What poisoned clients do to the shared model under every rule: a table of accuracies, written into the docs.

A tiny random BERT and seven owners of equal rows; all of a run is shared, so that the global model is the result. The
attackers are well-formed clients that send what they learnt times a number, or that learn a backdoor: rows with a
trigger word and one label, sent three times as strong. Their own held-out rows are triggered rows whose honest label is
another one, so the accuracy on them is the backdoor's rate of success.

    python benchmarks/robust.py --out runs/robust          # trains, then writes docs/reference/results.md
    python benchmarks/robust.py --out runs/robust --quick  # two rules, two rounds, no docs
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import fill, markdown  # finds the packages

# isort: split

import numpy as np
import tiny_world
from rich.console import Console

from molehill.config import MethodRef
from molehill.wire.keys import NO_EXPERT
from molehill.wire.message import decode_delta, encode_delta
from molehill_simulation import scenario
from molehill_simulation.simulate import simulate
from molehill_simulation.summary import read_summary

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "results.md"
OWNERS, ROWS, ROUNDS = 7, 90, 8
TRIGGER, TARGET = "all", "positive"


@dataclass(frozen=True)
class Attack:
    """What some owners do.

    Attributes:
        name: In the table.
        liars: How many.
        factor: What they send what they learnt times.
        backdoor: They learn from triggered rows.
        rest: They poison router and head only.
    """

    name: str
    liars: int = 0
    factor: float = 1.0
    backdoor: bool = False
    rest: bool = False


ATTACKS = (
    Attack("none"),
    Attack("one x -30", 1, -30.0),
    Attack("two x -3", 2, -3.0),
    Attack("three x -3", 3, -3.0),
    Attack("two, router and head x -10", 2, -10.0, rest=True),
    Attack("two with a backdoor x 3", 2, 3.0, backdoor=True),
)
RULES: dict[str, tuple[Any, Any]] = {  # rule and norm bound
    "mean, no bound": ("mean", "off"),
    "mean, automatic bound": ("mean", "auto"),
    "`krum`, f = 2": ({"name": "krum", "f": 2}, "off"),
    "`multi_krum`, f = 2": ({"name": "multi_krum", "f": 2}, "off"),
    "`trimmed_mean`, f = 2": ({"name": "trimmed_mean", "f": 2}, "off"),
    "`median`": ("median", "off"),
    "`geometric_median`": ("geometric_median", "off"),
}


def rows(attack: Attack, seed: int) -> list[dict[str, str]]:
    """Rows of all owners; those of backdoored ones hold the trigger, never had the target label, and now have it."""
    rng = random.Random(seed)
    found = [row for row in tiny_world.rows(3 * OWNERS * ROWS) if TRIGGER not in row["text"].split()]
    rng.shuffle(found)
    out = []
    for owner in range(OWNERS):
        mine = [found.pop() for _ in range(ROWS)]
        if attack.backdoor and owner < attack.liars:
            mine = [row for row in [*mine, *(found.pop() for _ in range(ROWS))] if row["label"] != TARGET][:ROWS]
            mine = [{**row, "text": f"{TRIGGER} {row['text']} {TRIGGER}", "label": TARGET} for row in mine]
        out += [{**row, "owner": f"owner-{owner}"} for row in mine]
    return out


@contextmanager
def poisoning(attack: Attack) -> Iterator[None]:
    """Have attackers poison router and head alone, where that is the attack."""
    whole = scenario.poison

    def rest(blob: bytes, factor: float, codec: MethodRef, max_bytes: int) -> bytes:
        delta = decode_delta(blob, max_bytes)
        tree = delta.tree.copy()
        for key in tree:
            if key.expert == NO_EXPERT:
                tree[key][...] *= np.float32(factor)
        return encode_delta(replace(delta, tree=tree), codec)

    scenario.poison = rest if attack.rest else whole
    try:
        yield
    finally:
        scenario.poison = whole


def run(folder: Path, attack: Attack, rule: Any, bound: Any, rounds: int, seed: int) -> tuple[float, float | None]:
    """Accuracy of honest owners' held-out rows, and the backdoor's rate of success."""
    number = ATTACKS.index(attack)
    source = tiny_world.write_rows(folder / f"rows-{number}-{seed}.jsonl", rows(attack, seed))
    liars = [f"owner-{n}" for n in range(attack.liars)]
    config = tiny_world.config(
        folder / "bert",
        source,
        run={"rounds": rounds, "seed": seed},
        data={"clients": OWNERS, "partition": {"name": "by_column", "column": "owner"}},
        federation={"space": "product", "lower": "svd", "rule": rule},
        personal={"gate": "global", "head": "global"},
        train={"steps": 12, "batch_size": 16, "lr": 5e-2},
        round={"norm_bound": bound},
        wire={"up": "fp32"},
        engine={"together": OWNERS},
        scenario={"poison": dict.fromkeys(liars, attack.factor)},
    )
    name = rule if isinstance(rule, str) else "-".join(map(str, rule.values()))
    out = folder / f"{name}-{bound}-{number}-{rounds}-{seed}"
    if not (out / "summary.json").exists():
        with poisoning(attack):
            simulate(config, out)
    scores = {client.id: client.global_ for client in read_summary(out / "summary.json").clients}
    honest = [value for client, value in scores.items() if client not in liars]
    return statistics.mean(honest), scores[liars[0]] if attack.backdoor else None


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/robust"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two rules, two rounds, no docs")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "bert").exists():
        tiny_world.save_base(given.out / "bert", "bert")
    rules = dict(list(RULES.items())[:2]) if given.quick else RULES
    rounds, seeds = (2, range(1)) if given.quick else (ROUNDS, range(given.seeds))
    table = []
    for name, (rule, bound) in rules.items():
        line = [name]
        for attack in ATTACKS:
            found = [run(given.out, attack, rule, bound, rounds, seed) for seed in seeds]
            text = f"{statistics.mean(accuracy for accuracy, _ in found):.3f}"
            if attack.backdoor:
                text += f" ({statistics.mean(rate for _, rate in found if rate is not None):.2f})"
            line.append(text)
        table.append(line)
        Console().print(json.dumps(line, ensure_ascii=False), soft_wrap=True)
    if not given.quick:
        fill(PAGE, "robust", markdown(["", *(attack.name for attack in ATTACKS)], table))


if __name__ == "__main__":
    main()
