"""What a deployed round costs beside training and transfer: real processes, mutual TLS, loopback.

    python benchmarks/deployment.py --nodes 4 --rounds 6

The model is a random checkpoint of two layers, so that training and transfer take little of a round; what is left is
Flower's polling, one process per message, and our own bookkeeping. The figure is the median over all rounds but the
first, less the longest training of each. Bytes are counted on the exchange's sockets, TLS and all, both ways.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from pathlib import Path

import common  # first of all: it finds the packages

# isort: split

import tiny_world
from common import show
from exchange_house import Wire
from lab import open_lab


def main() -> None:
    common.require_command()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny_world.SIZES.update(hidden_size=256, intermediate_size=512)  # deltas of megabytes
        base = tiny_world.save_base(folder / "base", "bert")
        source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(20 * given.nodes))
        config = tiny_world.config(
            base,
            source,
            run={"rounds": given.rounds},
            data={"clients": given.nodes},
            task={"labels": list(tiny_world.LABELS)},
            round={"quorum": 1.0},
            molora={"targets": ["query", "intermediate.dense"], "experts": 8, "rank": 32, "alpha": 4.0},
            wire={"up": "fp32", "down": "fp32"},
        )
        names = tuple(f"client-{number + 1}" for number in range(given.nodes))
        with open_lab(folder, config, names) as lab:
            lab.up()
            with Wire(lab.port) as door, Wire(lab.exchange_port) as data:
                lab.taps = {"door": door, "data": data}
                lab.join_all()
                lab.finish(lab.run(), 600)
                crossed = sum(map(len, data.seen.values()))
                lab.close()
            (end,) = lab.events("end")
            # The evaluation fetches one version more, which is as large as that of the last round.
            promised = end["bytes_up"] + end["bytes_down"] + lab.events("round")[-1]["bytes_down"]
            rounds = [event["seconds"] for event in lab.events("round")][1:]
            logs = [(folder / f"{name}.state" / "logs" / "trainer.log").read_text() for name in names]
            trained = [[float(seconds) for seconds in re.findall(r" train took ([\d.]+) s", log)][1:] for log in logs]
            starts = sum(len(re.findall("query.hello took", log)) for log in logs)
        over = [whole - max(each) for whole, each in zip(rounds, zip(*trained, strict=True), strict=True)]
        show(
            f"{given.nodes} nodes, {len(rounds)} rounds",
            ["", "median", "longest"],
            [
                ["round, s", f"{statistics.median(rounds):.1f}", f"{max(rounds):.1f}"],
                ["of it over training, s", f"{statistics.median(over):.1f}", f"{max(over):.1f}"],
                ["exchange, MB promised", f"{promised / 1e6:.1f}", ""],
                ["of it on the socket, x", f"{crossed / promised:.4f}", ""],
                ["models loaded per node", f"{starts / given.nodes:.1f}", ""],
            ],
        )


if __name__ == "__main__":
    main()
