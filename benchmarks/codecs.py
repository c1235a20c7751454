"""How small each codec makes a delta, how close it stays, and how long it takes.

    python benchmarks/codecs.py [--synthetic | --delta FILE.safetensors] [--repeat 5] [--json]

The delta is that of the demo's first owner: one round on MiniLM and its own reviews, in fp32 on the wire.
``--synthetic`` takes a heavy-tailed one of 2.1M numbers instead, ``--delta`` a file written by
`molehill.wire.store.save_tree`. Bytes are those of the whole self-describing message, names included. What ComPEFT
costs in accuracy: `quality.py --compeft`.
"""

from __future__ import annotations

from common import alternate, show

# Above numpy, since common sets the number of threads that numpy reads when it is imported.
# isort: split
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from molehill.config import MethodRef, load
from molehill.wire.keys import Key
from molehill.wire.local import MemoryExchange
from molehill.wire.message import decode_delta, decode_tree, encode_tree
from molehill.wire.store import load_tree
from molehill.wire.tree import Tree
from molehill_client.client import Client
from molehill_client.state import StateStore
from molehill_client.workbench import Workbench
from molehill_server.broadcast import Broadcast
from molehill_server.planning.planner import Planner
from molehill_server.records import Global
from molehill_simulation.world import open_world

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.toml"

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "fp16": ("fp16", {}),
    "fp16 + zstd": ("fp16", {"zstd": True}),
    "bf16": ("bf16", {}),
    "bf16 + zstd": ("bf16", {"zstd": True}),
    "int8 rows": ("int8", {}),
    "int8 rows + zstd": ("int8", {"zstd": True}),
    "int4 group 64": ("int4", {"zstd": False}),
    "int4 group 64 + zstd": ("int4", {}),
    "int4 group 32 + zstd": ("int4", {"group": 32}),
    **{
        f"compeft {density:.0%} {way}": ("compeft", {"density": density, "positions": way})
        for density in (0.05, 0.1, 0.2)
        for way in ("mask", "gap", "golomb")
    },
}


def synthetic(seed: int = 0) -> Tree:
    """A delta as Adam leaves one: Student t values (3 degrees of freedom), each row with a size of its own."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for block in range(6):
        for module, d_in, d_out in (("query", 384, 384), ("value", 384, 384), ("dense", 384, 1536), ("out", 1536, 384)):
            for expert in range(8):
                for role, shape in (("A", (8, d_in)), ("B", (d_out, 8))):
                    rows = np.exp(rng.normal(0.0, 0.5, (shape[0], 1)))
                    key = Key(f"encoder.layer.{block}.{module}", f"e{expert}", role)
                    arrays[key] = (1e-3 * rows * rng.standard_t(3, shape)).astype(np.float32)
    return Tree.of(arrays)


def real() -> Tree:
    """The delta of the demo's first owner after its first round."""
    world = open_world(load(DEMO, ["wire.up=fp32"]))
    config, owner, exchange = world.config, world.owners[0], MemoryExchange()
    bench = Workbench(config, world.model, world.task, world.base.digest, world.initial, exchange)
    broadcast = Broadcast(exchange, config.wire.down, config.wire.max_bytes)
    layout = broadcast.publish(Global(world.initial)).tree.layout
    plan = Planner(config, world.base.digest).plan(owner.name, 1, layout, broadcast.digests(), 0)
    rows = (world.task.encode(part) for part in (owner.train, owner.test))
    with tempfile.TemporaryDirectory() as folder:
        store = StateStore(Path(folder), config.run.name, world.base.digest)
        reply = Client(bench, owner.name, *rows, store).train(plan)
    return decode_delta(exchange.get(reply.delta), config.wire.max_bytes).tree


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return float(wide_a @ wide_b / (np.linalg.norm(wide_a) * np.linalg.norm(wide_b)))


def measure(tree: Tree, name: str, params: dict[str, Any], repeat: int) -> dict[str, Any]:
    codec = MethodRef.model_validate({"name": name, **params})
    limit = 8 * tree.flat.nbytes
    blob = encode_tree(tree, codec)
    seconds = alternate(
        {"encode": lambda: encode_tree(tree, codec), "decode": lambda: decode_tree(blob, limit)}, repeat
    )
    return {
        "codec": name,
        "params": params,
        "bytes": len(blob),
        "times_smaller": tree.flat.nbytes / len(blob),
        "bits_per_parameter": 8 * len(blob) / tree.layout.size,
        "cosine": cosine(tree.flat, decode_tree(blob, limit).flat),
        **{f"{way}_ms": 1e3 * value for way, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--synthetic", action="store_true", help="a delta drawn at random; trains nothing")
    source.add_argument("--delta", type=Path, help="safetensors file written by save_tree")
    parser.add_argument("--repeat", type=int, default=5, help="timings per row; the median is shown")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    name = "synthetic" if options.synthetic else str(options.delta or "the demo's first owner")
    tree = synthetic() if options.synthetic else load_tree(options.delta)[0] if options.delta else real()
    rows = {label: measure(tree, *row, options.repeat) for label, row in ROWS.items()}
    if options.json:
        print(
            json.dumps(
                {"delta": name, "numbers": tree.layout.size, "tensors": len(tree), "codecs": list(rows.values())},
                indent=1,
            )
        )
        return
    show(
        f"{tree.layout.size:,} numbers in {len(tree)} tensors ({name})",
        ["codec", "x smaller", "bits each", "cosine", "enc ms", "dec ms"],
        [
            [
                label,
                f"{row['times_smaller']:.1f}",
                f"{row['bits_per_parameter']:.2f}",
                f"{row['cosine']:.5f}",
                f"{row['encode_ms']:.1f}",
                f"{row['decode_ms']:.1f}",
            ]
            for label, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
