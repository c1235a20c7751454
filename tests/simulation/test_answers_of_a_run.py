"""Answers that the final models of a run write to held-out rows, from the client to the report."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
import tiny_world
from rich.console import Console

from molehill import registry
from molehill.errors import ConfigError, DataError
from molehill.tasks.batches import IGNORE, Example
from molehill.tasks.causal_lm import CausalLM
from molehill_client.state import Sample, StateStore
from molehill_server.check import require
from molehill_simulation.loaded import load
from molehill_simulation.report import write_report
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source
from molehill_simulation.summary import read_summary
from molehill_simulation.ui import show_summary

SIZES = {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
PARTS = {
    "task": {"kind": "causal-lm", "max_length": 32},
    "molora": {"targets": "all-linear", "experts": 2, "rank": 4, "scope": "layer", "alpha": 16.0},
    "train": {"steps": 60, "lr": 2e-2, "batch_size": 16},
    "run": {"rounds": 1},
    "evaluate": {"generate": 4},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    base = tiny_world.save_base(folder / "base", "llama", hidden_size=32, **SIZES)
    rows = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(90, "llama"))
    simulate(tiny_world.config(base, rows, **PARTS), folder / "run")
    return folder / "run"


def test_answers_are_those_of_the_loaded_run(run):
    """What a client wrote is what ``molehill generate`` writes with its gate."""
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 12
    for name in ("client-1", "client-3"):
        with load(run, name) as model:
            for each in samples:
                if each["client"] == name:
                    assert model.generate(each["question"]).text.strip() == each["answer"].strip()


def test_the_sums_are_of_what_was_kept(run):
    samples = json.loads((run / "samples.json").read_text())
    summary = read_summary(run / "summary.json")
    for client in summary.clients:
        mine = [each for each in samples if each["client"] == client.id]
        right = [each["answer"].split() == each["reference"].split() for each in mine]
        assert client.answered == len(mine) == 4
        assert client.exact_match.personalised == np.mean(right)
        assert client.exact_match.base is None
        assert 0 <= client.exact_match.global_ <= client.normalised_match.global_ <= 1
        assert client.rouge_l.personalised >= client.exact_match.personalised
    assert summary.rouge_l.mean.personalised == pytest.approx(
        np.mean([client.rouge_l.personalised for client in summary.clients])
    )
    assert summary.rouge_l.mean.personalised > 0
    console = Console(file=StringIO(), width=80)
    show_summary(summary, console)
    told = " ".join(console.file.getvalue().split())
    assert (
        f"mean of personalised answers to 12 held-out rows: exact match {summary.exact_match.mean.personalised:.3f}"
        in told
    )


def test_the_report_shows_figures_and_some_answers(run):
    text = write_report(run).read_text("utf-8")
    summary, first = read_summary(run / "summary.json"), json.loads((run / "samples.json").read_text())[0]
    assert f"<td>{summary.chrf.worst.personalised:.3f}<small>" in text
    assert f"<dd>{first['reference']}</dd>" in text
    kept = (run / "samples.json").read_bytes()
    try:
        (run / "samples.json").write_text(json.dumps([{**first, "answer": "<script>x</script>"}] * 30))
        text = write_report(run).read_text("utf-8")
        assert "<script" not in text
        assert text.count("<dt>written</dt>") == 12
        (run / "samples.json").write_text('[{"client": 1}]')
        with pytest.raises(DataError, match="not what Molehill writes"):
            write_report(run)
    finally:
        (run / "samples.json").write_bytes(kept)


def test_the_texts_stay_with_the_client(run):
    """They are in no event and no summary; on the client's disk they are encrypted, for this client alone."""
    samples = json.loads((run / "samples.json").read_text())
    shown = [path for path in run.rglob("*") if path.is_file() and path.name not in {"samples.json", "report.html"}]
    data = b"\n".join(path.read_bytes() for path in shown)
    assert [each for each in samples if each["question"].encode() in data] == []
    (event, *_) = tiny_world.events(run, "evaluation")
    assert set(event["answers"]) == {"global", "personalised"}
    assert not [
        value for said in event["answers"].values() for value in said.values() if not isinstance(value, int | float)
    ]
    assert (run / "samples.json").stat().st_mode & 0o77 == 0
    digest = json.loads((run / "summary.json").read_text())["base_model"]["digest"]
    kept = StateStore(run / "clients" / "client-1", "tiny", digest).load_findings().samples
    assert kept == [Sample(e["question"], e["reference"], e["answer"]) for e in samples if e["client"] == "client-1"]


def test_rows_whose_answer_was_cut_are_not_asked(run):
    task = CausalLM(open_source(run).tokenizer, 6)
    end = task.end
    assert task.last_answer(Example([5, 6, 7, 8, end], [IGNORE, IGNORE, 7, 8, end])) == ([5, 6], [7, 8, end])
    assert task.last_answer(Example([5, 6, 7, 8, 9, 9], [IGNORE, IGNORE, 7, 8, 9, 9])) is None
    assert task.last_answer(Example([7, end], [7, end])) is None
    turns = Example([5, 7, end, 6, 8, end], [IGNORE, 7, end, IGNORE, 8, end])
    assert task.last_answer(turns) == ([5, 7, end, 6], [8, end])


def test_what_cannot_write_is_refused(tmp_path, monkeypatch):
    classifier = tiny_world.config(tmp_path, tmp_path, evaluate=PARTS["evaluate"])
    with pytest.raises(ConfigError, match="a classification writes no answers"):
        require(classifier)
    writer = tiny_world.config(tmp_path, tmp_path, **PARTS)
    require(writer)
    monkeypatch.setattr(registry.get("selector", writer.molora.selector.name).target, "causal", False, raising=False)
    with pytest.raises(ConfigError, match=r"looks at later tokens.*; use selector "):
        require(writer)
