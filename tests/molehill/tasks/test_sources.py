"""Every source gives the same rows; every bad one a clear error with its place."""

from __future__ import annotations

import gzip
import json

import pytest

from molehill.errors import DataError
from molehill.tasks.rows import Rows
from molehill.tasks.sources import is_local, read_rows

ROWS = [{"text": "good, really", "label": "pos"}, {"text": "bad\nindeed \u2028 yes", "label": "neg"}]


def as_csv(rows, delimiter=","):
    import csv
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


FILES = {
    "rows.jsonl": lambda: "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.json": lambda: json.dumps(ROWS),
    "indented.json": lambda: json.dumps(ROWS, indent=2),
    "rows.csv": lambda: as_csv(ROWS),
    "mark.csv": lambda: "\ufeff" + as_csv(ROWS),
    "spreadsheet.csv": lambda: as_csv(ROWS, ";"),
    "rows.TSV": lambda: as_csv(ROWS, "\t"),
    "rows.csv.gz": lambda: gzip.compress(as_csv(ROWS).encode()),
    "rows.jsonl.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.fixture(params=[*FILES, "parquet", "parquet of bytes", "folder", "folder with splits"])
def source(request, tmp_path, write):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if request.param in FILES:
        return write(request.param, FILES[request.param]())
    if request.param.startswith("parquet"):
        table = pa.Table.from_pylist(ROWS)
        if "bytes" in request.param:  # as writers do that do not mark them as text
            table = table.cast(pa.schema([(name, pa.binary()) for name in table.column_names]))
        pq.write_table(table, tmp_path / "rows.parquet")
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

    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "tags": datasets.List(names)})
    columns = {"text": ["a", "b", "c"], "label": [1, 0, None], "tags": [[0, 1], [], None]}
    table = datasets.Dataset.from_dict(columns, features=features)
    datasets.disable_progress_bars()
    table.save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    rows = read_rows(str(tmp_path / "saved"))
    assert rows["label"] == ("yes", "no", None)
    assert rows["tags"] == (["no", "yes"], [], None)


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
        ("deep.jsonl", '{"a": ' + "[" * 100_000 + "\n", 1, "nested more than"),
        ("deep.jsonl", '{"a": ' * 300 + "1" + "}" * 300 + "\n", 1, "nested more than 200 deep"),
        ("array.json", '[\n{"text": "x"},\n3]', 3, "not a JSON object"),
        ("array.json", '[\n{"text": "x"},\n]', 3, "not JSON"),
        ("array.json", '[\n{"text": "x"}\n{"text": "y"}]', 3, "no comma between"),
        ("array.json", '[\n{"text": "x"},\n{"text"', 3, "ends too early"),
        ("array.json", '[\n{"text": "x"}\n', 3, "the array is cut off"),
        ("array.json", '[{"text": "x"}]\n[1]', 1, "more after the array"),
        ("after.jsonl", '{"text": "x"} {"text": "y"}\n', 1, "more after the object"),
        ("twice.jsonl", '{"text": "x"}\n{"text": "x", "text": "y"}\n', 2, "the key 'text' is there twice"),
        ("lines.json", '{\n"text": "x"\n}\n', None, "a JSON object over several lines"),
        ("inside.json", '{"version": 1,\n"data": [{"text": "x"}]}', None, "rows seem to be in 'data'"),
        ("half.jsonl", '{"text": "x"}\n{"text": "a\\ud800"}\n', 2, "'text' has half a character (U+D800"),
        (
            "half.jsonl",
            '{"messages": [{"role": "user", "content": "\\udc00"}]}\n',
            1,
            "'messages' has half a character",
        ),
        ("zero.jsonl", '{"text": "a\\u0000b"}\n', 1, "'text' has a zero character"),
        ("zero.csv", "text,label\nok,a\nno\0,b\n", 3, "'text' has a zero character"),
        ("zero.tsv", "text\tlabel\nok\ta\nno\0\tb\n", 3, "'text' has a zero character"),
        ("wide.csv", "text,label\nok,a\n".encode("utf-16"), 1, "UTF-16"),
        ("blind.jsonl", ('{"text": "x", "label": "a"}\n' * 2).encode("utf-16-le"), 1, "UTF-16"),
        ("table.csv", b"PK\x03\x04", None, "a spreadsheet or zip file"),
        ("bad.csv.gz", "text,label\n", None, "the compressed file is damaged"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9], None, "the compressed file is damaged"),
        ("ragged.tsv", "text\tlabel\na\tb\na\n", 3, "1 cells where the header has 2"),
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
        ("missing.parquet", None, None, "cannot read the file: No such file"),
    ],
)
def test_bad_files(write, tmp_path, name, content, line, what):
    path = str(tmp_path / name) if content is None else write(name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert what in caught.value.what
    assert caught.value.where == (path if line is None else f"{path}:{line}")
    assert caught.value.mend


def test_what_a_library_cannot_take_is_no_mistake(write, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    long, digits = "word " * 40_000, "9" * 5000
    for name in ("long.csv", "long.tsv"):
        assert read_rows(write(name, f"text\n{long}\n"))["text"] == (long,)
    path = write("digits.jsonl", f'{{"text": "x", "id": {digits}, "n": 12}}\n')
    assert dict(read_rows(path).columns) == {"text": ("x",), "id": (digits,), "n": (12,)}
    when = pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))
    pq.write_table(pa.table({"text": ["x"], "when": when}), tmp_path / "ns.parquet")
    assert read_rows(str(tmp_path / "ns.parquet"))["text"] == ("x",)


def test_a_column_of_parquet_that_is_there_twice(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"twice\.parquet: two columns are called 'text'"):
        read_rows(str(path))


def test_rows_of_parquet_that_are_no_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"ok\xff")]
    )
    path = tmp_path / "bad.parquet"
    for column, what in ((data, "'text' is not UTF-8 text"), (["ok", "a\0"], "'text' has a zero character")):
        pq.write_table(pa.table({"text": column}), path)
        with pytest.raises(DataError, match=what) as caught:
            read_rows(str(path))
        assert caught.value.where == f"{path}:2"


def test_nulls_that_arrow_fills_in(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "calls.parquet"
    calls = [[{"name": "f", "arguments": {"of": "b"}}, {"name": "g", "arguments": {"by": [1, None]}}]]
    pq.write_table(pa.table({"calls": calls, "text": [None]}), path)
    assert read_rows(str(path)).columns == {"calls": tuple(calls), "text": (None,)}


def test_quotes_in_a_tab_separated_file(write):
    enclosing = write("a.tsv", 'text\tlabel\n"one\ttwo ""three"""\tx\n')
    assert read_rows(enclosing)["text"] == ('one\ttwo "three"',)
    characters = write("b.tsv", 'text\tlabel\n"Good" film\tx\nbad\ty\n')
    assert read_rows(characters)["text"] == ('"Good" film', "bad")
    across = write("c.tsv", 'text\tlabel\n"Great film\tpos\nfine\tneg\nall of it"\tneg\nok\tpos\n')
    assert read_rows(across)["text"] == ('"Great film', "fine", 'all of it"', "ok")
    broken = write("d.tsv", 'text\tlabel\n"one\ntwo"\tx\n')
    assert read_rows(broken)["text"] == ("one\ntwo",)


def test_places_in_an_array(write):
    assert read_rows(write("a.json", '[{"text": "x"}, {"text": "y"}]')).where[1].endswith("a.json:1 (row 2)")
    path = write("b.json", json.dumps([{"text": "x", "l": [1, 2]}, {"text": "y"}], indent=1))
    assert read_rows(path).where == (f"{path}:2", f"{path}:9")
    with pytest.raises(DataError, match="there are no rows"):
        read_rows(write("c.json", "[]"))


def test_missing_column_names_the_nearest(write):
    path = write("rows.jsonl", [{"review_text": "x", "label": "a"}])
    with pytest.raises(DataError, match=r"no column 'reviewtext'.*Did you mean 'review_text'"):
        read_rows(path).renamed({"text": "reviewtext"})


def test_bad_folders(tmp_path):
    import datasets

    with pytest.raises(DataError, match="neither a folder saved by `datasets`, nor one with files of rows"):
        read_rows(str(tmp_path))
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    datasets.enable_progress_bars()
    with pytest.raises(DataError, match=r"no split 'test'.*one of train"):
        read_rows(str(tmp_path / "saved"), split="test")
    (tmp_path / "saved" / "train" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="cannot read the folder"):
        read_rows(str(tmp_path / "saved"))


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return str(folder)


def parquet(path, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)


def line(text, **more):
    return json.dumps({"text": text, **more}) + "\n"


def test_a_folder_with_a_file_for_each_split(tmp_path):
    files = {
        "train.jsonl": line("a") + line("b"),
        "test.csv": "text\nc\n",
        "README.md": "#",
        "dataset_infos.json": "{}",
    }
    folder = put(tmp_path, files)
    rows = read_rows(folder)
    assert rows["text"] == ("a", "b")
    assert rows.where == (f"{folder}/train.jsonl:1", f"{folder}/train.jsonl:2")
    assert read_rows(folder, split="test")["text"] == ("c",)
    with pytest.raises(DataError, match=r"there is no split 'validation'\. Set data\.split to one of test, train\."):
        read_rows(folder, split="validation")


@pytest.mark.parametrize("inside", ["", "data"])
def test_shards_as_the_hub_has_them(tmp_path, inside):
    for at in range(11):
        tail = "-a09b74b3ef9c3b56" if at < 2 else ""  # as `datasets` once named them
        parquet(tmp_path / inside / f"train-{at}-of-00011{tail}.parquet", [str(at)])
    parquet(tmp_path / inside / "test-00000-of-00001.parquet", ["t"])
    assert read_rows(str(tmp_path))["text"] == tuple(map(str, range(11)))
    assert read_rows(str(tmp_path), split="test")["text"] == ("t",)
    (tmp_path / inside / "train-3-of-00011.parquet").unlink()
    assert read_rows(str(tmp_path), split="test")["text"] == ("t",)
    with pytest.raises(DataError, match=r"10 of 11 shards are there, and number 3 \(from 0\) is not"):
        read_rows(str(tmp_path))


def test_a_folder_for_each_split(tmp_path):
    files = {
        "train/b.jsonl": line("b", n=1),
        "train/a.jsonl": line("a"),
        "valid/a.jsonl": line("c"),
        "other/notes.md": "",
    }
    folder = put(tmp_path, files)
    assert dict(read_rows(folder).columns) == {"text": ("a", "b"), "n": (None, 1)}
    with pytest.raises(DataError, match="one of train, valid"):
        read_rows(folder, split="other")


def test_a_split_that_is_there_twice(tmp_path):
    csv = "text\nb\n"
    folder = put(tmp_path, dict.fromkeys(("train.tsv", "train.csv", "data/test.csv", "test/x.csv"), csv))
    with pytest.raises(DataError, match=r"'train' could be read from train\.csv, or from train\.tsv"):
        read_rows(folder)
    with pytest.raises(DataError, match=r"'test' could be read from test/x\.csv, or from data/test\.csv"):
        read_rows(folder, split="test")


def test_splits_of_several_subsets(tmp_path):
    folder = put(
        tmp_path, {f"{name}/{split}.jsonl": line("a") for name in ("main", "easy") for split in ("train", "test")}
    )
    with pytest.raises(DataError, match="the splits are one folder deeper, in easy, main"):
        read_rows(folder)
    assert read_rows(str(tmp_path / "main"), split="test")["text"] == ("a",)


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
