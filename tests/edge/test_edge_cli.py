"""``molehill edge``, typed as its help says."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import edge_graphs
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from molehill_edge.bundle import Bundle
from molehill_edge.commands import group, run
from molehill_edge.routes import RouterReport
from molehill_edge.trust import InsecureLocal

SAYS = "yes, cat!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles")
    manifest = edge_graphs.classifier(path / "reviews")
    with Bundle.open(path / "reviews", trust=InsecureLocal(lambda _: None)) as bundle:
        ids = bundle.encode("the film was great")
        logits = bundle.logits([ids])[0]
    manifest.golden.add(input_ids=ids, logits=logits, best=int(logits.argmax()))
    edge_graphs.sign(path / "reviews", manifest)
    edge_graphs.causal(path / "talk", says=SAYS, template=edge_graphs.CHATML)
    return path


@pytest.fixture
def molehill(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.add_typer(group.app, name="edge")

    def call(*words, stdin=None):
        words = [str(folder / word[1:]) if word.startswith("@") else word for word in words]
        return CliRunner().invoke(app, ["edge", *words, "--insecure-local"], input=stdin)

    return call


def done(result):
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result, what, code=13):
    assert result.exit_code == code, result.output
    assert what in result.stderr
    assert "Traceback" not in result.output


def test_classify(molehill, tmp_path):
    result = molehill("run", "@reviews", "--text", "the film was great", "--text", "awful plot")
    lines = done(result).splitlines()
    assert [line.split()[0] for line in lines] == ["odd", "good"]
    assert lines[0].endswith("%  the film was great")
    assert "without any signature" in result.stderr

    (tmp_path / "texts").write_text('{"text": "the film was great"}\n\n{"text": "awful plot", "label": "bad"}\n')
    told = json.loads(done(molehill("run", "@reviews", "--file", "texts", "--json", "--route")))
    assert [row["text"] for row in told["predictions"]] == ["the film was great", "awful plot"]
    assert [row["label"] for row in told["predictions"]] == ["odd", "good"]
    assert sum(told["predictions"][0]["probabilities"].values()) == pytest.approx(1)
    assert told["predictions"][0]["routes"][1]["router"] == "layers.1.up"
    assert told["bundle"] == {"id": "tiny-classifier", "version": 1, "gate": "global"}


def test_gates_experts_and_routes(molehill):
    ann = json.loads(done(molehill("run", "@reviews", "--text", "fine", "--gate", "ann", "--json")))
    plain = json.loads(done(molehill("run", "@reviews", "--text", "fine", "--json")))
    assert ann["bundle"]["gate"] == "ann"
    assert ann["predictions"] != plain["predictions"]
    shown = done(molehill("run", "@reviews", "--text", "fine", "--route", "--experts", "dogs"))
    table = [line.split() for line in shown.splitlines() if "layers" in line]
    assert table == [["layers.0.up", "0.0%", "100.0%", "0.0%"], ["layers.1.up", "0.0%", "100.0%", "0.0%"]]


def test_answers(molehill):
    assert done(molehill("run", "@talk", "--text", "hello")) == f"{SAYS}\n"
    two = done(molehill("run", "@talk", "--text", "one", "--text", "two", "--stop", "cat", "--threads", "1"))
    assert two == "> one\nyes, \n\n> two\nyes, \n"
    told = json.loads(done(molehill("run", "@talk", "--text", "hello", "--json", "--max-new-tokens", "3")))
    assert told["answers"] == [{"text": "hello", "answer": "yes", "tokens": 3, "reason": "length"}]
    hot = ("run", "@talk", "--text", "x", "--raw", "--temperature", "900", "--seed", "4", "--max-new-tokens", "9")
    assert done(molehill(*hot)) == done(molehill(*hot)) != f"{SAYS}\n"


def test_a_conversation(molehill):
    assert done(molehill("run", "@talk", "--chat", "--system", "Be brief.", stdin="hello\n\nand now?\n")) == (
        f"{SAYS}\n{SAYS}\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals")
def test_a_conversation_at_a_terminal(folder):
    import os
    import pty
    import time

    master, slave = pty.openpty()
    code = "from molehill_edge.commands.group import app; app()"
    words = ["run", str(folder / "talk"), "--insecure-local", "--chat", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=slave, stdout=slave, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def until(what):
        nonlocal seen
        end = time.monotonic() + 30
        while what not in seen:
            assert time.monotonic() < end, seen
            seen += os.read(master, 4096).decode()
        before, _, seen = seen.partition(what)
        return before

    try:
        until("> ")
        os.write(master, b"hello\n")
        assert SAYS in until("\r\n> ")
        os.write(master, b"x" * 300 + b"\n")
        assert "/new begins a new conversation" in " ".join(until("\r\n> ").split())
        os.write(master, b"/new\n")
        until("> ")
        os.write(master, b"and now?\n")
        assert SAYS in until("\r\n> ")
        os.write(master, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_info(molehill, folder):
    told = json.loads(done(molehill("info", "@reviews", "--check", "--json")))
    assert told["experts"] == ["cats", "dogs", "newts"]
    assert told["empty_slots"] == 1
    assert told["gates"] == {"default": "global", "further": ["ann", "bob"]}
    assert told["check"]["passed"]
    assert told["bytes"]["total"] == sum(
        path.stat().st_size for path in (folder / "reviews").rglob("*") if path.name != "manifest.pb" and path.is_file()
    )
    shown = done(molehill("info", "@reviews", "--check"))
    assert "tiny-classifier, version 1" in shown
    assert "cats, dogs, newts and 1 empty" in shown
    assert "passed: 100.0% of 1 alike" in shown
    assert "expires" in done(molehill("info", "@talk"))


def test_a_bundle_that_answers_otherwise(molehill, tmp_path):
    manifest = edge_graphs.classifier(tmp_path / "odd")
    manifest.golden.add(input_ids=[2, 5, 3], logits=[1, 2, 3], best=2)
    edge_graphs.sign(tmp_path / "odd", manifest)
    refused(molehill("info", "odd", "--check"), "answers otherwise than where it was made")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("@reviews", ["classify 1 x 12 tokens", "classify 8 x 12 tokens", "swap a gate"]),
     ("@talk", ["prefill 128 tokens", "decode after 128", "swap a gate"])],
)  # fmt: skip
def test_bench(molehill, name, wanted):
    told = json.loads(done(molehill("bench", name, "--rounds", "2", "--json")))
    assert [figure["name"] for figure in told["figures"]] == wanted
    assert all(0 < figure["low"] <= figure["median"] <= figure["high"] for figure in told["figures"])
    assert told["threads"]["threads"] >= 1
    assert told["memory_mib"]["peak"] >= told["memory_mib"]["resident"] > 0
    shown = done(molehill("bench", name, "--rounds", "1", "--threads", "2", "--no-spin"))
    assert "swap a gate" in shown
    assert "2, sleeping" in shown


def test_personalise(molehill, tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(edge_graphs.WORDS, 4)), "label": str(rng.choice(edge_graphs.LABELS))}
        for _ in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = ("personalise", "@reviews", "--rows", "rows.jsonl", "--out", "my.gate.safetensors", "--budget", "20")
    told = json.loads(done(molehill(*call, "--json")))
    assert told["fitted"] + told["held_out"] == 12
    assert told["before"]["accuracy"] is not None
    shown = done(molehill(*call))
    assert "fitted to 8 texts, judged on 4 others" in shown
    assert done(molehill("run", "@reviews", "--text", "fine", "--gate", "my.gate.safetensors"))

    (tmp_path / "plain").write_text("\n".join(row["text"] for row in rows))
    plain = json.loads(done(molehill(*call[:3], "plain", *call[4:], "--json")))
    assert plain["before"]["accuracy"] is None
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + '\n{"text": "fine"}\n')
    refused(molehill(*call), "rows.jsonl:2: some rows have a label, and this one has none", 3)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("run", "@reviews"), "no text. Give --text, --file or --chat."),
        (("run", "@reviews", "--chat", "--text", "x"), "--chat goes without"),
        (("run", "@reviews", "--chat"), "classifies; it does not generate"),
        (("run", "@reviews", "--text", "the " * 40), "has 42 tokens, where 12 fit"),
        (("run", "@reviews", "--text", "x", "--gate", "carl"), "no gate 'carl'"),
        (("run", "@reviews", "--text", "x", "--experts", "cats,owls"), "no expert 'owls'"),
        (("run", "@reviews", "--text", "x", "--memory-mb", "10"), "more than the 10 MB allowed"),
        (("run", "nowhere", "--text", "x"), "nowhere"),
        (("info", "@reviews/tokenizer.json"), "tokenizer.json"),
    ],
)
def test_a_mistake_is_one_paragraph(molehill, words, what):
    refused(molehill(*words), what)


def test_what_cannot_be_asked_has_a_code_of_its_own(molehill):
    refused(molehill("run", "@talk", "--text", "x", "--top-p", "0"), "top-p must be above 0", 16)
    refused(molehill("run", "@talk", "--text", "x" * 300), "where 256 fit", 16)


def test_a_mistake_as_json(molehill):
    result = molehill("run", "@reviews", "--json")
    assert result.exit_code == 13
    assert json.loads(result.stdout)["error"]["kind"] == "BundleError"


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("plain", "fine\n\n[sic] bad\u2028film\r\n", ["fine", "[sic] bad\u2028film"]),
        ("mark.jsonl", '\ufeff{"text": "fine"}\n{"text": "a\u0085b"}\n', ["fine", "a\u0085b"]),
        ("rows.csv", "id;text\n1;fine\n2;bad, really\n", ["fine", "bad, really"]),
        ("rows.tsv", 'text\tid\n"fine" film\t1\n', ['"fine" film']),
        ("rows.json", '[{"text": "fine"},\n {"text": "bad"}]', ["fine", "bad"]),
        ("array", '[{"text": "fine"}]', ["fine"]),
    ],
)
def test_a_file_is_read_as_in_training(molehill, tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content.encode())
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    for file in (name, f"{name}.gz"):
        told = json.loads(done(molehill("run", "@reviews", "--file", file, "--json")))
        assert [row["text"] for row in told["predictions"]] == texts


@pytest.mark.parametrize("name", ["rows.parquet", "rows", "-"])
def test_texts_of_a_parquet_file(molehill, tmp_path, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["the film was great", "awful plot"]
    pq.write_table(pa.table({"text": texts, "label": ["good", "bad"]}), tmp_path / "rows")
    data = (tmp_path / "rows").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(data)
    told = json.loads(done(molehill("run", "@reviews", "--file", name, "--json", stdin=data if name == "-" else None)))
    assert [row["text"] for row in told["predictions"]] == texts


def test_parquet_without_its_library_says_what_brings_it(molehill, tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(molehill("run", "@reviews", "--file", "rows.parquet"), "pip install 'molehill[parquet]'", 2)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows", b'{"review": "x"}\n', "rows:1: the row has no 'text'. Columns there: review."),
        ("rows", b"\xff\xfea\x00", "rows:1: not UTF-8 text but UTF-16"),
        ("rows", b"fine\n{not json}\n", "rows:2: the line begins like JSON"),
        ("rows", b'{"text": "x"}\n{not json}\n', "rows:2: not JSON"),
        ("rows.txt", b'["fine",\n"bad"]\n', "rows.txt: a JSON array where plain lines are read"),
        ("rows.csv", b"good film,positive\n", "rows.csv: there are no rows; a CSV or TSV file begins with the names"),
        ("rows.jsonl", b'{"text": "x"}\n{"text": "a\\ud800b"}\n', "rows.jsonl:2: 'text' has half a character (U+D800"),
        ("rows.parquet", b"PAR1", "a Parquet file"),
        ("nothing", None, "nothing: cannot read the file: No such file"),
    ],
)
def test_a_file_that_is_not_understood(molehill, tmp_path, name, content, what):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(molehill("run", "@reviews", "--file", name), what, 3)
    refused(molehill("personalise", "@reviews", "--rows", name, "--out", "gate"), what, 3)


def test_any_terminal_shows_any_text(folder):
    """An encoding without the letters, and letters that a terminal would obey."""
    code = "from molehill.cli import main; main()"
    words = [
        "edge",
        "run",
        str(folder / "reviews"),
        "--insecure-local",
        "--text",
        "caf\u00e9 \x1b[31m",
        "--text",
        b"\xff",
    ]
    for extra, rc, shown in (
        (words[:-2], 0, b" \\x1b[31m"),
        (words, 3, b"--text: 'text' has half a character"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *extra],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        )
        assert done.returncode == rc, done.stderr
        assert shown in done.stdout + done.stderr
        assert b"\x1b" not in done.stdout


def test_an_unsigned_bundle_needs_the_option(molehill, folder):
    app = typer.Typer()
    app.add_typer(group.app, name="edge")
    pytest.importorskip("molehill_edge.store")
    result = CliRunner().invoke(app, ["edge", "info", str(folder / "reviews"), "--store", "store"])
    assert result.exit_code in {13, 14}
    assert "Traceback" not in result.output


def test_the_commands_import_nothing_heavy():
    heavy = {"torch", "transformers", "peft", "flwr", "grpc", "onnx", "onnxruntime", "pydantic", "tuf", "numpy"}
    code = "import sys, molehill_edge.commands.group; print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not heavy & set(out.split())


def test_names_of_experts_are_no_markup(capsys):
    run._show_routes([RouterReport("layers.0", ("[red]cats[/red]",), (1.0,))])
    assert "[red]cats[/red]" in capsys.readouterr().out
