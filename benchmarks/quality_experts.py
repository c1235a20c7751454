"""Whether the experts of a finished run differ, and whether it matters to their owners.

    python benchmarks/quality_experts.py runs/quality/reviews-clusters-1-0.002 [another run ...]

Of every owner the mean weight of each expert, and what closing the one that weighs most costs, beside closing another
one (mean over the others), in points of accuracy on its held-out rows, with its own personalised model. A closed expert
adds nothing; the weights of the others stay. Of the experts the cosine of their updates (B A), mean over sites and
pairs.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

from common import markdown  # finds the packages

# isort: split

import numpy as np
from rich.console import Console

from molehill import config
from molehill.wire.connect import connect
from molehill.wire.store import load_tree
from molehill_client.scores import score
from molehill_client.workbench import Workbench
from molehill_simulation.world import World, open_world, store_of


class Found(NamedTuple):
    """What is found of one owner.

    Attributes:
        owner: Its name.
        weights: Mean weight of every expert.
        main: Points that closing the expert with the greatest weight costs.
        other: Points that closing another costs, mean.
    """

    owner: str
    weights: dict[str, float]
    main: float
    other: float


def experts_of(world: World) -> list[str]:
    """Ids of the experts that tokens are routed to."""
    return sorted({key.expert for key in world.model.slots if key.routed and key.kind == "B"})


def cosines(world: World) -> float:
    """Mean over sites and pairs of experts of the cosine of their updates."""
    tree = world.model.tree(lambda key: key.routed)
    sites = sorted({key.site for key in tree if key.kind == "B"})
    found = []
    for site in sites:
        updates = [
            (tree[by["B"]] @ tree[by["A"]]).ravel()
            for expert in experts_of(world)
            if len(by := {key.kind: key for key in tree if (key.site, key.expert) == (site, expert)}) == 2
        ]
        found += [
            float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
            for one, two in itertools.combinations(updates, 2)
        ]
    return float(np.mean(found))


def look(out: Path) -> tuple[float, list[Found]]:
    """Cosines and owners of a run."""
    world = open_world(config.load(out / "config.toml"))
    model, (shared, _) = world.model, load_tree(out / "final.safetensors")
    bench = Workbench(world.config, model, world.task, world.base.digest, world.initial, connect("memory:experts"))
    found = []
    for owner, (_, held_out) in zip(world.owners, world.examples, strict=True):
        state = store_of(world, out, owner.name).before(10**6)
        model.flat.zero_()
        model.load(shared)
        model.load(state.personal)
        model.use_personal(gate=True, head=True)
        whole = model.flat.detach().clone()
        model.count_tokens(on=True)
        best = score(bench, held_out).scores().accuracy
        model.count_tokens(on=False)
        masses = dict.fromkeys(experts_of(world), 0.0)
        for (_, expert), mass in model.tokens().items():
            masses[expert] = masses.get(expert, 0.0) + mass
        weights = {expert: mass / sum(masses.values()) for expert, mass in masses.items()}
        costs = {}
        for expert in masses:
            model.flat.copy_(whole)
            for key, slot in model.slots.items():
                if key.kind == "B" and key.expert == expert:
                    model.flat[slot.start : slot.stop] = 0.0
            costs[expert] = 100 * (best - score(bench, held_out).scores().accuracy)
        main = max(weights, key=lambda expert: weights[expert])
        others = [cost for expert, cost in costs.items() if expert != main]
        found.append(Found(owner.name, weights, costs[main], float(np.mean(others))))
    model.load(shared)
    return cosines(world), found


def main() -> None:
    """Parse the command line and print."""
    echo = Console(width=200).print
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    for out in parser.parse_args().runs:
        cosine, owners = look(out)
        names = list(owners[0].weights)
        rows = [
            [each.owner, *(f"{each.weights[name]:.3f}" for name in names), f"{each.main:+.1f}", f"{each.other:+.1f}"]
            for each in owners
        ]
        mean = [float(np.mean([getattr(each, what) for each in owners])) for what in ("main", "other")]
        rows.append(["mean", *[""] * len(names), *(f"{value:+.1f}" for value in mean)])
        echo(f"\n{out.name}: cosine of experts {cosine:.3f}\n")
        echo(markdown(["", *names, "closing the main one", "another one"], rows))


if __name__ == "__main__":
    main()
