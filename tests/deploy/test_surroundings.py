"""A deployment on a machine that is not as ours: commands by their full path, proxies, a long TMPDIR, IPv6."""

from __future__ import annotations

import fcntl
import os
import re
import socket

import pytest
from lab import open_lab
from typer.testing import CliRunner

from molehill import pki
from molehill.cli import app
from molehill.errors import DeployError
from molehill_server.deploy.office import Office

DEAD = "http://127.0.0.1:9"


@pytest.fixture
def strange(config, tmp_path):
    """A lab whose processes get an empty environment, but for what batch systems and companies put there."""
    place = tmp_path / "scratch-of-the-batch-system" / "first.last@institute.example.org" / ("job-0042" * 5)
    place.mkdir(parents=True)
    settings = {"run": {"rounds": 2}, "train": {"steps": 1}, "data": {"clients": 2}}
    with open_lab(tmp_path / "lab", config(**settings), ("client-1", "client-2")) as lab:
        lab.variables = {"PATH": "/usr/bin:/bin", "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
        lab.variables |= {
            "http_proxy": DEAD,
            "HTTPS_PROXY": DEAD,
            "grpc_proxy": DEAD,
            "ALL_PROXY": "socks://127.0.0.1:9",
        }
        try:
            with socket.create_server(("::1", 0), family=socket.AF_INET6):
                lab.host = "::1"
        except OSError:
            pass  # a machine without IPv6
        yield lab


@pytest.mark.slow
def test_a_run_ends_well_whatever_the_machine_is_like_and_tells_what_it_waits_for(strange):
    strange.up()
    strange.join_all()
    run = strange.run()
    strange.until(lambda: strange.events("round"), run, 120)
    strange.processes["coordinator"].kill()
    strange.processes["coordinator"].wait()
    strange.until(lambda: "waiting up to 5 min 00 s for it (molehill server up)" in strange.said("run"), run, 30)
    strange.up()
    strange.finish(run)
    assert "the coordinator is back" in strange.said("run")
    for name in strange.names:
        lines = re.findall(
            r"tiny: round (\d) trained, 1 step on \d+ rows in .* s, loss \d.*, sent .* kB", strange.said(name)
        )
        assert set(lines) == set("12")
        assert re.search(r"round 1 trained.* last accepted: none yet", strange.said(name))
        assert re.search(r"round 2 trained.* last accepted: round 1", strange.said(name))
        status = strange.ask("client", "status", "--state", strange.folder / f"{name}.state")
        assert (status.returncode, "lines" in status.stdout) == (0, False)
    story = strange.story()
    assert "No such file" not in story
    assert "Traceback" not in "".join(map(strange.said, ("coordinator", "run", *strange.names)))
    assert not re.search(r"\d (admitted|refused)$", strange.said("coordinator"), re.MULTILINE)
    assert "admitted, client CN=client-1, serial " in strange.said("coordinator")


def break_command(lab, command):
    """Let a command of Flower's end at once in all processes of a lab."""
    folder = lab.folder / "broken"
    folder.mkdir(exist_ok=True)
    lines = (
        "import os, sys",
        f"if {command!r} in {{os.path.basename(word) for word in sys.orig_argv}}:",
        " print('it is broken', flush=True)",
        " os._exit(3)",
    )
    (folder / "sitecustomize.py").write_text("\n".join(lines), encoding="utf-8")
    lab.variables = {**lab.environment(), "PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_a_machine_whose_node_cannot_live_has_not_joined_and_says_why_in_seconds(config, tmp_path):
    with open_lab(tmp_path, config(), ("client-1",)) as lab:
        lab.up()
        break_command(lab, "flower-supernode")
        process = lab.join("client-1", wait=False)
        assert process.wait(90) == 11, lab.story()
        assert "supernode ended 3 times, last with code 3: it is broken" in lab.said("client-1")
        assert "has joined" not in lab.said("client-1")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MOLEHILL_NIGHTLY"), reason="takes a minute of waiting")
def test_a_server_process_that_cannot_live_is_reported_with_its_last_line(config, tmp_path):
    with open_lab(tmp_path, config(), ()) as lab:
        break_command(lab, "flwr-serverapp")
        lab.up()
        run = lab.run()
        assert run.wait(170) == 11, lab.story()
        assert "flwr-serverapp ended 3 times before anything had begun: it is broken" in lab.said("run")


# ---- what the system refuses -------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """What a command says that ends with a code."""
    (tmp_path / "file").touch()
    authority = pki.Authority.create(tmp_path / "ca")
    for name, hosts in (("coordinator", ("localhost",)), ("lab-1", ())):
        _, bundle = authority.sign(pki.request(tmp_path / name, name, hosts=hosts), server=bool(hosts))
        pki.install(bundle, tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def call(line, code):
        done = CliRunner().invoke(app, line.split())
        assert done.exit_code == code, done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return " ".join(done.output.split())

    return call


UP, JOIN = "server up --identity coordinator", "client join --identity lab-1 --data file"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"{UP} --state file/state", 11, "file/state: the system refuses it: Not a directory"),
        (f"{UP} --state file", 11, "file: the system refuses it: File exists"),
        (f"{UP} --port 9449 --exchange-port 9449", 11, "nodes and adapters cannot both come in at port 9449"),
        (f"{UP} --port 70000", 2, "70000"),
        (f"{UP} --host 192.0.2.7", 11, "cannot listen on 192.0.2.7:9440: Cannot assign requested address"),
        (f"{UP} --host 2001:db8::7", 11, "cannot listen on [2001:db8::7]:9440: Cannot assign requested address"),
        (f"{UP} --host no.such.host.invalid", 11, "cannot listen on no.such.host.invalid:9440"),
        (f"{UP} --host localhost:9440", 2, "'localhost:9440' is neither a host name nor an address"),
        (f"{JOIN} --server localhost:9 --state file/state", 11, "the system refuses it: Not a directory"),
        (f"{JOIN} --server ::1:9", 2, "An address of IPv6 stands in brackets"),
        (f"{JOIN} --server lab..example:9", 2, "'lab..example' is neither a host name nor an address"),
        (f"{JOIN} --server localhost:9 --exchange ::1", 2, "An address of IPv6 stands in brackets"),
        (f"{JOIN} --server [::1]:9", 11, "[::1]:9: the coordinator cannot be reached"),
        ("server status --state file", 11, "file/lock: the system refuses it: Not a directory"),
        ("server stop --state file/state", 11, "file/state"),
        ("client status --state file/state", 11, "file/state"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(refused, line, code, said):
    assert said in refused(line, code)


def test_a_damaged_note_of_a_coordinator_is_a_sentence(refused, tmp_path):
    (tmp_path / "state").mkdir()
    for name in ("up.json", "run.json"):
        (tmp_path / "state" / name).write_text("[")
    with (tmp_path / "state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "up.json: the note about the coordinator is damaged" in refused("server status --state state", 11)
    with pytest.raises(DeployError, match=r"run\.json: the note of the run is damaged"):
        Office(tmp_path / "state").job()
