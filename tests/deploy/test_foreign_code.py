"""Who controls a coordinator, or has an account on its machine, runs no code on a lab machine."""

from __future__ import annotations

import hashlib

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from lab import NAMES, open_lab

from molehill import bundle, loopback
from molehill_server.deploy.control import Control
from molehill_server.deploy.up import running

SERVER = """
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    messages = [Message(RecordDict({{}}), node, "query.hello", ttl=60.0) for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages, timeout=60))
    codes = [reply.error.code if reply.has_error() else 0 for reply in replies]
    Path({answer!r}).write_text(" ".join(map(str, codes)))
"""
CLIENT = """
from pathlib import Path
Path({trace!r}).write_text("here")
from flwr.clientapp import ClientApp
app = ClientApp()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # Flower's own
def test_a_bundle_with_code_is_refused_by_the_machine(config, tmp_path):
    trace, answer = tmp_path / "trace", tmp_path / "answer"
    evil = tmp_path / "evil"
    evil.mkdir()
    text = bundle.TEXT.replace("molehill_server.app", "evil_server").replace(
        "molehill_client.deploy.thin", "evil_client"
    )
    (evil / bundle.NAME).write_text(text)
    (evil / "evil_server.py").write_text(SERVER.format(answer=str(answer)))
    (evil / "evil_client.py").write_text(CLIENT.format(trace=str(trace)))
    content = build_fab_from_disk(evil)
    with open_lab(tmp_path, config(), NAMES) as lab:
        lab.up()
        lab.join("client-1")
        found = running(lab.state)
        with Control(f"{loopback.LOOPBACK}:{found.superlink}", loopback.pair(lab.state).cert) as control:
            lab.until(lambda: [node.status for node in control.nodes()] == ["online"])
            fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
            control._client.StartRun(StartRunRequest(fab=fab))
        lab.until(answer.exists, seconds=120)
        lab.until(lambda: answer.read_text() != "")
        assert answer.read_text() == str(int(ErrorCode.INVALID_FAB))
        assert not trace.exists()
