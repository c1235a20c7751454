"""Every source gives the same rows; every bad one a clear error with its place."""

from __future__ import annotations

import pytest

from molehill.errors import DataError
from molehill.tasks.rows import Rows
from molehill.tasks.sources import is_local, read_rows

ROWS = [{"text": "good, really", "label": "pos"}, {"text": "bad\nindeed \u2028 yes", "label": "neg"}]


def as_csv(rows):
    import csv
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.fixture(params=["jsonl", "csv", "csv with mark", "parquet", "folder", "folder with splits"])
def source(request, tmp_path, write):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    match request.param:
        case "jsonl":
            return write("rows.jsonl", ROWS)
        case "csv":
            return write("rows.csv", as_csv(ROWS))
        case "csv with mark":
            return write("rows.csv", b"\xef\xbb\xbf" + as_csv(ROWS).encode())
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
            return str(tmp_path / "rows.parquet")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(ROWS)
    if request.param == "folder with splits":
        table = datasets.DatasetDict({"train": table, "test": table})
    table.save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    return str(tmp_path / "saved")


def test_every_source_gives_the_same_rows(source):
    rows = read_rows(source, split="train")
    assert [record for _, record in rows.records()] == ROWS
    assert all(where.startswith(source) for where in rows.where)


def test_places_are_lines_of_the_file(write):
    path = write("rows.csv", 'text,label\n"two\nlines",a\n\nx,b\n')
    assert read_rows(path).where == (f"{path}:2", f"{path}:5")
    path = write("rows.jsonl", '{"text": "x"}\n\n{"text": "y"}\n')
    assert read_rows(path).where == (f"{path}:1", f"{path}:3")


def test_columns_are_renamed_and_others_kept(write):
    path = write("rows.jsonl", [{"review": "r", "text": "shadowed", "stars": 1, "site": "s"}])
    rows = read_rows(path).renamed({"text": "review", "label": "stars"})
    assert dict(rows.columns) == {"text": ("r",), "label": (1,), "site": ("s",)}


def test_class_labels_of_a_folder_become_names(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, None]}, features=features)
    datasets.disable_progress_bars()
    table.save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    assert read_rows(str(tmp_path / "saved"))["label"] == ("yes", "no", None)


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("empty.jsonl", "", None, "the file is empty"),
        ("blank.jsonl", " \n \n", None, "the file is empty"),
        ("empty.csv", "", None, "the file is empty"),
        ("empty.parquet", "", None, "the file is empty"),
        ("latin.csv", b"text,label\nok,a\ncaf\xe9,b\n", 3, "not UTF-8"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', 1, "not UTF-8"),
        ("bad.jsonl", '{"text": "x"}\n{"text": \n', 2, "not JSON"),
        ("deep.jsonl", "[" * 100_000 + "\n", 1, "not JSON"),
        ("array.json", '[{"text": "x"}]', 1, "not a JSON object"),
        ("ragged.csv", "text,label\na,b\na,b,c\n", 3, "3 cells where the header has 2"),
        ("short.csv", 'text,label\n"a\nb",c\na\n', 4, "1 cells"),
        ("open.csv", 'text,label\n"a,b\n', 2, "not CSV"),
        ("twice.csv", "text,text\na,b\n", 1, "appears twice"),
        ("nameless.csv", "text,\na,b\n", 1, "no name"),
        ("header.csv", "text,label\n", None, "there are no rows"),
        ("bad.parquet", "PAR1 no", None, "not a Parquet file"),
        ("rows.xlsx", "x", None, "cannot read a .xlsx file"),
        ("missing", None, None, "no such file"),
        ("missing.csv", None, None, "cannot read the file: No such file"),
    ],
)
def test_bad_files(write, tmp_path, name, content, line, what):
    path = str(tmp_path / name) if content is None else write(name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert what in caught.value.what
    assert caught.value.where == (path if line is None else f"{path}:{line}")
    assert caught.value.mend


def test_missing_column_names_the_nearest(write):
    path = write("rows.jsonl", [{"review_text": "x", "label": "a"}])
    with pytest.raises(DataError, match=r"no column 'reviewtext'.*Did you mean 'review_text'"):
        read_rows(path).renamed({"text": "reviewtext"})


def test_bad_folders(tmp_path):
    import datasets

    with pytest.raises(DataError, match="not a folder saved by `datasets`"):
        read_rows(str(tmp_path))
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    with pytest.raises(DataError, match=r"no split 'test'.*one of train"):
        read_rows(str(tmp_path / "saved"), split="test")
    (tmp_path / "saved" / "train" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot read the folder"):
        read_rows(str(tmp_path / "saved"))


def test_hub_offline(monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing: cannot load it from the hub.*give a local file"):
        read_rows("nobody/nothing")


def test_what_needs_no_network(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    for source in ("rows.jsonl", "a/rows.csv", "/nowhere/rows", str(tmp_path / "saved"), "sample:revews"):
        assert is_local(source), source
    monkeypatch.setenv("MOLEHILL_CACHE", str(tmp_path))
    for source in ("imdb", "someone/some-rows", "sample:reviews"):
        assert not is_local(source), source
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "vaderSentiment-2.5.tar.gz").touch()
    assert is_local("sample:reviews")


def test_unknown_sample():
    with pytest.raises(DataError, match="sample:reviews"):
        read_rows("sample:revews")


def test_rows_are_a_table():
    rows = Rows.from_records([("f:1", {"a": 1}), ("f:2", {"b": 2})], "f")
    assert dict(rows.columns) == {"a": (1, None), "b": (None, 2)}
    assert list(rows.take([1]).records()) == [("f:2", {"a": None, "b": 2})]
    with pytest.raises(TypeError):
        rows.columns["a"] = ()
    with pytest.raises(ValueError, match="for 2 rows"):
        rows.having(c=[1])
