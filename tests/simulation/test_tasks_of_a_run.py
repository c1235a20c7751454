"""Every kind of task, from a file through a simulation to summary, terminal and report."""

from __future__ import annotations

from io import StringIO

import pytest
import tiny_world
from rich.console import Console

from molehill.errors import ConfigError
from molehill.tasks.kind import kind_of
from molehill_simulation.report import render
from molehill_simulation.simulate import simulate
from molehill_simulation.summary import read_summary
from molehill_simulation.ui import show_summary

POINTS = {"negative": 1.0, "neutral": 2.5, "positive": 5.0}


def numbers():
    return [{**row, "label": POINTS[row["label"]]} for row in tiny_world.rows(90)]


def pairs():
    rows = tiny_world.rows(60)
    return [
        {"text": one["text"], "text_pair": two["text"], "label": str(one["label"] == two["label"])}
        for one, two in zip(rows, rows[1:] + rows[:1], strict=True)
    ]


def tags():
    more = {"tokens": ["the", "bad", "fun", "page"], "tags": ["O", "B-FEELING", "I-FEELING", "B-DOMAIN"]}
    return [*tiny_world.tagged(150), more]  # enough for the base to find some


def flags():
    found = [
        {"text": row["text"], "labels": [row["domain"], *([row["label"]] if row["label"] != "neutral" else [])]}
        for row in tiny_world.rows(90)
    ]
    return [*found, {"text": "the page", "labels": []}]


ROWS = {"regression": numbers, "classification": pairs, "multi-label": flags, "token-classification": tags}


@pytest.fixture(scope="module", params=ROWS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny_world.save_base(folder / "base", "bert", initializer_range=0.2)
    rows = tiny_world.write_rows(folder / "rows.jsonl", ROWS[request.param]())
    config = tiny_world.config(
        base, rows, task={"kind": request.param, "max_length": 32}, evaluate={"baselines": True},
        train={"steps": 10, "lr": 2e-2}, engine={"together": 3},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


def test_all_that_a_task_measures_is_in_the_summary(run):
    summary = read_summary(run / "summary.json")
    kind = kind_of(summary.task)
    for measure in kind.measures:
        figures = [client.of(measure) or client for client in summary.clients]
        assert all(value is not None for each in figures for value in each.row), measure.name
        for each in figures:
            for value, (low, high) in zip(each.row, each.intervals, strict=True):
                assert low <= value <= high
    best = min if summary.measure.lower else max
    assert summary.worst.personalised == [max, min][best is max](client.personalised for client in summary.clients)


def test_the_gain_over_alone_is_that_of_its_figures(run):
    summary = read_summary(run / "summary.json")
    assert summary.measure.name in summary.gains
    for measure in kind_of(summary.task).measures:
        for client in summary.clients if measure.name in summary.gains else ():
            figures, gain = client.of(measure) or client, client.gains[measure.name]
            sign = -1 if measure.lower else 1
            assert gain.value == pytest.approx(sign * (figures.personalised - figures.local)), measure.name
            assert gain.interval[0] <= gain.value <= gain.interval[1]
    out = StringIO()
    show_summary(summary, Console(file=out, width=100))
    first = summary.gained[0]
    assert summary.gains[first.name].mean.told(first) in out.getvalue()
    assert summary.gains[first.name].counted in " ".join(out.getvalue().split())
    assert "Gain over alone" in render(run)


def test_something_was_learnt(run):
    losses = [event["loss"] for event in tiny_world.events(run, "round")]
    assert losses[-1] < losses[0]


def test_terminal_and_report_say_what_was_measured(run):
    summary, out = read_summary(run / "summary.json"), StringIO()
    show_summary(summary, Console(file=out, width=100))
    page = render(run)
    for measure in summary.columns:
        assert measure.title.casefold() in out.getvalue().casefold()
        assert measure.title in page
    assert summary.columns[0].write(summary.mean.personalised) in page


def test_every_type_of_entities_has_its_f1(run):
    summary = read_summary(run / "summary.json")
    if not kind_of(summary.task).spans:
        assert not summary.type_f1
        return
    right = {client.id: client.type_f1 for client in summary.clients}
    assert summary.type_f1.keys() == {"DOMAIN", "FEELING"}
    for name, score in summary.type_f1.items():
        assert score.n == sum(found[name].n for found in right.values() if name in found)
        assert score.n == sum(counts[name][1] for counts in summary.classes.values())
        low, high = score.interval["personalised"]
        assert low <= score.personalised <= high
    out = StringIO()
    show_summary(summary, Console(file=out, width=200))
    assert (
        f"F1 of entities of the personalised models: DOMAIN {summary.type_f1['DOMAIN'].personalised:.3f}"
        in out.getvalue()
    )
    page = render(run)
    assert "Which tag is taken for which" in page
    assert "type of entities the F1" in page


def test_an_objective_that_needs_classes_is_refused(tmp_path):
    base = tiny_world.save_base(tmp_path / "base", "bert")
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", numbers())
    config = tiny_world.config(base, rows, task={"kind": "regression"}, train={"objective": "dft"})
    with pytest.raises(ConfigError, match="objective 'dft' cannot be computed for regression; use 'sft'"):
        simulate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
