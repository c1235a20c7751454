"""Server aggregation: streaming mean and QR re-factorisation against what is usual.

    python benchmarks/aggregation.py [--quick] [--json]

1. Averaging many updates: the streaming mean of `molehill_server` (per-update weights equal, and different for every
   expert: "routed") against the list-of-lists average that Flower's strategies do with numpy
   (`flwr.server.strategy.aggregate`). Peak memory is that of a process of its own, above what it held before.
2. Bringing a sum of products back to rank 8: QR of the stacked factors against an SVD of the dense matrix.

Both sides run in turns on one thread; figures are medians.
"""

from __future__ import annotations

from common import alternate, grown_by, in_own_process, show

# Above numpy, since common sets the number of threads that numpy reads when it is imported.
# isort: split
import argparse
import json
from functools import reduce
from typing import Any

import numpy as np
import torch

from molehill.config import Federation
from molehill.wire.keys import Key
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator
from molehill_server.aggregation.lowrank import concat, svd
from molehill_server.records import Global, LowRank, Update

torch.set_num_threads(1)
SITES, EXPERTS, RANK = 28, 4, 8


def model(parameters: int) -> Global:
    """A MoLoRA of about ``parameters`` numbers in 224 tensors, the shapes of square sites."""
    width = parameters // (SITES * EXPERTS * 2 * RANK)
    shapes = {"A": (RANK, width), "B": (width, RANK)}
    rng = np.random.default_rng(0)
    return Global(
        Tree.of(
            {
                Key(f"layers.{site:02d}", f"e{expert}", role): rng.standard_normal(shape, np.float32)
                for site in range(SITES)
                for expert in range(EXPERTS)
                for role, shape in shapes.items()
            }
        )
    )


def clients(glob: Global, *, routed: bool) -> list[Update]:
    """Four updates; many clients cycle through them, so that values come from memory and cost nothing to make."""
    sites = [f"layers.{site:02d}" for site in range(SITES)]
    return [
        Update(
            f"c{k}",
            Tree(glob.tree.layout, glob.tree.flat + np.float32(0.01 * (k + 1))),
            100 + k,
            {(site, f"e{e}"): float(1 + (k * 7 + e * 3) % 11) for site in sites for e in range(EXPERTS)}
            if routed
            else {},
        )
        for k in range(4)
    ]


def streaming(glob: Global, held: list[Update], count: int) -> np.ndarray:
    """Our mean; updates come one at a time."""
    return Aggregator.from_config(Federation())(glob, (held[k % 4] for k in range(count)))[0].tree.flat


def list_of_lists(held: list[Update], count: int) -> list[np.ndarray]:
    """Flower's `aggregate`: every client's arrays in a list, weighted copies of all, then a sum per tensor."""
    results = [(list(held[k % 4].tree.values()), held[k % 4].examples) for k in range(count)]
    total = sum(examples for _, examples in results)
    weighted = [[layer * examples for layer in weights] for weights, examples in results]
    return [reduce(np.add, layers) / total for layers in zip(*weighted, strict=True)]


def peak(name: str, parameters: int, count: int) -> float:
    """Peak MiB above what is held before, measured in a process of its own."""
    return float(in_own_process("--peak", name, str(parameters), str(count)))


def print_peak(name: str, parameters: int, count: int) -> None:
    """Print by how many MiB this process grew while it aggregated once."""
    small = model(100_000)
    for routed in (False, True):  # imports, thread pools and small buffers are not the aggregation's
        held = clients(small, routed=routed)
        streaming(small, held, 4)
        list_of_lists(held, 4)
    glob = model(parameters)
    held = clients(glob, routed=name == "routed")
    print(grown_by(lambda: list_of_lists(held, count) if name == "flower" else streaming(glob, held, count)))


def averaging(parameters: int, count: int, rounds: int) -> dict[str, Any]:
    """The first benchmark."""
    glob = model(parameters)
    plain, routed = (clients(glob, routed=routed) for routed in (False, True))
    ours = streaming(glob, plain, count)
    theirs = np.concatenate([layer.ravel() for layer in list_of_lists(plain, count)])
    one = torch.from_numpy(glob.tree.flat.copy())
    values = [torch.from_numpy(update.tree.flat) for update in plain]
    seconds = alternate(
        {
            "flower": lambda: list_of_lists(plain, count),
            "streaming": lambda: streaming(glob, plain, count),
            "routed": lambda: streaming(glob, routed, count),
            "flat add": lambda: [one.add_(values[k % 4], alpha=1e-3) for k in range(count)],
        },
        rounds,
    )
    return {
        "updates": count,
        "parameters": glob.tree.layout.size,
        "result_mib": glob.tree.flat.nbytes / 2**20,
        "seconds": seconds,
        "speedup": {name: seconds["flower"] / seconds[name] for name in ("streaming", "routed")},
        "flat_add_ratio": {name: seconds[name] / seconds["flat add"] for name in ("streaming", "routed")},
        "peak_mib": {name: peak(name, parameters, count) for name in ("flower", "streaming", "routed")},
        "largest_difference": float(np.abs(ours - theirs).max()),
    }


def refactoring(width: int, count: int, rounds: int) -> dict[str, Any]:
    """The second benchmark."""
    rng = np.random.default_rng(0)
    signal_b, signal_a = rng.standard_normal((width, RANK), np.float32), rng.standard_normal((RANK, width), np.float32)
    points = [  # clients agree on a signal of the rank that is kept, so that both routes have one answer to find
        LowRank(
            signal_b + 0.5 * rng.standard_normal((width, RANK), np.float32),
            signal_a + 0.5 * rng.standard_normal((RANK, width), np.float32),
        )
        for _ in range(count)
    ]
    total = concat(points, [1 / count] * count)

    def by_qr() -> tuple[np.ndarray, np.ndarray]:
        u, s, v = svd(total)
        return (u[:, :RANK] * s[:RANK]).astype(np.float32), v[:RANK].astype(np.float32)

    def by_svd() -> tuple[np.ndarray, np.ndarray]:
        u, s, v = torch.linalg.svd(torch.from_numpy(total.B) @ torch.from_numpy(total.A), full_matrices=False)
        return (u[:, :RANK] * s[:RANK]).numpy(), v[:RANK].numpy()

    (qb, qa), (sb, sa) = by_qr(), by_svd()
    seconds = alternate({"dense svd": by_svd, "qr": by_qr}, rounds)
    return {
        "width": width,
        "clients": count,
        "rank": RANK,
        "seconds": seconds,
        "speedup": seconds["dense svd"] / seconds["qr"],
        "relative_difference": float(np.linalg.norm(qb @ qa - sb @ sa) / np.linalg.norm(sb @ sa)),
    }


def print_tables(mean: dict[str, Any], qr: dict[str, Any]) -> None:
    """Two tables."""
    rows = []
    for name in ("flower", "streaming", "routed", "flat add"):
        seconds = mean["seconds"][name]
        extra = mean["peak_mib"].get(name)
        rows.append(
            [
                name,
                f"{1000 * seconds / mean['updates']:.2f}",
                f"{mean['seconds']['flower'] / seconds:.2f}",
                f"{seconds / mean['seconds']['flat add']:.2f}",
                "" if extra is None else f"{extra:.0f}",
                "" if extra is None else f"{extra - mean['result_mib']:.0f}",
            ]
        )
    show(
        f"{mean['updates']} updates of {mean['parameters']:,}; differ by {mean['largest_difference']:.1e}",
        ["mean", "ms per update", "x flower", "x flat add", "peak MiB", "over the result"],
        rows,
    )
    show(
        f"d={qr['width']}, {qr['clients']} clients of rank {RANK}; differ by {qr['relative_difference']:.1e}",
        ["re-factorisation", "ms", "x dense svd"],
        [
            [name, f"{1000 * seconds:.1f}", f"{qr['seconds']['dense svd'] / seconds:.0f}"]
            for name, seconds in qr["seconds"].items()
        ],
    )


def main() -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--peak", nargs=3, metavar=("NAME", "PARAMETERS", "UPDATES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], int(options.peak[1]), int(options.peak[2]))
        return
    mean = averaging(200_000, 20, 3) if options.quick else averaging(5_000_000, 100, 5)
    qr = refactoring(256, 10, 3) if options.quick else refactoring(2048, 10, 3)
    if options.json:
        print(json.dumps({"averaging": mean, "refactoring": qr}, indent=2))
    else:
        print_tables(mean, qr)


if __name__ == "__main__":
    main()
