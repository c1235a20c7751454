"""Rows set aside for validation: always the same, and neither trained on nor among the test rows of any seed."""

from __future__ import annotations

import json
from collections import Counter
from io import StringIO

import pytest
import tiny_world
from rich.console import Console
from typer.testing import CliRunner

from molehill.cli import app
from molehill.config import Data, parse
from molehill.errors import ConfigError, DataError
from molehill.tasks.rows import GROUP, Rows
from molehill.tasks.schema import load_rows
from molehill.tasks.units import set_aside, units
from molehill_client.deploy.sides import sides
from molehill_simulation.card import render as cards
from molehill_simulation.data import deal
from molehill_simulation.describe import describe
from molehill_simulation.report import render
from molehill_simulation.simulate import simulate
from molehill_simulation.ui import show_summary

BY_DOMAIN = {"name": "by_column", "column": "domain"}
PARTITIONS = ("iid", BY_DOMAIN, {"name": "dirichlet", "alpha": 10.0}, {"name": "quantity_skew", "alpha": 5.0})


def table(n=600):
    columns = {
        "text": [f"{'Row' if i % 9 else 'ROW!'} {i - 1 if i % 9 == 0 and i else i}" for i in range(n)],  # twins
        "label": [str(i % 3) for i in range(n)],
        "domain": ["ab"[i % 2] for i in range(n)],
        GROUP: [f"{i // 10}" if i % 4 == 0 else None for i in range(n)],
    }
    return Rows({name: tuple(values) for name, values in columns.items()}, tuple(map(str, range(n))), "rows")


def dealt(table, seed, split="test", partition=BY_DOMAIN, clients=4, **more):
    data = Data.model_validate({"clients": clients, "partition": partition, "validation_fraction": 0.2, **more})
    owners = deal(data, table, seed, split)
    train, test, spare = (Counter(w for o in owners for w in part(o).where) for part in _PARTS)
    assert max((train + test + spare).values()) == 1
    return train.keys(), test.keys(), spare.keys(), owners


_PARTS = (lambda owner: owner.train, lambda owner: owner.test, lambda owner: owner.spare)


def test_they_are_the_same_whatever_seed_and_partition_and_no_run_sees_them():
    rows = table()
    aside = {where for where, gone in zip(rows.where, set_aside(rows, 0.2), strict=True) if gone}
    assert 60 < len(aside) < 180
    assert all(len({rows.where[i] in aside for i in unit}) == 1 for unit in units(rows))
    used = []
    for partition in PARTITIONS:
        for seed, clients in ((0, 2), (1, 4)):
            train, test, spare, _ = dealt(rows, seed, partition=partition, clients=clients)
            assert spare == aside
            assert len(train) + len(test) + len(aside) == len(rows)
            again, scored, left, _ = dealt(rows, seed, "validation", partition, clients)
            assert (again, scored, left) == (train, aside, test)
            used.append(frozenset(test))
    assert len(set(used)) == len(used)  # which the test rows are follows from the seed


def test_order_and_other_rows_change_nothing():
    rows = table()
    aside = {text for text, gone in zip(rows["text"], set_aside(rows, 0.2), strict=True) if gone}
    turned = rows.take(range(len(rows))[::-1])
    assert {text for text, gone in zip(turned["text"], set_aside(turned, 0.2), strict=True) if gone} == aside
    part = rows.take(range(300))
    assert {text for text, gone in zip(part["text"], set_aside(part, 0.2), strict=True) if gone} == aside & {
        *part["text"]
    }
    more = {text for text, gone in zip(rows["text"], set_aside(rows, 0.4), strict=True) if gone}
    assert aside < more
    assert not any(set_aside(rows, 0.0))


def test_a_cap_holds_for_either_split_and_keeps_the_rows_to_train_on():
    rows = table()
    for cap in (None, 7):
        first, second = (dealt(rows, 3, split, rows=20, test_rows=cap) for split in ("test", "validation"))
        assert first[0] == second[0]
        for _, _, _, owners in (first, second):
            assert all(len(owner.train) == 20 for owner in owners)
            assert all(len(owner.test) == 7 and len(owner.spare) == 7 for owner in owners if cap)


def test_nothing_changes_where_none_are_set_aside():
    rows, data = table(), Data(clients=4)
    plain = deal(data, rows, 5)
    assert all(len(owner.spare) == 0 for owner in plain)
    assert sum(len(owner.train) + len(owner.test) for owner in plain) == len(rows)


def test_a_client_without_validation_rows_is_told():
    rows = table(60)
    with pytest.raises(DataError, match=r"data\.validation_fraction: client .* none is set aside for validation"):
        dealt(rows, 0, "validation", "iid", 6, validation_fraction=0.001)


@pytest.mark.parametrize("data", [{}, {"validation_fraction": 0.0}])
def test_a_run_cannot_be_judged_on_rows_that_nobody_set_aside(data):
    with pytest.raises(ConfigError, match=r"data\.validation_fraction sets none aside") as caught:
        parse({"data": data, "evaluate": {"split": "validation"}})
    assert "Set data.validation_fraction" in caught.value.mend
    assert parse({"data": {"validation_fraction": 0.1}, "evaluate": {"split": "validation"}}).evaluate.split


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    base = tiny_world.save_base(folder / "base", "bert")
    rows = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(80))
    return tiny_world.config(
        base, rows, data={"validation_fraction": 0.3}, run={"rounds": 1}, train={"steps": 1},
        evaluate={"split": "validation"},
    )  # fmt: skip


def test_all_figures_of_a_run_are_about_them_and_it_says_so(config, tmp_path):
    rows, _ = load_rows(config.data, config.task)
    count = sum(set_aside(rows, 0.3))
    plan = dict(describe(config).plan)
    assert plan["validation"] == f"{count} rows of 80 set aside, whatever the seed; all figures are about them"
    assert plan["data"].endswith("for validation")
    summary = simulate(config, tmp_path / "run")
    assert sum(client.n_test for client in summary.clients) == count
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["split"] == "validation"
    caveat = "all figures are of the validation rows, to choose settings by, and not of the test rows"
    assert caveat in summary.caveats
    console = Console(file=StringIO(), width=200)
    show_summary(summary, console)
    assert "on each client's own validation rows" in console.file.getvalue()
    assert caveat in console.file.getvalue()
    page = render(tmp_path / "run")
    assert "on the client's own validation rows" in page
    assert caveat in page
    assert f"On {count} validation rows of" in cards(tmp_path / "run")["README.md"]


def test_of_test_rows_nothing_is_said(config):
    other = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"split": "test"})})
    plan = dict(describe(other).plan)
    assert plan["validation"].endswith('whatever the seed; evaluate.split = "validation" looks at them')
    assert plan["data"].endswith("held out")


def test_they_are_dealt_to_a_file_of_their_own(config, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    folders = [tmp_path / name for name in ("a", "b")]
    done = CliRunner().invoke(app, ["deal", str(path), *map(str, folders)])
    assert done.exit_code == 0, done.output
    rows, task = load_rows(config.data, config.task)
    aside = {text for text, gone in zip(rows["text"], set_aside(rows, 0.3), strict=True) if gone}
    given = {name: set() for name in ("train", "test", "validation")}
    for folder in folders:
        for name, texts in given.items():
            lines = (folder / f"{name}.jsonl").read_text().splitlines()
            texts |= {json.loads(line)["text"] for line in lines}
            assert f"{len(lines)} " in next(said for said in done.output.splitlines() if str(folder) in said)
    assert given["validation"] == aside
    assert not aside & (given["train"] | given["test"])
    assert len(given["train"]) + len(given["test"]) + len(aside) == len(rows)
    # A machine that gets such files knows the sides again.
    for split, file in (("test", "test"), ("validation", "validation")):
        here = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"split": split})})
        files = [
            load_rows(config.data.model_copy(update={"source": str(folders[0] / f"{name}.jsonl")}), task)[0]
            for name in ("train", file)
        ]
        assert [part.where for part in sides(*files, here)] == [part.where for part in files]
