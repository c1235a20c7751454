"""How small each codec makes a delta, how close it stays, and how long it takes.

    python benchmarks/codecs.py [--delta FILE.safetensors] [--repeat 5] [--json]

The file is one written by `molehill.wire.store.save_tree`; without one a synthetic heavy-tailed delta of 2.4M numbers
is used. Bytes are those of the whole self-describing message, names included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from molehill.config import MethodRef
from molehill.wire.keys import Key
from molehill.wire.message import decode_tree, encode_tree
from molehill.wire.store import load_tree
from molehill.wire.tree import Tree

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


def milliseconds(call: Callable[[], Any], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return float(wide_a @ wide_b / (np.linalg.norm(wide_a) * np.linalg.norm(wide_b)))


def measure(tree: Tree, name: str, params: dict[str, Any], repeat: int) -> dict[str, Any]:
    codec = MethodRef.model_validate({"name": name, **params})
    limit = 8 * tree.flat.nbytes
    blob = encode_tree(tree, codec)
    return {
        "codec": name,
        "params": params,
        "bytes": len(blob),
        "times_smaller": tree.flat.nbytes / len(blob),
        "bits_per_parameter": 8 * len(blob) / tree.layout.size,
        "cosine": cosine(tree.flat, decode_tree(blob, limit).flat),
        "encode_ms": milliseconds(lambda: encode_tree(tree, codec), repeat),
        "decode_ms": milliseconds(lambda: decode_tree(blob, limit), repeat),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delta", type=Path, help="safetensors file written by save_tree")
    parser.add_argument("--repeat", type=int, default=5, help="timings per row; the median is shown")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    tree = load_tree(options.delta)[0] if options.delta else synthetic()
    rows = {label: measure(tree, *row, options.repeat) for label, row in ROWS.items()}
    if options.json:
        print(json.dumps({"numbers": tree.layout.size, "tensors": len(tree), "codecs": list(rows.values())}, indent=1))
        return
    table = Table(title=f"{tree.layout.size:,} numbers in {len(tree)} tensors ({options.delta or 'synthetic'})")
    table.add_column("codec", no_wrap=True)
    for heading in ("x smaller", "bits each", "cosine", "enc ms", "dec ms"):
        table.add_column(heading, justify="right")
    for label, row in rows.items():
        table.add_row(
            label,
            f"{row['times_smaller']:.1f}",
            f"{row['bits_per_parameter']:.2f}",
            f"{row['cosine']:.5f}",
            f"{row['encode_ms']:.1f}",
            f"{row['decode_ms']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
