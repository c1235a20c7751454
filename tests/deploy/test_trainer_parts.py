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

from molehill.errors import DeployError, MessageError, MolehillError
from molehill.tasks.rows import GROUP, Rows
from molehill.wire.exchange import Place
from molehill.wire.local import MemoryExchange
from molehill_client.deploy import node
from molehill_client.deploy.line import Request, ask, serve
from molehill_client.deploy.outbox import Outbox
from molehill_client.deploy.trainer import held_out


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


def test_a_row_keeps_its_side_when_the_file_grows():
    small, large = table(50), table(400)
    assert [held_out(small, i, 0.25) for i in range(50)] == [held_out(large, i, 0.25) for i in range(50)]
    assert 60 < sum(held_out(large, i, 0.25) for i in range(400)) < 140


def test_rows_of_one_group_are_on_one_side():
    rows = table(200, **{GROUP: tuple(f"author {i % 10}" for i in range(200))})
    for author in range(10):
        assert len({held_out(rows, i, 0.4) for i in range(author, 200, 10)}) == 1


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
