"""Entities of texts, from a file of tagged words to host and device."""

from __future__ import annotations

import json

import anyio
import httpx
import numpy as np
import pytest
import tiny_world
import typer
from verbs import ask, verb

from molehill.errors import AnswerError, BundleError
from molehill.predictions import Entity
from molehill.tasks.batches import IGNORE
from molehill.tasks.kind import make_task
from molehill.tasks.schema import load_rows
from molehill_edge import Bundle, InsecureLocal, golden
from molehill_edge.bench import measure
from molehill_edge.commands import group
from molehill_edge.serving.app import Limits, Models, make
from molehill_export.export import Options, export
from molehill_simulation.commands.generate import generate
from molehill_simulation.loaded import load
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source
from molehill_web import site

TRUST = InsecureLocal(lambda _: None)
ROWS = tiny_world.tagged(80)
TEXTS = [" ".join(row["tokens"]) for row in ROWS[:8]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("entities")
    base = tiny_world.save_base(folder / "base", "bert", initializer_range=0.2)
    rows = tiny_world.write_rows(folder / "rows.jsonl", ROWS)
    config = tiny_world.config(
        base, rows, task={"kind": "token-classification", "max_length": 32, "class_weights": "balanced"},
        train={"steps": 30, "lr": 2e-2},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def bundle(run):
    export(open_source(run), run.parent / "bundle", Options(scheme="fp32"))
    return run.parent / "bundle"


def test_host_and_device_find_the_same(run, bundle):
    with load(run) as model, Bundle.open(bundle, trust=TRUST, threads=1) as device:
        here, there = model.predict(TEXTS), device.predict(TEXTS)
        assert sum(len(each.entities) for each in here) > len(TEXTS)
        for text, one, other in zip(TEXTS, here, there, strict=True):
            assert [(each.text, each.type, each.start, each.end) for each in one.entities] == [
                (each.text, each.type, each.start, each.end) for each in other.entities
            ]
            assert [each.probability for each in one.entities] == pytest.approx(
                [each.probability for each in other.entities], abs=1e-4
            )
            assert all(text[each.start : each.end] == each.text for each in one.entities)


def test_what_is_found_is_what_training_scores(run):
    """Words of rows, joined by spaces, get the tags that a score of the same rows counts."""
    with load(run) as model:
        rows, task = load_rows(model.source.run.data, model.source.task)
        made = make_task(task, model.source.tokenizer)
        for text, row, example in zip(TEXTS, ROWS[:8], made.encode(rows.take(range(8))), strict=True):
            logits = model.passes.logits(example.input_ids)[np.array(example.labels) != IGNORE]
            tags = [task.labels[at] for at in logits.argmax(-1)]
            assert len(tags) == len(row["tokens"])
            (found,) = model.predict([text])
            begun = [at for at, tag in enumerate(tags) if tag.startswith("B-")]
            starts = [len(" ".join([*row["tokens"][:at], ""])) for at in begun]
            assert {each.start for each in found.entities} >= set(starts)


def test_spaces_and_cut_words(run, bundle):
    text = "  the   bad page " + "the " * 40
    with load(run) as model, Bundle.open(bundle, trust=TRUST, threads=1) as device:
        for each, refused in ((model, AnswerError), (device, BundleError)):
            (found,) = each.predict(["  the   bad   page  "])
            assert all("  the   bad   page  "[one.start : one.end] == one.text.strip() for one in found.entities)
            long = f"{text} page " * 3
            with pytest.raises(refused, match="tokens, where"):
                each.predict([long])
            (found,) = each.predict([long], truncate=True)
            assert max((one.end for one in found.entities), default=0) < 300
            with pytest.raises(refused, match="is for token-classification: it reads no pairs of texts"):
                each.predict([("the page", "the plot")])
            with pytest.raises(refused, match="does not say which of several classes"):
                each.classify(["the page"])
            with pytest.raises(AnswerError, match="strategy ensemble is for classes and for texts"):
                each.predict(["the page"], strategy="ensemble")
            assert each.predict(["the page"], strategy="own_logits") == each.predict(["the page"])


def test_both_command_lines_print_them(run, bundle):
    edge = typer.Typer()
    edge.add_typer(group.app, name="edge")
    here = json.loads(ask(verb(generate), run, "--prompt", TEXTS[0], "--json"))["predictions"]
    there = json.loads(ask(edge, "edge", "run", bundle, "--text", TEXTS[0], "--insecure-local", "--json"))[
        "predictions"
    ]
    assert here[0]["entities"]
    assert here[0]["entities"][0].keys() == {"text", "type", "start", "end", "probability"}
    assert [each["text"] for each in here[0]["entities"]] == [each["text"] for each in there[0]["entities"]]
    first = Entity(**here[0]["entities"][0])
    for shown in (
        ask(verb(generate), run, "--prompt", TEXTS[0], "--route"),
        ask(edge, "edge", "run", bundle, "--text", TEXTS[0], "--insecure-local"),
    ):
        assert shown.startswith(f"{first.text} ({first.type})")


def test_a_bundle_says_how_good_it_is(run, bundle):
    edge = typer.Typer()
    edge.add_typer(group.app, name="edge")
    told = json.loads(ask(edge, "edge", "info", bundle, "--check", "--insecure-local", "--json"))
    assert told["task"]["labels"] == ["B-DOMAIN", "B-FEELING", "O"]
    assert told["parity"]["agreement"] == 1
    assert told["parity"]["logit_error"] < 1e-6
    assert told["parity"]["rows"] > 0
    assert told["parity"]["accuracy_bundle"] == pytest.approx(told["parity"]["accuracy_original"])
    assert told["check"]["passed"]
    with Bundle.open(bundle, trust=TRUST, threads=1) as device:
        assert golden.check(device).error < 1e-6
        assert all(figure.unit for figure in measure(device, rounds=1))


def test_a_server_says_which_entities_texts_have(bundle):
    async def asked(app, name):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/classifications", json={"model": name, "input": TEXTS[:2]})

    with Bundle.open(bundle, trust=TRUST, threads=1) as device:
        app = make(Models(device), Limits(1 << 16, 16, 1, 4), None)
        said = anyio.run(asked, app, device.manifest.id).json()["data"]
        wanted = [each.as_json()["entities"] for each in device.predict(TEXTS[:2])]
        assert [[one["text"] for one in each["entities"]] for each in said] == [
            [one["text"] for one in each] for each in wanted
        ]


def test_what_no_device_can_do_is_refused(bundle, tmp_path):
    with (
        Bundle.open(bundle, trust=TRUST, threads=1) as device,
        pytest.raises(BundleError, match=r"no device can fit a gate.*molehill export --gate"),
    ):
        device.personalise(TEXTS)
    with TRUST.admit(str(bundle)) as admitted, pytest.raises(BundleError, match="the bundle is for token-classific"):
        site.of_bundle(admitted, tmp_path / "page")
