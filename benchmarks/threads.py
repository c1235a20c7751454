"""Threads of a bundle, and how they wait for work: ratios to one thread, in wall time and in processor time.

    python benchmarks/threads.py [--size 102M] [--threads 2] [--busy 1] [--rounds 15]

Threads of ONNX Runtime sleep between pieces of work, or spin: during a call alone (``force_spinning_stop``, and for
at most so many microseconds, ``spin_duration_us``), or between calls too, which is its default. ``--busy`` starts
programs that use one processor each, which an idle machine does not have.

The graphs are those of `edge.py`: a Llama of random weights in int4 and int8 with 8 experts (one token after 128, a
prompt of 128), and the demo's MiniLM in int8 with as many (8 texts of 32 tokens). They take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

# isort: split

import onnxruntime as ort
import torch

import edge

WAYS: dict[str, dict[str, str]] = {
    "sleep": {"allow_spinning": "0"},
    "spin during a call": {"allow_spinning": "1", "force": "1"},
    "the same, 50 us at most": {"allow_spinning": "1", "force": "1", "spin_duration_us": "50"},
    "spin between calls": {"allow_spinning": "1"},
}
BATCH = 8  # calls between two readings of the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(edge.SIZES), default="102M")
    parser.add_argument("--threads", type=int, nargs="*", default=[2])
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch, _busy(options.busy):
        works = _works(Path(scratch), options.size)
        ways: dict[str, tuple[int, dict[str, str]]] = {"1 thread": (1, {})}
        for threads in options.threads:
            ways |= {f"{threads} threads, {name}": (threads, how) for name, how in WAYS.items()}
        for title, (folder, work) in works.items():
            calls = {name: work(_open(folder, *way)) for name, way in ways.items()}
            found = _measure(calls, options.rounds)
            first = found["1 thread"]
            rows = [
                [name, f"{wall * 1e3:.2f}", f"{wall / first[0]:.2f}", f"{used / first[1]:.2f}"]
                for name, (wall, used) in found.items()
            ]
            busy = f", {options.busy} busy beside" if options.busy else ""
            common.show(f"{title}{busy}", ["", "wall ms", "wall x", "processor x"], rows)


def _works(work: Path, size: str) -> dict[str, tuple[Path, Callable[[ort.InferenceSession], Callable[[], Any]]]]:
    """What is done, by name: a graph's folder, and the call from its session."""
    found: dict[str, tuple[Path, Callable[[ort.InferenceSession], Callable[[], Any]]]] = {}
    base, folders = edge.decoder_graphs(work, size, ["int4", "int8"], [8])
    for name in ("int4 E=8", "int8 E=8"):
        found[f"{size} {name}: a token"] = folders[name][0], lambda session: edge.decoding(session, base.config)[0]
        found[f"{size} {name}: a prompt"] = folders[name][0], lambda session: edge.decoding(session, base.config)[1]
    folders = edge.encoder_graphs(work, ["int8"], [8])
    found["encoder int8 E=8: 8 texts"] = folders["int8 E=8"][0], lambda session: edge.classifying(session, 8, 32)
    return found


def _open(folder: Path, threads: int, how: dict[str, str]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in how.items():
        name = "session.force_spinning_stop" if key == "force" else f"session.intra_op.{key}"
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(folder / "model.onnx", options)


def _measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall and processor seconds per call, in turns; the threads of all others sleep meanwhile."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            time.sleep(0.01)  # who spun for the last one's call has stopped
            calls[name]()
            wall, used = time.perf_counter(), time.process_time()
            for _ in range(BATCH):
                calls[name]()
            taken = (time.perf_counter() - wall) / BATCH, (time.process_time() - used) / BATCH
            if turn:
                found[name].append(taken)
    return {
        name: (statistics.median(w for w, _ in pairs), statistics.median(u for _, u in pairs))
        for name, pairs in found.items()
    }


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """So many programs that use a processor each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


if __name__ == "__main__":
    main()
