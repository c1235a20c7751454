"""Runs of every kind of task, asked on the host and on a device: from a file of rows to the same answers."""

from __future__ import annotations

import json
from functools import partial

import anyio
import httpx
import pytest
import tiny_world
import typer
from verbs import ask, verb

from molehill.errors import AnswerError, BundleError
from molehill.outputs import READINGS
from molehill.tasks.kind import kind_of
from molehill_edge import Bundle, InsecureLocal, golden
from molehill_edge.commands import group
from molehill_edge.serving.app import Limits, Models, make
from molehill_export.export import Options, export
from molehill_simulation.commands.generate import generate
from molehill_simulation.loaded import load
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source
from molehill_web import site

TRUST = InsecureLocal(lambda _: None)
POINTS = {"negative": 1.0, "neutral": 2.5, "positive": 5.0}


def _numbers():
    return [{**row, "label": POINTS[row["label"]]} for row in tiny_world.rows(90)]


def _flags():
    found = [
        {"text": row["text"], "labels": [row["domain"], *([row["label"]] if row["label"] != "neutral" else [])]}
        for row in tiny_world.rows(90)
    ]
    return [*found, {"text": "the page", "labels": []}]


ROWS = {"regression": _numbers, "multi-label": _flags}


@pytest.fixture(scope="module", params=ROWS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def run(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    base = tiny_world.save_base(folder / "base", "bert", initializer_range=0.2)
    rows = tiny_world.write_rows(folder / "rows.jsonl", ROWS[kind]())
    config = tiny_world.config(
        base, rows, task={"kind": kind, "max_length": 32}, train={"steps": 10, "lr": 2e-2}, run={"rounds": 2}
    )
    simulate(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def bundle(run):
    export(open_source(run), run.parent / "bundle", Options(scheme="fp32"))
    return run.parent / "bundle"


def numbers(said):
    return list(said["probabilities"].values()) if "probabilities" in said else [said["value"]]


def test_host_and_device_say_the_same(run, bundle, kind):
    texts = [row["text"] for row in ROWS[kind]()[:6]]
    with load(run) as model, Bundle.open(bundle, trust=TRUST, threads=1) as device:
        here, there = model.predict(texts), device.predict(texts)
        assert [type(each) for each in here] == [type(each) for each in there]
        for one, other in zip(here, there, strict=True):
            assert numbers(one.as_json()) == pytest.approx(numbers(other.as_json()), abs=1e-3)
        assert len({str(each) for each in here}) > 1
        (pair,), (other,) = model.predict([(texts[0], texts[1])]), device.predict([(texts[0], texts[1])])
        assert numbers(pair.as_json()) == pytest.approx(numbers(other.as_json()), abs=1e-3)
        assert numbers(pair.as_json()) != pytest.approx(numbers(here[0].as_json()), abs=1e-3)
        for each, refused in ((model, AnswerError), (device, BundleError)):
            with pytest.raises(refused, match=f"is for {kind}: it does not say which of several classes"):
                each.classify(texts)
            with pytest.raises(AnswerError, match="strategy ensemble is for classes and for texts"):
                each.predict(texts, strategy="ensemble")


def test_both_command_lines_print_it(run, bundle, kind, tmp_path):
    text, edge = ROWS[kind]()[0]["text"], typer.Typer()
    edge.add_typer(group.app, name="edge")
    here = json.loads(ask(verb(generate), run, "--prompt", text, "--json"))["predictions"]
    there = json.loads(ask(edge, "edge", "run", bundle, "--text", text, "--insecure-local", "--json"))["predictions"]
    assert numbers(here[0]) == pytest.approx(numbers(there[0]), abs=1e-3)
    assert set(here[0]) == set(there[0])
    shown = ask(verb(generate), run, "--prompt", text, "--pair", text)
    assert shown.rstrip().endswith(f"{text} / {text}"[:90])
    rows = tiny_world.write_rows(tmp_path / "rows.jsonl", [{"text": text, "text_pair": text}])
    (both,) = ask(edge, "edge", "run", bundle, "--file", rows, "--insecure-local").splitlines()
    assert both.split()[0] == shown.split()[0]


def test_a_bundle_says_how_good_it_is(bundle, kind):
    reading = READINGS[kind_of(kind).bundle]
    edge = typer.Typer()
    edge.add_typer(group.app, name="edge")
    told = json.loads(ask(edge, "edge", "info", bundle, "--check", "--insecure-local", "--json"))
    parity = told["parity"]
    assert parity["agreement"] == 1
    assert parity["logit_error"] < 1e-6
    assert parity["figure"] == reading.figure
    assert parity["figure_bundle"] == pytest.approx(parity["figure_original"], rel=1e-3)
    assert told["check"]["passed"]
    assert reading.figure in ask(edge, "edge", "info", bundle, "--insecure-local")
    with Bundle.open(bundle, trust=TRUST, threads=1) as device:
        assert golden.check(device).error < 1e-6
        device.manifest.golden[0].logits[0] += 1
        assert not golden.check(device).passed


def test_a_gate_is_fitted_to_labels_of_the_kind(bundle, kind):
    rows = ROWS[kind]()
    column = READINGS[kind_of(kind).bundle].column
    with Bundle.open(bundle, trust=TRUST, threads=1) as device:
        texts, labels = [row["text"] for row in rows[:16]], [row[column] for row in rows[:16]]
        found = device.personalise(texts, labels, budget=10)
        assert found.after.loss <= found.before.loss or not found.kept
        with pytest.raises(BundleError, match=f"only of classes.*Give every row its '{column}'"):
            device.personalise(texts)


def test_a_server_says_it_in_the_shape_of_the_kind(bundle, kind):
    text = ROWS[kind]()[0]["text"]

    async def asked(app, path, **body):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json=body)

    with Bundle.open(bundle, trust=TRUST, threads=1) as device:
        app = make(Models(device), Limits(1 << 16, 16, 1, 4), None)
        name, path = device.manifest.id, "/v1/classifications"
        one = anyio.run(partial(asked, app, path, model=name, input=text)).json()["data"]
        two = anyio.run(partial(asked, app, path, model=name, input=[[text, "a"], [text, "b"]])).json()["data"]
        for row, wanted in zip([*one, *two], device.predict([text, (text, "a"), (text, "b")]), strict=True):
            assert numbers(row) == pytest.approx(numbers(wanted.as_json()), abs=1e-5)
        for wrong, words in (
            ({"path": path, "input": [[text]]}, "list of pairs"),
            ({"path": "/v1/completions", "prompt": text}, f"is for {kind}, and this path for models that write text"),
        ):
            answer = anyio.run(partial(asked, app, model=name, **wrong))
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"]


def test_a_page_is_refused(bundle, tmp_path, kind):
    with TRUST.admit(str(bundle)) as admitted, pytest.raises(BundleError, match=f"the bundle is for {kind}"):
        site.of_bundle(admitted, tmp_path / "page")
    assert not (tmp_path / "page").exists()
