"""Diagnostics of a run: in its summary and its report, and once more from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_world
from typer.testing import CliRunner

from molehill.cli import app
from molehill.wire.store import load_tree

PROBES = {"probes": ["load", "coactivation"], "baselines": False}


def told(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.stdout, result.output


def test_probes_of_a_run(finished, bert, source):
    summary, folder = finished(evaluate=PROBES, run={"rounds": 1})
    assert summary.probes.keys() == {"load", "coactivation"}
    figures = summary.probes["load"]
    sites = {key.partition("/")[0] for key in figures}
    assert len(sites) == 4
    for site in sites:
        assert figures[f"{site}/chosen/e0"] + figures[f"{site}/chosen/e1"] == pytest.approx(2)  # top 2 of two
        assert figures[f"{site}/mass/e0"] + figures[f"{site}/mass/e1"] == pytest.approx(1)
        assert summary.probes["coactivation"][f"{site}/e0/e1"] == pytest.approx(1)
    sums = [event["probes"]["load"] for event in tiny_world.events(folder, "evaluation")]
    site = min(sites)
    tokens = sum(each[site][5] for each in sums)
    assert figures[f"{site}/mass/e0"] == pytest.approx(sum(each[site][0] for each in sums) / tokens)
    stored = json.loads((folder / "summary.json").read_text())
    assert stored["probes"]["load"] == figures
    assert "Probe coactivation" in (folder / "report.html").read_text()

    # A client's own gate and rows; then all rows with what all share; then rows of a file with the adapter alone.
    first = summary.clients[0]
    own = json.loads(told("probe", folder, "--gate", first.id, "--json")[1])
    mine = next(e for e in tiny_world.events(folder, "evaluation") if e["client"] == first.id)["probes"]["load"]
    assert own["rows"] == first.n_test
    for site, row in mine.items():
        assert own["probes"]["load"][f"{site}/mass/e0"] == pytest.approx(row[0] / row[5], abs=1e-4)
    everybody = json.loads(told("probe", folder, "--json")[1])
    assert everybody["rows"] == sum(client.n_test for client in summary.clients)
    code, text, _ = told("probe", folder, "--probe", "load")
    assert code == 0
    assert "entropy" in text
    code, _, said = told("probe", folder, "--probe", "lode")
    assert code == 2
    assert "unknown diagnostic 'lode'" in said
    code, text, said = told("probe", folder / "adapter", "--rows", source, "--base", bert, "--json")
    assert code == 0, said
    assert json.loads(text)["probes"].keys() == {"load", "coactivation"}


def test_a_run_with_rules(finished):
    """Two runs whose only difference is how FedProx is written end alike; without it, otherwise."""
    ends = {}
    for name, train in {
        "short": {"prox": 0.5},
        "long": {"rules": [{"name": "fedprox", "mu": 0.5}]},
        "none": {},
    }.items():
        _, folder = finished(name, train=train, run={"rounds": 1})
        ends[name] = load_tree(folder / "final.safetensors")[0].flat
    np.testing.assert_array_equal(ends["short"], ends["long"])
    assert (ends["short"] != ends["none"]).any()
