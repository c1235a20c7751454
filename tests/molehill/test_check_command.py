"""`molehill check`: what it says of a configuration, a base and rows before a run."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import tiny_world
from typer.testing import CliRunner

from molehill.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_check_prints_the_plan(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[base]\nmodel = "someone/some-model"\n[federation]\npreset = "flexlora"\n')
    result = run("check", path)
    assert result.exit_code == 0, result.output
    for text in (
        "someone/some-model",
        "4 routed LoRAs of rank 8 on",
        "space product, rule mean, lower svd",
        "anchored",
    ):
        assert text in result.stdout


def test_check_takes_overrides_and_speaks_to_programs(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[base]\nmodel = "someone/some-model"\n[data]\nsource = "someone/rows"\n')
    told = json.loads(run("check", path, "--set", "molora.rank=3", "--set", "run.rounds=9", "--json").stdout)
    assert "9 rounds" in told["plan"]["run"]
    assert "rank 3" in told["plan"]["experts"]
    assert ["some-model" in text or "someone/rows" in text for text in told["warnings"]] == [True, True]
    assert "not looked at" in told["warnings"][0]
    refused = run("check", path, "--set", "federation.rule=krum", "--set", "privacy.secure_aggregation=true", "--json")
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"]["kind"] == "ConfigError"


def test_into_a_pipe_every_line_of_the_plan_and_every_warning_is_one(tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    path.write_text('[base]\nmodel = "someone/some-model"\n[federation]\npreset = "flexlora"\n')
    free = run("check", path).stdout.splitlines()
    monkeypatch.setenv("COLUMNS", "60")
    narrow = run("check", path).stdout.splitlines()
    assert len(free) < len(narrow)
    assert max(map(len, free)) > 80
    plan = list(itertools.takewhile(str.strip, free))
    assert all(line[0] != " " for line in plan)  # where a cell goes on
    assert len(plan) < len(list(itertools.takewhile(str.strip, narrow)))


@pytest.mark.parametrize(
    ("molora", "text"),
    [
        ('preset = "houlsby"', "one bottleneck of width 64 on"),
        (
            'preset = "houlsby"\nexperts = 3\nshared = 1',
            "3 routed bottlenecks of width 64 and 1 always-on of width 64 on",
        ),
        ('preset = "mov"', "30 routed vectors on"),
        ('preset = "hmoe"', "LoRAs of rank 16 before hetero_rank(kind=arithmetic) on"),
        ("shared = 2", "4 routed LoRAs of rank 8 and 2 always-on of rank 8 on"),
    ],
)
def test_check_calls_experts_what_they_are_before_it_has_a_base(tmp_path, molora, text):
    path = tmp_path / "run.toml"
    path.write_text(f'[base]\nmodel = "someone/some-model"\n[molora]\n{molora}\n')
    assert text in " ".join(run("check", path).stdout.split())


def test_check_of_a_local_base_counts_parameters_and_finds_wrong_targets(tmp_path):
    path = tmp_path / "run.toml"
    counts = []
    for rank in (2, 4):
        path.write_text(
            f'[data]\nrows = 20\ntest_rows = 20\n[molora]\ntargets = ["query"]\nexperts = 2\nrank = {rank}\n'
        )
        counts.append(int(re.search(r"([\d,]+) trained per client", run("check", path).stdout)[1].replace(",", "")))
    assert counts[1] - counts[0] == 6 * 2 * 2 * (384 + 384)  # layers, experts, ranks, sizes
    path.write_text('[molora]\ntargets = ["qeury"]\n')
    wrong = run("check", path)
    assert wrong.exit_code == 4
    assert "qeury" in wrong.stderr


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        ("mola", "2 to 6 routed LoRAs of rank 8 on"),
        ("deepseek", "32 routed LoRAs of rank 2 and 1 always-on of rank 8 on"),
        ("lora", "one LoRA of rank 8 on"),
        ("mov", "30 routed vectors on"),
        ("houlsby", "one bottleneck of width 64 on"),
    ],
)
def test_check_tells_what_every_site_gets(tmp_path, preset, text):
    base = tiny_world.save_base(tmp_path / "base", "llama")
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60, "llama"))
    path = tmp_path / "run.toml"
    path.write_text(
        f'[base]\nmodel = "{base}"\n[data]\nsource = "{rows}"\npartition = "iid"\n'
        f'[task]\nkind = "causal-lm"\nmax_length = 32\n[molora]\npreset = "{preset}"\n'
    )
    result = run("check", path)
    assert text in " ".join(result.stdout.split()), result.output


ROWS = {"text": "good", "label": "positive"}, {"text": "bad", "label": "negative"}


@pytest.mark.parametrize(
    ("rows", "data", "code", "message"),
    [
        (None, "", 3, "rows.jsonl: cannot read the file: No such file"),
        ([{"text": "good"}], "", 3, "there is no column 'label'"),
        (ROWS, "", 3, "there are 2 rows for 8 clients"),
        ([ROWS[i % 2] | {"text": f"{i}"} for i in range(40)], "", 0, "iid: 4 rows each to train on, 1 held out"),
    ],
)
def test_check_reads_and_deals_the_rows_that_are_here(tmp_path, rows, data, code, message):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        tiny_world.write_rows(path, rows)
    config = tmp_path / "run.toml"
    config.write_text(f'[base]\nmodel = "a/b"\n[data]\nsource = "{path}"\npartition = "iid"\n{data}\n')
    result = run("check", config)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())


def test_check_leaves_rows_elsewhere_where_they_are(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[base]\nmodel = "a/b"\n[data]\nsource = "someone/some-rows"\n')
    result = run("check", path)
    assert result.exit_code == 0, result.output
    ends = [line.rstrip() for line in result.stdout.splitlines()]
    assert any(line.endswith("someone/some-rows dealt to 8 clients, by_column(column=domain)") for line in ends)


def test_check_of_a_base_elsewhere_names_the_allocation(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[base]\nmodel = "a/b"\n[molora]\npreset = "mola"\n')
    assert "5 routed LoRAs of rank 8 before by_depth(experts=[2, 4, 6, 8]) on" in run("check", path).stdout


def test_check_refuses_what_cannot_work(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[base]\nmodel = "a/b"\n[federation]\npolicy = "ffa"\nspace = "product"\nlower = "svd"\n')
    result = run("check", path)
    assert result.exit_code == 2
    assert "federation.policy with federation.space" in result.stderr
    assert "a/b" in result.stdout


def test_check_and_the_start_of_a_run_count_the_same(tmp_path):
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60, "bert"))
    base = tiny_world.save_base(tmp_path / "base", "bert")
    path = tmp_path / "run.toml"
    path.write_text(
        f'[run]\nrounds = 1\n[base]\nmodel = "{base}"\nprecision = "fp32"\n[task]\nmax_length = 16\n'
        f'[data]\nsource = "{source}"\npartition = "iid"\nclients = 2\n[molora]\nexperts = 2\nrank = 2\n'
        "[train]\nsteps = 1\n[personal]\nsteps = 1\n[evaluate]\nbaselines = false\n[engine]\nworkers = 1\n"
    )
    said = " ".join(run("check", path).output.split())
    trained, own = re.search(r"([\d,]+) trained per client \(.*\), and ([\d,]+) that stay with each", said).groups()
    started = run("simulate", path, "--out", tmp_path / "run")
    assert started.exit_code == 0, started.output
    assert f"{trained} trained parameters" in started.output
    assert int(own.replace(",", "")) > 0


def test_check_tells_programs_what_every_client_has(tmp_path):
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60, "bert"))
    base = tiny_world.save_base(tmp_path / "base", "bert")
    path = tmp_path / "run.toml"
    path.write_text(
        f'[base]\nmodel = "{base}"\n[task]\nmax_length = 8\n'
        f'[data]\nsource = "{source}"\npartition = "iid"\nclients = 2\n'
    )
    told = json.loads(run("check", path, "--json").stdout)["clients"]
    assert [client["client"] for client in told] == ["client-1", "client-2"]
    assert sum(client["rows"] + client["held_out"] for client in told) == 60
    assert sum(sum(client["classes"].values()) for client in told) == 60
    assert all(4 < client["tokens"]["median"] <= client["tokens"]["longest"] <= 13 for client in told)
    assert all(client["tokens"]["cut"] > 0 for client in told)
    assert re.search(r"client +rows +held out +negative +neutral +positive", run("check", path).stdout)


def test_check_says_that_it_has_not_seen_a_base_elsewhere(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[base]\nmodel = "someone/some-model"\n')
    assert "warning: base.model: someone/some-model is not on this machine" in run("check", path).output


def test_what_is_not_adapted_is_said_at_check_at_the_start_and_in_the_report(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    base = tiny_world.save_base(tmp_path / "base", "llama")
    sizes = {**tiny_world.SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(base)
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60, "llama"))
    path = tmp_path / "run.toml"
    path.write_text(
        f'[run]\nrounds = 1\n[base]\nmodel = "{base}"\nprecision = "fp32"\n'
        '[task]\nkind = "causal-lm"\nmax_length = 32\n'
        f'[data]\nsource = "{rows}"\npartition = "iid"\nclients = 2\n[molora]\nexperts = 2\nrank = 2\n'
        "[train]\nsteps = 1\n[personal]\nsteps = 1\n[evaluate]\nbaselines = false\n[engine]\nworkers = 1\n"
    )
    remark = "are not adapted, since they lie in no linear module: model.layers.#.mlp.experts.down_proj"
    checked = run("check", path)
    assert checked.exit_code == 0
    assert re.search(
        rf"warning: molora.targets: [\d,]+ of the [\d,]+ weights in the layers \(\d+%\) {remark}", checked.output
    )
    started = run("simulate", path, "--out", tmp_path / "run")
    assert started.exit_code == 0, started.output
    assert re.search(rf"warning: .*{remark}", started.output)
    assert remark in json.loads((tmp_path / "run" / "summary.json").read_text())["base_model"]["remarks"][0]
    assert remark in (tmp_path / "run" / "report.html").read_text()
    path.write_text(path.read_text().replace("experts = 2", 'experts = 2\ntargets = ["gate_up_proj"]'))
    refused = run("check", path)
    assert refused.exit_code == 4
    assert "for all experts of the base, not a linear module" in refused.stderr


def test_conversations_and_texts_are_measured_and_what_they_lose_is_said(tmp_path):
    base = tiny_world.save_base(tmp_path / "base", "llama")
    told = {}
    for name, shape in {
        "talks": lambda n: {"conversations": [{"from": "human", "value": f"w{n}"}, {"from": "gpt", "value": "good"}]},
        "pairs": lambda n: {"prompt": f"w{n}", "completion": "good film " * 9},
        "texts": lambda n: {"text": "good film " * 9 + f"w{n}", "who": "me"},
        "asked": lambda n: {"instruction": f"w{n}", "output": "good"},
    }.items():
        rows = [shape(n) for n in range(9)]
        config = tiny_world.config(
            base, tiny_world.write_rows(tmp_path / f"{name}.jsonl", rows), data={"clients": 2},
            task={"kind": "causal-lm", "max_length": 16}, molora={"targets": "all-linear"}, evaluate={"generate": 1},
        )  # fmt: skip
        path = tmp_path / f"{name}.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        done = run("check", path, "--json")
        assert done.exit_code == 0, done.output
        told[name] = json.loads(done.stdout)
    plans = {name: each["plan"] for name, each in told.items()}
    assert "cut" not in plans["talks"]
    assert plans["pairs"]["cut"] == "9 of 9 rows are longer than task.max_length = 16 and lose their end"
    assert plans["texts"]["cut"] == "9 of 9 rows are longer than task.max_length = 16 and learnt in 18 pieces"
    assert plans["texts"]["enough"] == "task.max_length = 20 keeps all"
    assert plans["texts"]["tokens"].startswith("of a row: half have up to 20 tokens")
    reads = {"talks": "'conversations'", "pairs": "'prompt' and 'completion'", "texts": "'text'"}
    reads["asked"] = "'instruction' and 'output'"  # no input, which is filled in where it is missing
    assert {name: plan["reads"] for name, plan in plans.items()} == reads
    assert plans["texts"]["personal"] == "gate anchored"  # there is no head
    assert plans["texts"]["unread"] == "who (columns that nothing reads)"
    silent = [name for name, each in told.items() if any("asks nothing" in warning for warning in each["warnings"])]
    assert silent == ["texts"]
