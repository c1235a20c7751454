"""Which class is taken for which, from the clients to summary, terminal and report."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
import tiny_world
from rich.console import Console

from molehill.intervals import of_average, of_share
from molehill_client.state import store_in
from molehill_simulation.card import render
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


def test_the_gain_over_alone_is_that_of_the_rows_from_the_clients_to_whoever_reads_it(run):
    summary = read_summary(run / "summary.json")
    assert summary.gains.keys() == {"accuracy", "macro_f1", "loss"}
    for client in summary.clients:
        kept = store_in(run, client.id).load_row_scores()
        assert len(kept.units) == client.n_test
        right = {stage: found.parts["accuracy"].above for stage, found in kept.stages.items()}
        assert right.keys() == {"base", "local", "global", "personalised"}
        for stage, value in zip(("base", "local", "global", "personalised"), client.row, strict=True):
            assert right[stage].mean() == pytest.approx(value)
        difference = right["personalised"] - right["local"]
        assert client.gains["accuracy"].value == pytest.approx(difference.mean())
        assert client.gains["accuracy"].value == pytest.approx(client.personalised - client.local)
        assert client.gains["macro_f1"].value == pytest.approx(client.macro_f1.personalised - client.macro_f1.local)
        assert client.gains["loss"].value == pytest.approx(client.loss.local - client.loss.personalised)
    for name, over in summary.gains.items():
        each = [client.gains[name] for client in summary.clients]
        values = [gain.value for gain in each]
        assert over.mean.value == pytest.approx(np.mean(values))
        assert over.mean.interval == pytest.approx(of_average(values, [gain.interval for gain in each]))
        assert over.worst.value == min(values)
        assert over.client == summary.clients[int(np.argmin(values))].id
        beyond = [gain.interval[0] > 0 for gain in each], [gain.interval[1] < 0 for gain in each]
        assert [over.gained, over.lost] == [*map(sum, beyond)]
        assert over.gained + over.lost + over.neither == 3
    console = Console(file=StringIO(), width=80)
    show_summary(summary, console)
    told, page, card = console.file.getvalue(), write_report(run).read_text("utf-8"), render(run)["README.md"]
    assert "Gain over alone" in told
    for name, title in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1")):
        mean, over = summary.gains[name].mean, summary.gains[name]
        low, high = mean.interval
        written = f"{mean.value:+.3f} ({low:+.3f} to {high:+.3f})"
        assert (
            over.counted == f"{over.gained} gain and {over.lost} lose more than their interval, {over.neither} neither"
        )
        assert all(written in text for text in (told, page, card))
        assert f"{title.lower()[0]}{title[1:]}: {over.counted}" in " ".join(told.split()).replace("Macro", "macro")
        assert f"<strong>{title}</strong>: {over.counted}. The mean is {written}" in page
        assert over.counted in card
    assert page.count('class="gain') == 2 * (1 + 3 + 1)


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
