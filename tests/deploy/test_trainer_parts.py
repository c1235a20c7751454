"""A lab machine: Flower's node, the thin app, and of the trainer its line, its outbox and the rows it holds out."""

from __future__ import annotations

import ast
import inspect
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from flwr.supernode import start_client_internal

from molehill.config import parse
from molehill.errors import DataError, DeployError, MessageError, MolehillError
from molehill.tasks.rows import GROUP, Rows
from molehill.tasks.units import set_aside
from molehill.wire.exchange import Place
from molehill.wire.local import MemoryExchange
from molehill_client.deploy import node
from molehill_client.deploy.line import Request, ask, serve
from molehill_client.deploy.outbox import Outbox
from molehill_client.deploy.sides import sides


@pytest.fixture
def line(tmp_path):
    """A trainer that waits for `go` before it answers; ``line.path`` is its socket."""
    path, go = tmp_path / "s", threading.Event()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def work(asked):
        go.wait(10)
        if asked.kind == "bad":
            raise MessageError("no", where="here", mend="Do better.")
        return f"{asked.kind}:{asked.text}"

    thread = threading.Thread(target=serve, args=(listener, work, lambda asked: "at once"))
    thread.start()
    yield SimpleNamespace(path=path, go=go, listener=listener)
    go.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_request_is_answered_and_an_error_comes_through(line):
    line.go.set()
    assert ask(line.path, Request("train", "é" * 100_000)) == "train:" + "é" * 100_000
    with pytest.raises(MolehillError, match=r"here: no\. Do better\."):
        ask(line.path, Request("bad"))


def test_status_is_answered_while_the_trainer_works(line):
    slow = threading.Thread(target=ask, args=(line.path, Request("train")))
    slow.start()
    assert ask(line.path, Request("status")) == "at once"
    line.go.set()
    slow.join(5)


@pytest.mark.parametrize("said", [b"", b"\xff\xff\xff\xff", b"\x02\0\0\0{]", b'\x07\0\0\0{"a":1}'])
def test_nonsense_does_not_end_the_trainer(line, said):
    line.go.set()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(line.path))
        stranger.sendall(said)
    assert ask(line.path, Request("train", "x")) == "train:x"


def test_a_trainer_that_is_not_there_is_waited_for(tmp_path):
    with pytest.raises(DeployError, match="the trainer does not answer"):
        ask(tmp_path / "none", Request("train"), patience=0.3)


def test_a_question_that_comes_twice_is_answered_once_and_its_delta_put_again(tmp_path):
    there = MemoryExchange()
    box, at = Outbox(there, tmp_path), Place("run", 1)
    name = box.put(b"delta", at)
    box.remember("plan", at, name, "reply")
    there.drop(name)  # the coordinator was started anew
    assert Outbox(there, tmp_path).recall("plan") == "reply"
    assert there.get(name) == b"delta"
    assert box.recall("another plan") is None
    box.put(b"next", Place("run", 2))
    assert box.recall("plan") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [box.put(b"next", Place("run", 2))]


def test_a_damaged_outbox_trains_again(tmp_path):
    box = Outbox(MemoryExchange(), tmp_path)
    box.remember("plan", Place("run", 1), box.put(b"delta", Place("run", 1)), "reply")
    for path in tmp_path.iterdir():
        path.write_bytes(b"{")
        assert box.recall("plan") is None


def table(count, **columns):
    values = {"text": tuple(f"row {i}" for i in range(count)), **columns}
    return Rows(values, tuple(map(str, range(count))), "rows")


def judged(**data):
    split = data.pop("split", "test")
    return parse({"data": data, "evaluate": {"split": split}, "task": {"labels": ["x", "y"]}})


def where(sides):
    return [set(part.where) for part in sides]


def test_a_row_keeps_its_side_when_the_file_grows():
    small, large = (where(sides(table(n), None, judged())) for n in (50, 400))
    here = set(map(str, range(50)))
    assert small == [part & here for part in large]
    assert 60 < len(large[1]) < 140


def test_rows_of_one_group_are_on_one_side():
    rows = table(200, **{GROUP: tuple(f"author {i % 10}" for i in range(200))})
    train, test = sides(rows, None, judged(test_fraction=0.4))
    assert not {*train[GROUP]} & {*test[GROUP]}
    assert len(train) + len(test) == 200


def test_twins_are_on_one_side_whatever_their_labels():
    texts = tuple(f"Row {i // 2}{'!' * (i % 2)}" for i in range(200))
    train, test = sides(table(200).having(text=texts, label="xy" * 100), None, judged())
    assert not {text.strip("!") for text in train["text"]} & {text.strip("!") for text in test["text"]}
    assert len(train) + len(test) == 200


@pytest.mark.parametrize("file", [False, True])
def test_rows_set_aside_are_neither_trained_on_nor_tests(file):
    rows, test = table(400), Rows({"text": tuple(f"held {i}" for i in range(100))}, tuple("t" * 100), "tests")
    given = test if file else None
    both = Rows.joined([rows, test], "all") if file else rows
    aside = [text for text, gone in zip(both["text"], set_aside(both, 0.2), strict=True) if gone]
    assert len(aside) > 50
    seen = []
    for split in ("test", "validation"):
        train, scored = sides(rows, given, judged(validation_fraction=0.2, split=split))
        assert not {*train["text"]} & {*aside}
        seen.append((train["text"], scored["text"]))
    assert seen[0][0] == seen[1][0]
    assert [*seen[1][1]] == aside
    assert not {*seen[0][1]} & {*aside, *seen[0][0]}
    assert len(seen[0][0]) + len(seen[0][1]) + len(aside) == len(both)


def test_sides_that_would_be_empty_are_told():
    aside = table(400).take([i for i, gone in enumerate(set_aside(table(400), 0.2)) if gone])
    with pytest.raises(DataError, match=r"there are 0 to train on, 0 for tests and \d+ for validation"):
        sides(aside, None, judged(validation_fraction=0.2))
    left = table(400).take([i for i, gone in enumerate(set_aside(table(400), 0.2)) if not gone])
    with pytest.raises(DataError, match=r"0 for validation, and the run is judged on those for validation"):
        sides(left, None, judged(validation_fraction=0.2, split="validation"))
    assert where(sides(left, aside, judged(validation_fraction=0.2, split="validation"))) == where((left, aside))
    pairs = aside.having(text_pair=aside["text"])
    with pytest.raises(DataError, match="have other columns"):
        sides(left, pairs, judged(validation_fraction=0.2, split="validation"))


def test_a_file_of_tests_that_shares_rows_with_the_other_is_told(caplog):
    rows = table(20)
    sides(rows, rows.take([3, 4]).having(text=("ROW 3.", "new")), judged())
    assert "1 row of 2 held out have a row with the same text" in caplog.text
    caplog.clear()
    sides(rows, Rows({"text": ("new",)}, ("n",), "f"), judged())
    assert not caplog.text


def test_the_thin_app_imports_little():
    """Flower starts a process for every message; torch would take seconds of each."""
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'pandas', 'onnxruntime'}"
    code = f"import sys, molehill_client.deploy.thin; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_flowers_node_has_what_is_replaced_in_it():
    """The names are private, and nothing else would tell that a new Flower calls them otherwise, or not at all."""
    tree = ast.parse(inspect.getsource(start_client_internal))
    functions = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
    calls = {each.func.id: each for each in ast.walk(tree) if isinstance(each, ast.Call) and is_name(each.func)}
    replaced = node.takes_only(b"", node.Pace()).keys() - {"time"}
    assert replaced == {"_pull_and_store_message", "_push_messages", "_verify_fab"}
    assert replaced <= functions & calls.keys()
    for name in ("_pull_and_store_message", "_push_messages"):
        assert not calls[name].args  # what stands in takes keywords only
    given = {each.arg for each in calls["_pull_and_store_message"].keywords}
    assert given >= {"get_fab", "trusted_entities"}
    assert (len(calls["_verify_fab"].args), calls["_verify_fab"].keywords) == (2, [])


def test_flowers_node_uses_of_time_only_sleep():
    """`Pace` stands in for it and has nothing else."""
    tree = ast.parse(inspect.getsource(start_client_internal))
    imports = [each for each in ast.walk(tree) if isinstance(each, ast.Import | ast.ImportFrom)]
    bound = [(each.name, each.asname) for one in imports for each in one.names if "time" in {each.name, each.asname}]
    assert bound == [("time", None)]
    assert not any(isinstance(each, ast.ImportFrom) and each.module == "time" for each in imports)
    used = [each.attr for each in ast.walk(tree) if isinstance(each, ast.Attribute) and is_name(each.value, "time")]
    assert set(used) == {"sleep"}
    assert len(used) == sum(is_name(each, "time") for each in ast.walk(tree))  # it is handed to nobody


def is_name(node, name=None):
    return isinstance(node, ast.Name) and name in {None, node.id}
