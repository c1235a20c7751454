"""The installed command, from bad input to a finished run: documents, exit codes, one paragraph and no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_world
from typer.testing import CliRunner

from molehill.cli import app

FIGURES = {"base", "local", "global", "personalised", "interval"}
GARBAGE = {
    "client-1": ("nan", "finite"),
    "client-2": ("shape", "shape"),
    "client-3": ("huge", "norm"),
    "client-4": ("keys", "nobody asked for this tensor"),
    "client-5": ("bytes", "cut short"),
}


@pytest.fixture
def toml(config, tmp_path):
    """Write a configuration file."""

    def write(**sections):
        path = tmp_path / "run.toml"
        path.write_text(config(**sections).to_toml())
        return path

    return write


def molehill(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result, code, message):
    """It ended with one paragraph on standard error and this code."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert last.endswith((".", "!", "?"))
    assert "Traceback" not in result.output
    return last


SETTINGS = [
    ("train.learning_rate=1", 2, r"--set train\.learning_rate: unknown key 'train\.learning_rate'.*Known keys: "),
    ("run.ruonds=1", 2, "Did you mean 'rounds'"),
    ("train.steps=many", 2, r"train\.steps: Input should be a valid integer.*Given: 'many'"),
    ("train.lr=-1", 2, "greater than 0"),
    ("molora.selector=best", 2, "unknown selector 'best'"),
    ("molora.selector.m=3", 2, "unknown key 'm' for selector 'top_k'"),
    ("federation.preset=magic", 2, "unknown federation 'magic'"),
    ("personal.gate=mixture", 2, "those that do there is 'leaning'"),
    ("base.device=abacus", 2, "no device 'abacus'"),
    ("base.device=meta", 2, "no device 'meta'"),
    ('molora.targets=["qeury"]', 4, "qeury"),
    ('molora.targets=["("]', 4, r"molora\.targets: '\(' is no regular expression"),
    ("molora.targets=[]", 2, r"--set molora\.targets: molora\.targets: .* should have at least 1 item"),
    ("molora.targets=5", 2, r"--set molora\.targets: molora\.targets: Input should be a valid list\. Given: 5"),
    ("molora.losses=['entropy']", 2, r": molora\.losses\.0\.coef: Field required"),
    ("molora=5", 2, r": molora: Input should be a valid table"),
    ("molora.layers=[7]", 4, "7"),
    ("federation.policy={name='mixed_rank', ranks=[]}", 2, r"policy 'mixed_rank': ranks must"),
    ("data.partition={name='by_column', column='domian'}", 3, r"no column 'domian' .*Name one in data\.partition"),
    ("base.model=/nowhere/model", 4, "/nowhere/model"),
    ('task.labels=["positive","negative"]', 3, r"rows\.jsonl:\d+: label 'neutral' is not in task\.labels"),
    ('task.labels=["positive","neutral","positive"]', 2, r"task\.labels: label 'positive' is there twice"),
    ("data.clients=500", 3, "there are 60 rows for 500 clients"),
    ("data.source=missing.jsonl", 3, r"missing\.jsonl: cannot read the file"),
    ("data.columns.text=review", 3, "there is no column 'review'"),
    ("task.max_length=4000", 4, "the model takes 64 tokens"),
    ("nonsense", 2, "Write --set section.key=value"),
]


@pytest.mark.parametrize(("setting", "code", "message"), SETTINGS, ids=[setting for setting, _, _ in SETTINGS])
def test_a_wrong_setting_is_one_paragraph_and_leaves_no_run(toml, tmp_path, setting, code, message):
    out = tmp_path / "out"
    refused(molehill("simulate", toml(), "--out", out, "--set", setting), code, message)
    assert not out.exists()
    envelope = molehill("simulate", toml(), "--out", out, "--set", setting, "--json")
    assert envelope.exit_code == code
    error = json.loads(envelope.stdout)["error"]
    assert set(error) == {"kind", "code", "what", "where", "mend"}
    assert error["code"] == code


GOOD = json.dumps({"text": "it was good", "label": "positive"}).encode()
FILES = {
    "empty": (b"", "the file is empty"),
    "blank": (b"\n  \n", "the file is empty"),
    "not UTF-8": (GOOD + b'\n{"text": "caf\xe9", "label": "positive"}\n', r"rows\.jsonl:2: not UTF-8 text"),
    "not JSON": (GOOD + b"\n{text: 1}\n", r"rows\.jsonl:2: not JSON"),
    "no text": (GOOD + b'\n{"label": "negative"}\n', r"rows\.jsonl:2: the row has no 'text'"),
    "no label": (GOOD + b'\n{"text": "it was bad"}\n', r"rows\.jsonl:2: the row has no 'label'"),
    "no such column": (b'{"review": "good", "label": "positive"}\n{"review": "bad", "label": "x"}', "no column 'text'"),
    "a number": (GOOD + b'\n{"text": 3, "label": "negative"}\n', r"rows\.jsonl:2: 'text' must be text"),
    "one label": (GOOD, "every row has the label 'positive'"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_data_file_is_one_paragraph_that_names_the_line(toml, tmp_path, name):
    content, message = FILES[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    result = molehill("simulate", toml(), "--out", tmp_path / "out", "--set", f"data.source={tmp_path}/rows.jsonl")
    refused(result, 3, message)
    assert not (tmp_path / "out").exists()


def test_a_bad_configuration_file_is_one_paragraph_that_names_the_line(tmp_path):
    path = tmp_path / "run.toml"
    for content, message in [
        (b"[train]\nsteps = 'two'\n", r"run\.toml:2: train\.steps"),
        (b"[train\n", r"run\.toml: not valid TOML"),
        (b"\xff\xfe", r"run\.toml: cannot read the configuration: it is not UTF-8"),
    ]:
        path.write_bytes(content)
        refused(molehill("simulate", path, "--out", tmp_path / "out"), 2, message)
    refused(molehill("simulate", tmp_path / "absent.toml", "--out", tmp_path / "out"), 2, "No such file")


def test_a_loss_that_is_not_finite_says_what_to_do(toml, tmp_path):
    result = molehill("simulate", toml(), "--out", tmp_path / "out", "--set", "train.lr=1e30")
    refused(result, 9, r"round 1 is below its quorum: 0 of 3 .*client-1: .*(loss|gradient) is .*Lower train\.lr")


def test_clients_of_whom_none_can_be_scored_are_no_success(toml, tmp_path):
    result = molehill("simulate", toml(), "--out", tmp_path / "out", "--set", "personal.head_lr=1e38")
    refused(result, 9, r"no client could be scored with the final model: client-1: .*(loss|gradient) is ")
    assert "Evaluation: no scores of client-1: " in result.stdout
    assert molehill("report", tmp_path / "out").exit_code == 0
    assert "Missing scores" in (tmp_path / "out" / "report.html").read_text()


def test_clients_that_send_garbage_are_quarantined_with_the_reason_and_the_run_goes_on(toml, tmp_path):
    kinds = {client: kind for client, (kind, _) in GARBAGE.items()}
    path = toml(data={"clients": 10}, scenario={"garbage": kinds}, wire={"up": "fp32"})
    result = molehill("simulate", path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    rounds = tiny_world.events(tmp_path / "out", "round")
    assert len(rounds) == 2
    html = (tmp_path / "out" / "report.html").read_text()
    for event in rounds:
        assert set(event["quarantined"]) == set(GARBAGE)
        assert len(event["accepted"]) == 5
        for client, (_, reason) in GARBAGE.items():
            assert reason in event["quarantined"][client]
    for client, (_, reason) in GARBAGE.items():
        assert client in html
        assert reason in html
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["clients"]) == 10
    assert summary["bytes_up"] == sum(event["bytes_up"] for event in rounds)


def test_a_folder_is_resumed_as_what_it_is_or_not_at_all(toml, tmp_path):
    out = tmp_path / "out"
    assert molehill("simulate", toml(), "--out", out).exit_code == 0
    refused(molehill("simulate", toml(), "--out", out), 7, "the run folder is not empty")
    again = molehill("simulate", toml(), "--out", out, "--resume", "--set", "train.lr=0.5")
    refused(again, 7, r"another configuration, train\.lr differ")
    refused(molehill("simulate", "--out", tmp_path / "new", "--resume"), 7, "no run to resume")
    before = json.loads((out / "summary.json").read_text())
    resumed = molehill("simulate", "--out", out, "--resume", "--json")
    assert {**json.loads(resumed.stdout), "seconds": 0} == {**before, "seconds": 0}


def stopped(path, out, when):
    """The error that a run ends with which gets Ctrl-C as soon as ``when()``."""
    running = subprocess.Popen(
        [str(Path(sys.executable).with_name("molehill")), "simulate", str(path), "--out", str(out), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not when():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130, stderr
    assert "Traceback" not in stderr
    return json.loads(stdout)["error"]


def test_ctrl_c_before_the_first_round_leaves_a_run_that_can_be_resumed(toml, tmp_path):
    out = tmp_path / "out"
    error = stopped(toml(run={"rounds": 8}), out, (out / "config.toml").exists)
    assert error["mend"] == f"molehill simulate --out {out} --resume"
    assert molehill("simulate", "--out", out, "--resume").exit_code == 0


def test_ctrl_c_leaves_a_run_that_can_be_resumed_and_json_is_one_document(toml, tmp_path):
    out = tmp_path / "out"
    metrics = out / "metrics.jsonl"
    path = toml(run={"rounds": 8}, evaluate={"baselines": True})
    error = stopped(path, out, lambda: metrics.exists() and '"event": "round"' in metrics.read_text())
    assert error["kind"] == "Interrupted"
    assert error["mend"] == f"molehill simulate --out {out} --resume"
    assert not (out / "summary.json").exists()

    resumed = molehill("simulate", "--out", out, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.output
    summary = json.loads(resumed.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert list(summary) == [
        *("task", "clients", "mean", "worst", "token_accuracy", "macro_f1", "loss", "perplexity"),
        *("exact_match", "normalised_match", "rouge_l", "chrf", "figures", "classes", "confusion", "recall", "type_f1"),
        *("gains", "lengths", "probes", "rounds", "seconds"),
        *("bytes_up", "bytes_down", "base_model", "config_digest", "unscored", "anew", "remembered", "machine"),
        "split",
    ]
    assert summary["rounds"] == 8
    assert set(summary["mean"]) == set(summary["worst"]) == FIGURES
    assert set(summary["base_model"]) == {"id", "revision", "digest", "remarks"}
    assert [set(client) for client in summary["clients"]] == [
        FIGURES
        | {"id", "n_train", "n_test", "cut", "lost", "unlearnt", "token_accuracy", "macro_f1", "loss", "perplexity"}
        | {"answered", "exact_match", "normalised_match", "rouge_l", "chrf", "recall", "type_f1", "figures", "gains"}
        | {"aside", "chosen"}
    ] * 3
    assert (out / "adapter" / "molora.json").is_file()
