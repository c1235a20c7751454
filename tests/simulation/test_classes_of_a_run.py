"""Which class is taken for which, from the clients to summary, terminal and report."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
import tiny_world
from rich.console import Console

from molehill.intervals import of_share
from molehill_simulation.figures import Confusion
from molehill_simulation.report import write_report
from molehill_simulation.simulate import simulate
from molehill_simulation.summary import read_summary
from molehill_simulation.ui import show_summary


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    base = tiny_world.save_base(folder / "base", "bert", initializer_range=0.2)
    rows = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(60))
    config = tiny_world.config(base, rows, evaluate={"baselines": True}, train={"steps": 10, "lr": 2e-2})
    simulate(config, folder / "run")
    return folder / "run"


def test_counts_are_those_of_the_clients_rows_and_of_their_accuracies(run):
    summary = read_summary(run / "summary.json")
    labels = summary.confusion.labels
    held_out = {label: sum(counts[label][1] for counts in summary.classes.values()) for label in labels}
    for stage in ("global_", "personalised"):
        counts = np.array(summary.confusion.counts[stage.removesuffix("_")])
        assert dict(zip(labels, counts.sum(1).tolist(), strict=True)) == held_out
        right = sum(client.n_test * getattr(client, stage) for client in summary.clients)
        assert counts.trace() == pytest.approx(right)
        for at, label in enumerate(labels):
            share = counts[at, at] / held_out[label]
            assert getattr(summary.recall[label], stage) == pytest.approx(share)
            interval = summary.recall[label].interval[stage.removesuffix("_")]
            assert interval == pytest.approx(of_share(share, held_out[label]))
    assert set(summary.confusion.counts) == {"global", "personalised"}
    assert {label: recall.n for label, recall in summary.recall.items()} == {k: n for k, n in held_out.items() if n}


def test_every_figure_has_an_interval_around_it(run):
    summary = read_summary(run / "summary.json")
    rows = [*summary.clients, summary.mean, summary.worst]
    for name in ("macro_f1", "loss"):
        spread = getattr(summary, name)
        rows += [*(getattr(client, name) for client in summary.clients), spread.mean, spread.worst]
    for figures in rows:
        for value, (low, high) in zip(figures.row, figures.intervals, strict=True):
            assert low <= value <= high
            assert low < high
    first = summary.clients[0]
    assert first.interval["base"] == pytest.approx(of_share(first.base, first.n_test))


def test_terminal_and_report_tell_them(run):
    summary = read_summary(run / "summary.json")
    console = Console(file=StringIO(), width=80)
    show_summary(summary, console)
    told = " ".join(console.file.getvalue().split())
    label, recall = next(iter(summary.recall.items()))
    low, high = recall.interval["personalised"]
    said = f"{label} {recall.personalised:.3f} ({low:.3f} to {high:.3f}) of {recall.n}"
    assert f"recall of the personalised models: {said}" in told
    low, high = summary.mean.interval["personalised"]
    text = write_report(run).read_text("utf-8")
    assert "Which class is taken for which" in text
    assert f"<small>{f'{low:.3f}'[1:]}\u2013{f'{high:.3f}'[1:]}</small>" in text
    count = summary.confusion.counts["personalised"][0][1]
    row = text.split("Which class is taken for which</h2>")[1].split("</tr>")[1]
    assert f"%<small>{count}</small>" in row


def test_recall_is_told_of_every_client_beside_its_rows(run):
    summary = read_summary(run / "summary.json")
    text = write_report(run).read_text("utf-8").split("<h2>Classes</h2>")[1].split("</section>")[0]
    hits = dict.fromkeys(summary.confusion.labels, 0.0)
    for client in summary.clients:
        counts = summary.classes[client.id]
        assert {label: recall.n for label, recall in client.recall.items()} == {
            label: held_out for label, (_, held_out) in counts.items() if held_out
        }
        row = text.split(f">{client.id}</th>")[1].split("</tr>")[0]
        for label, recall in client.recall.items():
            hits[label] += recall.personalised * recall.n
            assert recall.interval["personalised"] == pytest.approx(of_share(recall.personalised, recall.n))
            assert f"<td>{recall.personalised:.3f}<small>" in row
            assert f"<small>{counts[label][0]}+{recall.n} rows</small>" in row
    personalised = summary.confusion.counts["personalised"]
    assert list(hits.values()) == pytest.approx([personalised[at][at] for at in range(len(hits))])


def test_no_class_counts_leave_a_client(run):
    events = tiny_world.events(run, "evaluation")
    assert {len(event["stages"]) for event in events} == {4}
    assert "confusion" not in json.dumps(events)


def test_counts_of_clients_are_added_up():
    first, second = (
        Confusion.of(["a", "b"], counts) for counts in ({"global": [[1, 2], [3, 4]]}, {"global": [[10, 0], [0, 0]]})
    )
    found = Confusion.over([first, second, Confusion.of(["a", "b"], {})])
    assert found.counts == {"global": ((11, 2), (3, 4))}
    assert found.recall["a"].n == 13
    assert found.recall["a"].global_ == 11 / 13
    assert found.recall["b"].interval == {"global": of_share(4 / 7, 7)}
    assert second.recall.keys() == {"a"}
