"""Simulations are killed at random moments and go on: they end as if nothing had been, and nothing is lost.

A few kills of every variant here; ``make nightly`` does a hundred of each and prints the table.
"""

from __future__ import annotations

import os
import random
import signal
import time
import warnings

import pytest
import tiny_world
import torch

from molehill.wire.message import digest
from molehill_server.audit import verify
from molehill_simulation.simulate import simulate
from molehill_simulation.summary import read_summary

KILLS = 100 if os.environ.get("MOLEHILL_NIGHTLY") else 2
VARIANTS = {
    "plain": {"wire": {"up": "fp32"}},
    "error feedback": {
        "wire": {"up": {"name": "compeft", "density": 0.2}},
        "scenario": {"stragglers": 0.3, "delay": 50.0},
        "round": {"quorum": 0.3, "grace": 1.0, "deadline": 60.0},
    },
    "secure aggregation": {"wire": {"up": "fp32"}, "privacy": {"secure_aggregation": True}},
    "server state, own gates": {
        "federation": {"server_opt": {"name": "adam", "lr": 1e-2}},
        "personal": {"gate": "personal", "head": "personal"},
    },
    "groups": {"engine": {"workers": 1, "together": 2}, "federation": {"preset": "fedex"}},
}


def in_a_process(settings, out, kill_after=None):
    """Run in a process of its own; returns whether it came to its end before it was killed, and the seconds."""
    began = time.monotonic()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forks beside threads
        process = os.fork()
    if not process:
        code = 1
        try:
            simulate(settings, out)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        while time.monotonic() - began < kill_after:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                assert os.waitstatus_to_exitcode(status) == 0
                return True, time.monotonic() - began
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return not os.WIFSIGNALED(status), time.monotonic() - began


def end_of(out):
    """All that must not depend on kills; under secure aggregation nobody knows the single deltas."""
    summary = read_summary(out / "summary.json")
    assert (summary.unscored, summary.anew) == ({}, ())
    kept = {
        name: (state.tree.digest, state.memory.digest, state.owed.digest, state.round)
        for name, state in tiny_world.states(out).items()
    }
    figures = [(client.id, client.row, client.n_train, client.n_test) for client in summary.clients]
    verify(out / "audit.jsonl")
    return digest((out / "final.safetensors").read_bytes()), kept, figures


@pytest.mark.parametrize("variant", VARIANTS)
def test_kills_change_nothing_and_lose_nothing(config, tmp_path, variant):
    settings = config(run={"rounds": 3}, **VARIANTS[variant])
    torch.set_num_threads(1)
    simulate(settings, tmp_path / "warm")  # what is loaded now, children need not load
    _, seconds = in_a_process(settings, tmp_path / "whole")
    end, chance = end_of(tmp_path / "whole"), random.Random(variant)
    kills = runs = 0
    while kills < KILLS:
        out, done = tmp_path / f"run-{runs}", False
        while not done and kills < KILLS:
            fresh = not out.exists()
            done, took = in_a_process(settings, out, chance.uniform(0, seconds))
            kills += not done
            if done and fresh:  # the machine is less busy than it was, and kills come too late
                seconds = min(seconds, took)
        if not done:
            in_a_process(settings, out)
        runs += 1
        assert end_of(out) == end, f"{variant}: run {runs} after {kills} kills"
        assert not list(out.rglob(".*.part"))
        print(f"{variant}: {kills} kills, {runs} runs ended equal, nothing lost")  # noqa: T201 - for `make nightly`
