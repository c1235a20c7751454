"""What a bundle costs on this device: time to open, memory, and time per text or token."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molehill_edge.manifest import reading
from molehill_edge.view import View

_SHAPES = ((1, 32), (1, 128), (8, 128))  # texts, tokens of each
_DECODED = 16  # tokens of one round


@dataclass(frozen=True)
class Figure:
    """One measurement, repeated.

    Attributes:
        name: What was measured.
        unit: Of the numbers.
        median: Of all rounds.
        low: Lower quartile.
        high: Upper quartile.
    """

    name: str
    unit: str
    median: float
    low: float
    high: float


def measure(view: View, *, rounds: int = 10, seed: int = 0) -> list[Figure]:
    """Time a bundle; the kinds of work take turns, so that a slow moment of the device meets all of them.

    Args:
        view: A bundle with a gate.
        rounds: How often each is done.
        seed: Of the tokens.

    Raises:
        BundleError: The graph cannot be computed.
    """
    rng = np.random.default_rng(seed)
    works = _causal(view, rng) if reading(view.manifest.task).writes else _of_texts(view, rng)
    works.append(("swap a gate", "ms", _swap(view)))
    found: dict[str, list[float]] = {name: [] for name, _, _ in works}
    for number in range(rounds + 1):
        for name, _, work in works:
            taken = work()
            if number:  # the first warms up
                found[name].append(taken)
    return [_figure(name, unit, found[name]) for name, unit, _ in works]


def memory() -> dict[str, float]:
    """Memory of this process in MiB: resident now and at most; empty where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _peak()
    entries = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        name: int(entries[key].split()[0]) / 1024
        for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))
        if key in entries
    }


def _peak() -> dict[str, float]:
    try:
        import resource  # noqa: PLC0415  # not on Windows
    except ImportError:
        return {}
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}


def _figure(name: str, unit: str, values: list[float]) -> Figure:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Figure(name, unit, float(median), float(low), float(high))


def _ids(view: View, rng: np.random.Generator, batch: int, tokens: int) -> np.ndarray:
    """Random tokens that the bundle knows for certain: those of its golden inputs."""
    known = sorted({i for golden in view.manifest.golden for i in golden.input_ids}) or [0]
    return rng.choice(np.array(known, np.int64), (batch, tokens))


def _of_texts(view: View, rng: np.random.Generator) -> list[tuple[str, str, Callable[[], float]]]:
    works: list[tuple[str, str, Callable[[], float]]] = []
    longest, how = view.manifest.task.max_length, reading(view.manifest.task)
    what = "classify" if how.several else "read"
    for batch, tokens in dict.fromkeys((batch, min(tokens, longest)) for batch, tokens in _SHAPES):
        encoded = _ids(view, rng, batch, tokens).tolist()

        def work(encoded: list[list[int]] = encoded) -> float:
            compute = view.logits_of_tokens if how.by_token else view.logits
            return 1e3 * _seconds(lambda: compute(encoded))

        works.append((f"{what} {batch} x {tokens} tokens", "ms", work))
    return works


def _causal(view: View, rng: np.random.Generator) -> list[tuple[str, str, Callable[[], float]]]:
    task = view.manifest.task
    prompt = max(1, min(128, task.max_length - _DECODED - 1))
    decoded = max(1, min(_DECODED, task.max_length - prompt))
    ids = _ids(view, rng, 1, prompt + decoded)[0].tolist()
    cache = view.cache()

    def prefill() -> float:
        cache.cut(0)
        return prompt / _seconds(lambda: view.read(cache, ids[:prompt]))

    def decode() -> float:
        view.read(cache, ids[:prompt])
        return decoded / _seconds(lambda: [view.read(cache, ids[: prompt + n + 1]) for n in range(decoded)])

    return [(f"prefill {prompt} tokens", "tokens/s", prefill), (f"decode after {prompt}", "tokens/s", decode)]


def _swap(view: View) -> Callable[[], float]:
    one, other = view.with_gate(view.gate), view.gate

    def work() -> float:
        return 1e3 * _seconds(lambda: one.swap_gate(other))

    return work


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return max(time.perf_counter() - begin, 1e-9)
