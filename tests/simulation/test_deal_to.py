"""Rows dealt to folders are read again by the configuration that dealt them."""

from __future__ import annotations

import json

import pytest
import tiny_world

from molehill.config import parse
from molehill.errors import DataError
from molehill.tasks.conversations import columns_read
from molehill.tasks.schema import load_rows
from molehill_simulation.data import deal, deal_to


@pytest.fixture
def config(tmp_path):
    rows = [
        {"review": row["text"], "stars": row["label"], "domain": row["domain"], "who": f"a{i // 3}", "n": i % 2}
        for i, row in enumerate(tiny_world.rows(48))
    ]
    source = tiny_world.write_rows(tmp_path / "all.jsonl", rows)
    columns = {"text": "review", "label": "stars", "group": "who", "task": "n"}
    data = {"source": str(source), "clients": 5, "columns": columns, "partition": "iid"}
    return parse({"data": data, "task": {"labels": list(tiny_world.LABELS)}})


def test_the_files_hold_what_the_owners_of_a_simulation_have(config, tmp_path):
    folders = [tmp_path / "rows" / name for name in ("lab-1", "lab-2")]
    dealt = deal_to(config, folders)
    data = config.data.model_copy(update={"clients": 2})
    simulated = deal(data, load_rows(data, config.task)[0], config.run.seed)
    for folder, given, owner in zip(folders, dealt, simulated, strict=True):
        assert given.train.columns == owner.train.columns
        for name, rows in (("train.jsonl", owner.train), ("test.jsonl", owner.test)):
            here = data.model_copy(update={"source": str(folder / name)})
            assert load_rows(here, config.task)[0].columns == rows.columns
            first = json.loads((folder / name).read_text().splitlines()[0])
            assert set(first) == {"review", "stars", "domain", "who", "n"}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (lambda n: {"talk": [{"from": "human", "value": f"w{n}"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
         {"conversations": "talk"}),
        (lambda n: {"prompt": [{"role": "user", "content": f"w{n}"}], "completion": "a", "messages": "theirs"},
         {"prompt": "prompt"}),
        (lambda n: {"story": f"w{n}", "prompt": "theirs"}, {"text": "story"}),
    ],
)  # fmt: skip
def test_rows_of_a_causal_lm_are_read_again_as_they_were_meant(tmp_path, row, columns):
    source = tiny_world.write_rows(tmp_path / "all.jsonl", [row(n) for n in range(12)])
    data = {"source": str(source), "clients": 2, "columns": columns, "partition": "iid"}
    config = parse({"data": data, "task": {"kind": "causal-lm"}})
    for folder, owner in zip(
        (tmp_path / "a", tmp_path / "b"), deal_to(config, [tmp_path / "a", tmp_path / "b"]), strict=True
    ):
        here = config.data.model_copy(update={"source": str(folder / "train.jsonl")})
        again = load_rows(here, config.task)[0]
        assert again.columns == owner.train.columns
        assert columns_read(again.columns)[0] in columns


def test_nothing_is_overwritten(config, tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match="there is a file already"):
        deal_to(config, [tmp_path])
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write it"):
        deal_to(config, [tmp_path / "file"])
