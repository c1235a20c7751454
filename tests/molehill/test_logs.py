"""With --log-json standard error holds one JSON object a line, whatever ends up there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from molehill import logs

SCRIPT = """
import logging, warnings
from molehill import cli, logs
from molehill_server.audit import AuditLog
from pathlib import Path

@cli.app.command()
def chatter():
    log = logging.getLogger("molehill_client.x")
    log.debug("too much")
    log.info("a line\\nand %s", "more", extra=logs.fields(round=3, level="fatal", where=Path("a")))
    logging.getLogger("somebody.else").info("too much")
    logging.getLogger("somebody.else").warning("odd")
    warnings.warn("careful")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("failed")
    AuditLog(Path("audit.jsonl")).append("joined", client="lab-1")

cli.main()
"""


def run(tmp_path, *arguments, **environment):
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_every_record_is_one_object(tmp_path):
    done = run(tmp_path, "--log-json", "chatter")
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert [record["message"].splitlines()[0] for record in records[:2]] == ["a line", "odd"]
    assert all({"time", "level", "logger", "message"} <= set(record) for record in records)
    first, _, warning, failed, audit = records
    assert (first["level"], first["round"], first["where"]) == ("info", 3, "a")
    assert first["time"].endswith("+00:00")
    assert "careful" in warning["message"]
    assert "ZeroDivisionError" in failed["exception"]
    assert (audit["logger"], audit["event"], audit["client"]) == ("molehill_server.audit", "joined", "lab-1")


@pytest.mark.parametrize("how", [{"arguments": ["--log-json"]}, {"MOLEHILL_LOG_JSON": "1"}], ids=["option", "variable"])
def test_a_mistake_is_a_record_as_well(tmp_path, how):
    arguments = how.pop("arguments", [])
    done = run(tmp_path, *arguments, "pki", "show", "nowhere", **how)
    assert (done.returncode, done.stdout) == (10, "")
    record = json.loads(done.stderr)
    assert (record["level"], record["kind"], record["code"], record["where"]) == (
        "error",
        "IdentityError",
        10,
        "nowhere",
    )
    assert record["mend"]


def test_without_it_text_is_for_people(tmp_path):
    done = run(tmp_path, "pki", "show", "nowhere")
    assert done.stderr.startswith("error: nowhere: neither")


def test_what_happens_again_and_again_is_said_seldom():
    seldom = logs.Seldom(every=0.2)
    assert [seldom("a"), seldom("a"), seldom("b"), seldom("a")] == ["", None, "", None]
    time.sleep(0.25)
    assert [seldom("a"), seldom("a")] == [" (2 times more since it was last said)", None]
    for number in range(5000):
        seldom(number)
    assert len(seldom._seen) <= 1024
