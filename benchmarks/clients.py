"""What a round costs over the number of clients: our grid and round loop, pfl, and Flower's Ray engine.

    python benchmarks/clients.py [--counts 8 64 512] [--reps 5] [--json]

The trivial model of `grid`, which says what every way does. ``ray`` is Flower's own simulation with a client that does
the same training and one round; starting Ray is not counted, and a client takes one core. Wall time, since Ray works in
other processes. pfl is left out where it is not installed: its pins do not go with ours, so `pip install --no-deps pfl`
and what it then misses.
"""

from __future__ import annotations

from common import alternate, tell

# Above torch, since common sets the number of threads.
# isort: split

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from grid import CLASSES, FEATURES, local_training, on_grid, one_round, plain, with_pfl

Ways = dict[str, dict[int, float]]


def _trained(message: Message, context: Context) -> Message:
    """One client of Ray: start values in, delta out."""
    start = message.content["arrays"].to_numpy_ndarrays()[0]
    delta = local_training(start, int(context.node_config["partition-id"]))
    return Message(RecordDict({"arrays": ArrayRecord([delta])}), reply_to=message)


def on_ray(clients: int, reps: int) -> float:
    """Median seconds of a round of Flower's Ray engine."""
    from flwr.simulation import run_simulation

    app, server, spent = ClientApp(), ServerApp(), []
    app.train()(_trained)

    @server.main()
    def main(grid: Grid, _context: Context) -> None:
        start = np.zeros((CLASSES, FEATURES), np.float32)
        while len(nodes := list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        for _ in range(reps + 1):
            began = time.perf_counter()
            messages = [
                Message(RecordDict({"arrays": ArrayRecord([start]), "c": ConfigRecord({"r": 1})}), node, "train")
                for node in nodes
            ]
            total = np.zeros_like(start)
            for reply in grid.send_and_receive(messages):
                total += reply.content["arrays"].to_numpy_ndarrays()[0]
            spent.append(time.perf_counter() - began)

    run_simulation(server, app, clients, backend_config={"client_resources": {"num_cpus": 1}})
    return statistics.median(spent[1:])  # in the first round the actors import what they need


def measure(clients: int, reps: int, folder: Path) -> dict[str, float]:
    """Milliseconds of a round of every way."""
    calls: dict[str, Callable[[], object] | None] = {
        "plain loop": partial(plain, clients),
        "LocalGrid": on_grid(clients),
        "round loop": partial(one_round, clients, folder),
        "pfl": with_pfl(clients),
    }
    found = alternate({name: call for name, call in calls.items() if call is not None}, reps)
    found["ray"] = on_ray(clients, min(reps, 2))
    return {way: 1e3 * seconds for way, seconds in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        found = {count: measure(count, options.reps, Path(folder)) for count in options.counts}
    title = "One round of a trivial model, milliseconds a client"
    tell(found, title, "clients", as_json=options.json, shared=True)


if __name__ == "__main__":
    main()
