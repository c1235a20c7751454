"""Bundles are pulled from a real web server, by the commands that do it."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import socket
import threading
import time

import pytest
from edge_attacks import NEW
from typer.testing import CliRunner

from molehill.errors import TrustError
from molehill_edge import client, fetch
from molehill_edge.commands.group import app


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cut = ""  # a path that breaks off

    def log_message(self, *_):
        pass

    def copyfile(self, source, target):
        if self.cut and self.path.endswith(self.cut):
            target.write(source.read(700))
            target.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            super().copyfile(source, target)


@pytest.fixture
def web(empty, monkeypatch):
    """The repository on a real web server of this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    handler = type("Handler", (_Handler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(empty.repo)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def molehill(empty, monkeypatch):
    monkeypatch.chdir(empty.folder)
    return lambda line: CliRunner().invoke(app, line.split(), env={"MOLEHILL_STORE": "store"})


def said(result, code=0):
    assert result.exit_code == code, result.output
    return result.stdout


def test_over_http(empty, web, molehill):
    url, handler = web
    result = molehill(f"pull {url}")
    assert said(result, 14) == ""
    assert "this device does not know this repository" in result.stderr
    assert "bundle reviews: version 1 is in use now; 6 files" in said(molehill(f"pull {url} --root keys/root.json"))
    assert "version 1 is the newest" in said(molehill(f"pull {url}"))
    assert empty.opened() == 1

    empty.publish(2, {"base.bin": b"other" * 1000})
    handler.cut = next(
        path.name for path in (empty.repo / "targets" / "blobs").iterdir() if path.stat().st_size == 5000
    )
    result = molehill("update")
    assert said(result, 14) == ""
    assert "Version 1 of bundle reviews stays in use." in result.stderr
    assert result.stderr.count("\n") == 1
    assert empty.opened() == 1
    handler.cut = ""
    rows = json.loads(said(molehill("update --json")))
    assert rows == [{"id": "reviews", "version": 2, "before": 1, "downloaded_files": 1, "downloaded_bytes": 5000,
                    "experts": [], "experts_set_aside": []}]  # fmt: skip
    assert empty.opened() == 2

    shown = json.loads(said(molehill("list --json")))
    assert [(row["id"], row["version"], row["from"]) for row in shown] == [("reviews", 2, f"{url}/")]
    assert "reviews" in said(molehill("list"))


def test_a_server_that_is_not_there(empty, molehill):
    empty.pull(root=empty.root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    result = molehill(f"pull {url} --root keys/root.json --json")
    error = json.loads(said(result, 14))["error"]
    assert error["kind"] == "TrustError"
    assert error["what"].startswith("cannot ")
    assert result.stderr == ""


def test_updating_all_goes_on_after_a_failure(empty, web, molehill):
    url, handler = web
    assert json.loads(said(molehill("update --json"))) == []
    empty.publish(1, id="another")
    for name in ("another", "reviews"):
        said(molehill(f"pull {url} --root keys/root.json --id {name}"))
    result = molehill(f"pull {url} --json")
    assert "several bundles: another, reviews" in json.loads(said(result, 13))["error"]["what"]
    empty.publish(2, {"base.bin": b"other" * 1000}, id="another")
    empty.publish(2, NEW)
    handler.cut = next(
        path.name for path in (empty.repo / "targets" / "blobs").iterdir() if path.stat().st_size == 5000
    )
    result = molehill("update")
    assert "bundle reviews: version 2 is in use now, before: 1" in said(result, 14)
    assert "Version 1 of bundle another stays in use." in result.stderr
    rows = json.loads(said(molehill("update --json"), 14))
    assert [row["id"] for row in rows] == ["another", "reviews"]
    assert "Version 1 of bundle another stays in use." in rows[0]["error"]
    assert rows[1]["version"] == 2
    assert json.loads(said(molehill("update --id another --json"), 14))["error"]["kind"] == "TrustError"
    assert [empty.opened(name) for name in ("another", "reviews")] == [1, 2]


def test_the_empty_store(empty, molehill):
    assert "no bundles; get one with" in said(molehill("update"))
    assert json.loads(said(molehill("list --json"))) == []
    result = molehill("pull https://bundles.example --root nothing")
    assert "nothing: cannot read it: No such file" in result.stderr
    assert result.exit_code == 14


def test_a_server_that_drips(empty, monkeypatch):
    """It sends something now and then, so that no time limit of the connection ends it."""

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b".")
                    time.sleep(0.05)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(client, "_GRACE", 0.2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever).start()
        begin = time.monotonic()
        with pytest.raises(TrustError, match=r"it is too slow: \d+ bytes in 0 s"):
            fetch.pull(empty.store, f"http://127.0.0.1:{server.server_port}/", root=empty.root)
        assert time.monotonic() - begin < 2
        server.shutdown()
