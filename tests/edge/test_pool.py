"""Threads of a bundle: what is given stays, the rest is measured once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import edge_graphs
import numpy as np
import onnxruntime as ort
import pytest

from molehill_edge import pool
from molehill_edge.bundle import Bundle
from molehill_edge.pool import Pool, choose
from molehill_edge.trust import InsecureLocal

TRUST = InsecureLocal(lambda _: None)


@pytest.mark.parametrize("spin", [False, True])
def test_what_is_given_is_not_measured(spin, monkeypatch):
    monkeypatch.setattr(pool, "_open", lambda _: pytest.fail("opened"))
    assert choose(1, 3, spin=spin) == Pool(3, spin)
    assert choose(1, 1) == choose(1, 1, spin=spin) == Pool(1, spin=False)  # one thread has nobody to wait for


def test_the_rest_is_measured_once_and_is_one_of_the_ways(monkeypatch):
    monkeypatch.setattr(pool, "processors", lambda: 2)
    pool._fastest.cache_clear()
    found = choose(1)
    assert found.measured
    assert (found.threads, found.spin) in {(1, False), (2, False), (2, True)}
    monkeypatch.setattr(pool, "_open", lambda _: pytest.fail("opened"))
    assert choose(1) is found
    pool._fastest.cache_clear()


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ((1.0, 0.95, 0.95), Pool(1, spin=False)),  # not worth another's processor
        ((1.0, 0.7, 0.69), Pool(2, spin=False)),
        ((1.0, 2.5, 0.6), Pool(2, spin=True)),
    ],
)
def test_more_threads_and_spinning_must_be_worth_it(seconds, best, monkeypatch):
    clock = [0.0]

    class Timed:
        def __init__(self, way):
            self.takes = seconds[way.threads - 1 + way.spin]

        def run(self, *_):
            clock[0] += self.takes

    monkeypatch.setattr(pool, "processors", lambda: 2)
    monkeypatch.setattr(pool, "_open", Timed)
    monkeypatch.setattr(pool.time, "perf_counter", lambda: clock[0])
    pool._fastest.cache_clear()
    found = choose(32)
    assert (found.threads, found.spin) == (best.threads, best.spin)
    pool._fastest.cache_clear()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities")
def test_a_process_of_one_processor_has_one_thread():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    code += "; from molehill_edge.pool import choose; print(choose(1))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "Pool(threads=1, spin=False, measured=False)"


def test_the_graph_is_what_the_script_writes():
    path = Path(__file__).parents[2] / "scripts" / "pool_graph.py"
    spec = importlib.util.spec_from_file_location("pool_graph", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PATH.read_bytes() == script.graph()
    x = np.random.default_rng(0).standard_normal((3, script.WIDTH), np.float32)
    w = np.eye(script.WIDTH, dtype=np.float32)
    assert (ort.InferenceSession(script.PATH).run(None, {"x": x, "w": w})[0] == x).all()


def test_a_bundle_says_how_it_computes_and_computes_the_same(tmp_path):
    edge_graphs.causal(tmp_path / "talk", says="yes, cat!", template=edge_graphs.CHATML)
    answers = []
    for threads, spin in ((1, False), (2, False), (2, True)):
        with Bundle.open(tmp_path / "talk", trust=TRUST, threads=threads, spin=spin) as bundle:
            assert bundle.pool == Pool(threads, spin)
            answers.append(bundle.generate("the cat", max_new_tokens=8).text)
    assert len(set(answers)) == 1
