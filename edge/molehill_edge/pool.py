"""How many threads compute a graph, and how they wait for work: measured, since neither can be told beforehand.

Between two products of a token there are microseconds. A thread that sleeps meanwhile wakes up late, one that spins is
there at once; but where another program wants the processor, or two processors are threads of one core, spinning takes
from the one that works. See ``benchmarks/threads.py``.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

_GRAPH = Path(__file__).with_name("pool.onnx")  # of scripts/pool_graph.py: a few products, one after another
_WIDTH, _ROUNDS = 768, 9
_WORTH = 0.9  # more threads, and spinning, take processor time from others: they must be this much faster
_SPIN = "50"  # microseconds at most between two products


@dataclass(frozen=True)
class Pool:
    """Threads within one operator.

    Attributes:
        threads: How many.
        spin: Whether they wait for the next operator awake; they sleep between calls.
        measured: Whether either was measured.
    """

    threads: int
    spin: bool
    measured: bool = False

    def apply(self, options: ort.SessionOptions) -> None:
        """Let a session compute so."""
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spin)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN)
        options.add_session_config_entry("session.force_spinning_stop", "1")


def choose(rows: int, threads: int | None = None, *, spin: bool | None = None) -> Pool:
    """What is fastest on this device as it is now.

    What is given stays; the rest is measured with a few small products, which takes some hundredths of a second and
    counts for the whole process.

    Args:
        rows: Tokens that products have: 1 for one after another.
        threads: At least 1.
        spin: See `Pool`.
    """
    most = threads or processors()
    ways = [Pool(count, awake) for count in {threads or 1, most} for awake in (False, True)]
    ways = [way for way in ways if not (way.spin and way.threads == 1) and spin in {None, way.spin}]
    if spin and most == 1:
        ways = [Pool(1, spin=False)]  # nobody to wait for
    return _fastest(tuple(sorted(ways, key=lambda way: (way.threads, way.spin))), rows)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _fastest(ways: tuple[Pool, ...], rows: int) -> Pool:
    """The best of some ways, the most modest first."""
    if len(ways) == 1:
        return ways[0]
    sessions = [_open(way) for way in ways]
    rng = np.random.default_rng(0)
    feed = {
        "x": rng.standard_normal((rows, _WIDTH), np.float32),
        "w": rng.standard_normal((_WIDTH, _WIDTH), np.float32) / np.float32(_WIDTH**0.5),
    }
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(_ROUNDS + 1):
        for session, taken in zip(sessions, times, strict=True):
            begin = time.perf_counter()
            session.run(None, feed)
            if turn:  # the first warms up
                taken.append(time.perf_counter() - begin)
    found = [statistics.median(taken) for taken in times]
    best = 0
    for other in range(1, len(ways)):
        if found[other] < _WORTH * found[best]:
            best = other
    return Pool(ways[best].threads, ways[best].spin, measured=True)


def _open(way: Pool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    way.apply(options)
    return ort.InferenceSession(_GRAPH, options, providers=["CPUExecutionProvider"])
