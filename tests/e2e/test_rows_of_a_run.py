"""What a run says of its rows: before it begins, and in what it leaves behind."""

from __future__ import annotations

import json
import re

import pytest
import tiny_world
from rich.console import Console

from molehill.errors import DataError
from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal
from molehill_export.export import Options, export
from molehill_simulation.describe import describe
from molehill_simulation.report import render
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source
from molehill_simulation.ui import RunView, show_summary

# Of an answer that others follow its thoughts are left out, all but its last word.
EDITS = "if loop.last or m.role == 'user' else m.content.split(' ')[-1] }}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_world.save_base(tmp_path_factory.mktemp("llama") / "base", "llama")
    template = tiny_world.CHAT.replace("m.content }}", f"m.content {EDITS}")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def config(base, source, **task):
    return tiny_world.config(
        base, source, task={"kind": "causal-lm"} | task, molora={"targets": ["q_proj"]}, run={"rounds": 1},
        train={"steps": 1},
    )  # fmt: skip


def test_rows_that_are_cut_are_counted_everywhere(base, tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
        for row in tiny_world.rows(60, "llama")
    ]
    rows[0]["messages"][0]["content"] *= 8
    rows[1]["messages"][1]["content"] = "so very good"
    rows[1]["messages"] += rows[2]["messages"]
    run = config(base, tiny_world.write_rows(tmp_path / "rows.jsonl", rows), max_length=12)
    facts = dict(describe(run).plan)
    assert re.fullmatch(
        r"of a row: half have up to \d+ tokens, 90% up to \d+, 99% up to \d+, the longest \d+", facts["tokens"]
    )
    cut, lost = map(
        int, re.search(r"^(\d+) of 60 rows are longer than task.max_length = 12 .*of (\d+) the", facts["cut"]).groups()
    )
    assert 60 > cut > lost >= 1
    edited = "the chat template edits answers before the last, so they are read and not learnt: 1"
    assert facts["cut"].endswith(f". {edited}")

    said = []
    summary = simulate(run, tmp_path / "run", observer=said.append)
    assert said[0] == {
        "event": "rows",
        "classes": {},
        "names": {},
        "lengths": facts["tokens"][10:],
        "cut": facts["cut"],
        "enough": facts["enough"],
    }
    assert re.fullmatch(r"task\.max_length = (\d+ keeps 95% of them whole, )?\d+ keeps all", facts["enough"])
    assert (sum(c.cut for c in summary.clients), sum(c.lost for c in summary.clients)) == (cut, lost)
    assert sum(client.n_train + client.n_test for client in summary.clients) == 60 - lost
    assert sum(client.unlearnt for client in summary.clients) == 1
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [client["cut"] for client in stored["clients"]] == [client.cut for client in summary.clients]
    page = render(tmp_path / "run")
    sentence = f"{cut} of 60 rows are longer than task.max_length and lose their end; of {lost} the whole answer"
    assert sentence in page
    assert f"Tokens of a row: {facts['tokens'][10:]}." in page
    assert edited in page
    assert re.search(r'rowspan="(\d)">left out</th><th scope="col" rowspan="\1">not learnt</th>', page)

    console = Console(width=200)
    with RunView(console) as view:
        view(said[0])
    show_summary(summary, console)
    shown = capsys.readouterr().out
    assert f"tokens of a row: {facts['tokens'][10:]}" in shown
    assert facts["cut"] in shown
    assert facts["enough"] in shown
    assert sentence in shown


def test_a_bad_row_is_a_mistake_in_the_file_and_not_of_a_node(base, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]} for _ in range(60)]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] += f" {number}"
    rows[40]["messages"][0]["name"] = "ann"
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", rows)
    for act in (lambda run: simulate(run, tmp_path / "run"), describe):
        with pytest.raises(DataError, match="does not show 'name' of message 1") as caught:
            act(config(base, source, max_length=32))
        assert caught.value.where == f"{source}:41"
    assert not (tmp_path / "run").exists()


def test_owners_keep_their_names(tmp_path, caplog):
    """In folders, tables, options of the exporter and on the device; those called `global` or `mean` too."""
    owners = ["Klinik S\u00fcd", "\u75c5\u9662", "global", "mean", "default"]
    rows = [{**row, "owner": owners[i % 5]} for i, row in enumerate(tiny_world.rows(100))]
    base = tiny_world.save_base(tmp_path / "bert", "bert")
    run = tiny_world.config(
        base, tiny_world.write_rows(tmp_path / "rows.jsonl", rows), run={"rounds": 1},
        data={"clients": 5, "partition": {"name": "by_column", "column": "owner"}},
    )  # fmt: skip
    ours = {"Klinik-S\u00fcd", *owners[1:]}
    out = tmp_path / "run"
    assert dict(describe(run).plan)["names"] == "Klinik-S\u00fcd is 'Klinik S\u00fcd'"
    summary = simulate(run, out)
    assert (
        {client.id for client in summary.clients}
        == {path.name for path in (out / "clients").iterdir() if path.is_dir()}
        == ours
    )
    page = render(out)
    assert '<tr><th scope="row">Klinik-S\u00fcd</th><td>Klinik S\u00fcd</td></tr>' in page
    assert '<li class="line-mean">mean of all</li>' in page
    assert "<title>mean</title>" in page  # the curve of that client

    source = open_source(out)
    gates = ("global", "Klinik S\u00fcd", "\u75c5\u9662", "client:global", "default", "mean")
    export(source, tmp_path / "bundle", Options(scheme="fp32", gates=gates, force=True))
    assert "the client of that name is client:global" in caplog.text
    files = sorted(path.name for path in (tmp_path / "bundle" / "gates").iterdir())
    assert [re.sub("-[0-9a-f]{8}", "-#", name).removesuffix(".safetensors") for name in files] == [
        "Klinik-Sud-#", "default-#", "gate-#", "global-#", "mean",
    ]  # fmt: skip
    with Bundle.open(tmp_path / "bundle", trust=InsecureLocal(lambda _: None)) as bundle:
        assert set(bundle.gates()) == set(gates[1:])
        for gate in gates[1:]:
            wanted = source.client(gate)
            name = gate if gate != "default" else "client:default"
            bundle.swap_gate(name)
            assert bundle.gate.name == gate
            assert wanted in ours
