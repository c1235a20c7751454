"""What goes to the hub, by a hub of the test's own: the shared adapter and the model card, and nothing else."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_world
from huggingface_hub import HfApi
from typer.testing import CliRunner

from molehill.cli import app
from molehill.errors import AdapterError, ConfigError, DeployError
from molehill.molora import adapter
from molehill_simulation.push import push
from molehill_simulation.simulate import simulate


class Hub(ThreadingHTTPServer):
    """The few calls of the hub that a push makes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.files, self.tokens = {}, {}, set()
        self.denies = False

    @property
    def api(self):
        return HfApi(endpoint=f"http://127.0.0.1:{self.server_port}", token="hf_mine")


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        hub = self.server
        hub.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            if hub.denies:
                return self._say(403, {"error": "this token may only read"})
            if name in hub.repos:
                return self._say(409, {"error": "there is one already"})
            hub.repos[name] = said["visibility"] == "private"
            return self._say(200, {"url": f"{hub.api.endpoint}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._say(200, {"files": modes})
        assert "/commit/" in self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = "a" * 40
        return self._say(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.api.endpoint}/org/x/commit/{oid}"}
        )

    def do_GET(self):
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        self._say(200, {"id": name, "private": self.server.repos[name], "siblings": []})

    def _say(self, status, document):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, with a base that says it is one of the hub."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny_world.save_base(folder / "bert", "bert")
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(30))
    simulate(tiny_world.config(base, source, run={"rounds": 1}), folder / "out")
    path = folder / "out/adapter/molora.json"
    said = json.loads(path.read_text())
    with pytest.raises(AdapterError, match="its base local:bert is not on the hub"):
        push(folder / "out", "org/x")
    said["base"] |= {"id": "org/small", "revision": "abc"}
    said["files"]["molora.json"] = adapter._own_digest(said)
    path.write_text(json.dumps(said))
    return folder / "out"


def test_the_shared_adapter_goes_and_all_else_stays(run, hub):
    address = push(run, "org/x", api=hub.api)
    assert address.startswith(f"{hub.api.endpoint}/org/x/commit/")
    assert hub.repos == {"org/x": True}
    assert hub.tokens == {"Bearer hf_mine"}
    folder = run / "adapter"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(hub.files) == {"README.md", *there}
    assert all(hub.files[name] == (folder / name).read_bytes() for name in there)
    assert b"base_model: org/small" in hub.files["README.md"]
    names = [path.name.encode() for path in (run / "clients").iterdir() if path.is_dir()]
    assert names
    assert not [name for name in names if name in b"".join(hub.files.values())]


def test_the_command_goes_by_the_environment(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.api.endpoint)  # HF_ENDPOINT, as it was at the start
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    done = CliRunner().invoke(app, ["push", str(run), "org/x", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["repository"], told["commit"]) == ("org/x", f"{hub.api.endpoint}/org/x/commit/{'a' * 40}")
    assert hub.tokens == {"Bearer hf_other"}


def test_what_is_open_to_everybody_has_to_be_meant(run, hub):
    hub.repos["org/x"] = False
    with pytest.raises(ConfigError, match=r"org/x: the repository is there, and open to everybody\. Give --public"):
        push(run, "org/x", api=hub.api)
    assert not hub.files
    push(run, "org/x", api=hub.api, public=True)
    assert hub.files
    push(run, "org/new", api=hub.api, public=True)
    assert hub.repos["org/new"] is False
    hub.repos["org/x"] = True
    push(run, "org/x", api=hub.api)  # once more, as another commit


def test_what_fails_says_why(run, hub):
    hub.denies = True
    with pytest.raises(
        DeployError, match=r"the hub refuses it: .*Log in with `hf auth login`, or set HF_TOKEN"
    ) as denied:
        push(run, "org/x", api=hub.api)
    assert "hf_mine" not in str(denied.value)
    with pytest.raises(ConfigError, match="no name of a repository"):
        push(run, "a/b/c/..", api=hub.api)
    with pytest.raises(DeployError, match="the hub cannot be reached"):
        push(run, "org/x", api=HfApi(endpoint="http://127.0.0.1:9"))
    assert not hub.files


def test_offline_and_damage_are_told(run):
    done = CliRunner().invoke(app, ["push", str(run), "org/x"])
    assert done.exit_code == 11, done.output
    assert "the hub is switched off here. Unset HF_HUB_OFFLINE" in done.stderr
    path = run / "adapter/router.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        with pytest.raises(AdapterError, match=r"router\.safetensors: the file was damaged"):
            push(run, "org/x")
    finally:
        path.write_bytes(whole)
