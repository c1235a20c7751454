"""Environment variables, places and addresses of machines that are not ours."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from molehill import address, surroundings
from molehill.errors import ConfigError, DeployError

DEAD = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


# ---- addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("lab.example.org:9440", "lab.example.org", 9440),
        ("192.0.2.7:1", "192.0.2.7", 1),
        ("[::1]:9440", "::1", 9440),
        ("[2001:db8::7]:65535", "2001:db8::7", 65535),
        ("klinik-süd.example:9440", "klinik-süd.example", 9440),
    ],
)
def test_an_address_is_read_and_written(text, host, port):
    assert address.parse(text) == (host, port)
    assert address.join(host, port) == text


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("::1", r"in brackets.*\[::1\]:9440"),
        ("[::1]", r"in brackets.*\[::1\]:9440"),
        ("2001:db8::7:9440", r"in brackets"),
        ("lab", "Give HOST:PORT"),
        ("lab:", "Give HOST:PORT"),
        (":9440", "Give HOST:PORT"),
        ("lab:0", "Give HOST:PORT"),
        ("lab:65536", "Give HOST:PORT"),
        ("lab:\uff19", "Give HOST:PORT"),
        ("https://lab:9440", "without https://"),
        ("lab:9440/", "Give HOST:PORT"),
        ("lab..example:9440", "neither a host name nor an address"),
        ("la b:9440", "neither a host name nor an address"),
        ("[lab]:9440", "neither a host name nor an address"),
        ("x" * 300 + ":9440", "neither a host name nor an address"),
    ],
)
def test_what_is_no_address_is_refused_with_what_would_be_one(text, mend):
    with pytest.raises(ConfigError, match=mend):
        address.parse(text)


@pytest.mark.parametrize("host", ["::", "[::1]", "localhost", "0.0.0.0"])
def test_a_host_may_stand_in_brackets(host):
    assert address.require_host(host) == host.strip("[]")


# ---- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", ["/usr/bin:/bin", None, ""])
def test_the_commands_beside_this_python_come_first(monkeypatch, known):
    monkeypatch.delenv("PATH") if known is None else monkeypatch.setenv("PATH", known)
    found = surroundings.variables()["PATH"]
    assert found.split(os.pathsep)[0] == str(Path(sys.executable).parent)  # not where a virtual one links to
    assert shutil.which("flwr-serverapp", path=found) == str(Path(sys.executable).parent / "flwr-serverapp")
    assert (known or "/bin") in found


def test_a_command_that_is_missing_is_named():
    surroundings.require_commands("flwr-serverapp", "flwr-clientapp")
    with pytest.raises(DeployError, match="the command flwr-nothing is not there"):
        surroundings.require_commands("flwr-serverapp", "flwr-nothing")


# ---- proxies -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here():
    """A server on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ODD = [
    {"http_proxy": DEAD},
    {"HTTP_PROXY": DEAD, "NO_PROXY": "corp.example"},
    {"http_proxy": DEAD, "no_proxy": ""},
    {"http_proxy": DEAD, "no_proxy": "*"},
    {"http_proxy": DEAD, "no_proxy": ".corp.example, 10.0.0.0/8", "NO_PROXY": "x"},
    {"ALL_PROXY": "socks://127.0.0.1:9"},
    {"all_proxy": "socks5h://127.0.0.1:9"},
    {"http_proxy": "http://proxy:port"},
    {"http_proxy": DEAD, "no_proxy": "[::1]"},
]


def applied(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_process_that_stays_on_this_machine_asks_no_proxy(monkeypatch, here, odd):
    applied(monkeypatch, odd)
    found = surroundings.variables(outside=False)
    for name in odd:
        monkeypatch.delenv(name)
    applied(monkeypatch, found)
    assert httpx.get(here).status_code == 200


@pytest.mark.parametrize("odd", ODD[:5], ids=str)
def test_a_process_that_goes_outside_asks_none_on_loopback(monkeypatch, here, odd):
    applied(monkeypatch, odd)
    found = surroundings.variables()
    for name, value in odd.items():
        assert value.replace(" ", "") in found[name]  # what was exempt stays exempt
    applied(monkeypatch, found)
    assert httpx.get(here).status_code == 200
    if odd.get("no_proxy") != "*":
        with pytest.raises(httpx.ConnectError):
            httpx.get("http://192.0.2.7")


def test_grpc_has_an_exception_list_of_its_own(monkeypatch):
    assert "no_grpc_proxy" not in surroundings.variables()
    monkeypatch.setenv("no_grpc_proxy", "x")
    assert surroundings.variables()["no_grpc_proxy"] == "x,localhost,127.0.0.1,::1"


# ---- places ------------------------------------------------------------------------------------------------------


@pytest.fixture
def long_place(tmp_path, monkeypatch):
    """The only place for temporary files is one with a long path."""
    place = tmp_path / ("scratch" * 12)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def test_a_socket_has_a_place_however_long_the_path_of_temporary_files(long_place):
    with surroundings.short_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "gateway.sock.4294967295"))  # the door numbers its ends of connections
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not folder.is_relative_to(long_place)
    assert not folder.exists()


def test_where_there_is_no_place_for_a_socket_that_is_said(long_place, monkeypatch):
    made = surroundings._made
    places = [Path("/none"), long_place]
    monkeypatch.setattr(surroundings, "_made", lambda _, longest: made(places, longest))
    words = r"no place for sockets \(.*none: No such file or directory; .*too long\)\. Let TMPDIR name a folder"
    with pytest.raises(DeployError, match=words), surroundings.short_folder():
        pass


def test_a_proxy_that_nothing_understands_is_no_traceback():
    code = (
        "from molehill import config, errors\n"
        "from molehill.tasks import base_model, sources\n"
        "base = config.Base(model='nobody/nothing')\n"
        "hub = lambda: base_model._locate(base, offline=False)\n"
        "for load in (hub, lambda: sources._hub('nobody/nothing', 'train')):\n"
        "    try:\n        load()\n"
        "    except (errors.ModelError, errors.DataError) as error:\n        print(error)\n"
    )
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "ALL_PROXY": "socks5://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.count("SOCKS proxy") == 2
