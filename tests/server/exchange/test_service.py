"""The exchange as a service: rounds that are collected, ports, how it ends and what is left of it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from exchange_house import NOW, QUICK, SECOND, noise, slowly, wait_for

from molehill.errors import ConfigError, FederationError
from molehill.pki import Identity
from molehill.wire.remote import GrpcExchange


def test_old_rounds_are_collected_and_what_plans_name_is_not(house):
    house.give()
    house.start(collect=0.05)
    shared = house.blobs.put(b"shared")
    house.give("lab-2", read=[shared])
    name = house.node().put(b"delta", NOW)
    go_on = threading.Event()
    open_upload = house.stub("lab-2").Put.future(slowly(noise(3000), go_on), timeout=20)
    wait_for(lambda: house.files("parts"))
    time.sleep(0.2)
    assert house.files("blobs") == sorted([name, shared])
    assert house.files("receipts") == ["lab-1.json"]
    for node in ("lab-1", "lab-2"):
        house.give(node, round=4, read=[shared])
    wait_for(lambda: not house.files("receipts") and not house.files("parts"))
    assert house.files("blobs") == [shared]
    go_on.set()
    assert open_upload.exception(20).code().name == "PERMISSION_DENIED"
    assert house.files("blobs") == [shared]


def test_a_damaged_grant_lets_nothing_happen_and_nothing_be_collected(house):
    house.give()
    house.start(collect=0.05)
    name = house.node().put(b"delta", NOW)
    (house.folder / "grants" / "lab-1.json").write_text("{")
    time.sleep(0.2)
    assert house.files("blobs") == [name]
    with pytest.raises(FederationError, match="grant for lab-1 is damaged"):
        house.node(patience=SECOND).put(b"delta", NOW)


def test_a_port_in_use_ends_in_words(house):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "molehill_server.exchange", "--folder", str(house.folder), "--listen", listen]
        command += ["--identity", str(house.identities["server"])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.exit_code
    assert f"error: {listen}: cannot listen there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_told_server_ends_by_itself_and_says_what_it_did(house):
    house.give()
    house.spawn()
    house.node().put(b"x", NOW)
    assert house.end(house.process, signal.SIGTERM) == 0
    assert "lab-1 delivered" in house.log()
    assert "Traceback" not in house.log()


def test_a_closed_exchange_does_not_hang(serving):
    identity = Identity.load(serving.identities["lab-1"])
    node = GrpcExchange(f"127.0.0.1:{serving.port}", identity, patience=QUICK)
    node.close()
    with pytest.raises(ValueError, match="closed"):
        node.put(b"x", NOW)
