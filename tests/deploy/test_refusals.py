"""Who does not belong is let in nowhere, and is told why."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fleet import Member
from flwr.proto import fleet_pb2, node_pb2
from lab import flags, free_ports, left_over, open_lab

from molehill import pki

pytestmark = pytest.mark.slow

DENIED = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/push-messages",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet//v1/control/list-runs",
    "/v1/fleet/register-node/../../control/list-runs",
    "/v1/fleet/x?y=/v1/control/list-runs",
    "/v1/FLEET/x",
    "/docs",
    "/openapi.json",
    "/",
]


def listening(pids: list[int]) -> set[str]:
    """Addresses on which any of these processes listens for TCP."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            except OSError:
                continue
            if found:
                inodes.add(found[1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                mapped = host.startswith("0000000000000000FFFF0000")  # an IPv4 address in a socket of IPv6
                name = ".".join(str(b) for b in bytes.fromhex(host[-8:])[::-1]) if len(host) == 8 or mapped else host
                addresses.add(f"{name}:{int(port, 16)}")
    return addresses


def through_the_door(lab, identity, method, path):
    """What the door answers to one request of the owner of an identity."""
    request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    tls = pki.Identity.load(identity).tls()
    raw = socket.create_connection(("127.0.0.1", lab.port), 10)
    with tls.wrap_socket(raw, server_hostname="127.0.0.1") as line:
        line.sendall(request.encode())
        return int(line.recv(100).split()[1])


def test_only_two_ports_can_be_reached_from_another_host(lab):
    """The coordinator listens on 127.0.0.1 in this test; whatever else its processes open must be loopback always."""
    commands = [
        (Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")) for pid in left_over(lab.state.resolve())
    ]
    assert any("flower-superlink" in command for command in commands)
    opened = listening([lab.processes["coordinator"].pid, *left_over(lab.state.resolve())])
    assert {f"127.0.0.1:{lab.port}", f"127.0.0.1:{lab.exchange_port}"} <= opened
    assert all(address.startswith("127.0.0.1:") for address in opened)


def test_what_another_host_reaches_is_the_node_api_and_nothing_else(config, tmp_path):
    """Bound to another address of this machine, the door and the exchange answer there, and Flower does not."""
    with open_lab(tmp_path, config(), ()) as lab:
        lab.up(host="127.0.0.2")
        opened = listening([lab.processes["coordinator"].pid, *left_over(lab.state.resolve())])
        outside = {address for address in opened if not address.startswith("127.0.0.1:")}
        assert outside == {f"127.0.0.2:{lab.port}", f"127.0.0.2:{lab.exchange_port}"}
        superlink = json.loads((lab.state / "up.json").read_text())["superlink"]
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", superlink), 5)
        words = {"identity": tmp_path / "identities/coordinator", "host": "127.0.0.2"}
        words |= {"port": lab.port, "exchange-port": lab.exchange_port}
        again = lab.ask("server", "up", *flags(words | {"state": tmp_path / "other"}))
        assert again.returncode == 11
        assert f"cannot listen on 127.0.0.2:{lab.port}: Address already in use. Choose another" in again.stderr
        none = lab.ask("server", "up", *flags(words | {"state": tmp_path / "other", "revoked": tmp_path / "none.json"}))
        assert (none.returncode, "there is no list of revoked certificates" in none.stderr) == (10, True)
        twice = lab.ask("server", "up", *flags(words | {"state": lab.state}))
        assert twice.returncode == 11
        assert "another coordinator uses this folder. Stop it first" in twice.stderr


@pytest.mark.parametrize("path", DENIED)
def test_the_other_apis_do_not_exist_behind_the_door(lab, path):
    assert through_the_door(lab, lab.folder / "identities/client-1", "POST", path) == 404


def test_the_node_api_is_there_and_asks_for_a_signature(lab):
    identity = lab.folder / "identities/client-1"
    assert through_the_door(lab, identity, "POST", "/v1/fleet/activate-node") in {400, 401, 415, 422}
    assert through_the_door(lab, identity, "GET", "/v1/fleet/activate-node") == 404


def read_something(context, address):
    """In TLS 1.3 a server refuses who showed no certificate only when that one reads."""
    with socket.create_connection(address, 5) as raw:
        raw.settimeout(10)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
            tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
            if not tls.recv(100):
                raise ConnectionError("closed")


@pytest.mark.parametrize("port", ["port", "exchange_port"])
def test_no_port_answers_without_a_certificate(lab, port):
    address = ("127.0.0.1", getattr(lab, port))
    with socket.create_connection(address, 5) as plain:
        plain.settimeout(5)
        plain.sendall(b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            answer = plain.recv(100)
        except ConnectionError:
            answer = b""
        assert b"HTTP" not in answer
    nobody = ssl.create_default_context(cafile=str(lab.folder / "identities/client-1/ca.pem"))
    nobody.set_alpn_protocols(["h2"])
    with pytest.raises((ssl.SSLError, ConnectionError)):
        read_something(nobody, address)


def refused(lab, name="client-1", code=11, **options):
    """How a machine ends that is not let in."""
    process = lab.join(name, wait=False, **options)
    assert process.wait(60) == code, lab.story()
    return lab.said(name).split("error: ")[-1]


def test_a_stranger_is_refused(lab, tmp_path):
    other = pki.Authority.create(tmp_path / "ca")
    folder = tmp_path / "client-1"
    _, bundle = other.sign(pki.request(folder, "client-1"))
    pki.install(bundle, folder)
    assert "the coordinator cannot be reached: its certificate is not good" in refused(lab, identity=folder)
    shutil.copy(lab.folder / "identities/client-1/ca.pem", folder / "ca.pem")
    assert "it was not signed by 'molehill'" in refused(lab, code=10, identity=folder)


def test_a_machine_is_told_what_is_wrong_with_its_own_things(lab, tmp_path):
    early = datetime.now(UTC) - timedelta(days=40)
    past = tmp_path / "past"
    old = pki.Authority.create(tmp_path / "old", now=early)
    _, bundle = old.sign(pki.request(past, "client-3"), days=30, now=early)
    pki.install(bundle, past, now=early)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good", "label": "positive"}\n')

    def join(code, **options):
        words = {"server": f"127.0.0.1:{lab.port}", "identity": lab.folder / "identities/client-1", "data": rows}
        said = lab.ask("client", "join", *flags(words | {"state": tmp_path / "node"} | options))
        assert said.returncode == code, said.stderr
        assert "Traceback" not in said.stderr
        return said.stderr

    assert "certificate of client-3: it expired at" in join(10, identity=past)
    assert "the certificate is client-1's, not client-2's. Leave --name out" in join(10, name="client-2")
    assert "there is no identity here. Run: molehill pki request" in join(10, identity=tmp_path)
    assert "none.csv: there is no such file" in join(3, data=tmp_path / "none.csv")
    assert "the rows to hold out are those to train on" in join(3, test=rows)
    assert "'lab' is no address. Give HOST:PORT" in join(2, server="lab")
    nobody = free_ports(1)[0]
    assert f"127.0.0.1:{nobody}: the coordinator cannot be reached" in join(11, server=f"127.0.0.1:{nobody}")
    assert not (tmp_path / "node" / "joined.json").exists()


def test_a_revoked_machine_is_put_out_and_stays_out(lab):
    lab.identify("gone")
    process = lab.join("gone", data=lab.folder / "client-1.train.jsonl", test=lab.folder / "client-1.test.jsonl")
    revoke(lab, "gone")
    assert process.wait(90) == 11, lab.story()
    assert "the coordinator refuses this machine. Its certificate may be revoked" in lab.said("gone")
    assert "this certificate was revoked" in lab.said("coordinator")
    again = lab.join(
        "gone", wait=False, data=lab.folder / "client-1.train.jsonl", test=lab.folder / "client-1.test.jsonl"
    )
    assert again.wait(60) == 11


def status_of(lab):
    """What `server status` says of every machine, by name; one that is there twice has two words."""
    said = lab.ask("server", "status", "--state", lab.state, "--json")
    found = defaultdict(list)
    for node in json.loads(said.stdout)["nodes"]:
        found[node["name"]].append(node["status"])
    return found


def revoke(lab, name):
    lab.authority.revoke(name)
    publish(lab)


def publish(lab):
    shutil.copy(lab.folder / "ca" / "revoked.json", lab.folder / "identities" / "coordinator" / "revoked.json")


def test_a_revoked_machine_is_struck_off_and_an_accomplice_does_not_help(lab):
    """Its key is Flower's no more, nor is it taken through the connection of one that is let in."""
    spare, accomplice = lab.identify("spare"), lab.identify("accomplice")
    with Member(spare, lab.port) as own, Member(spare, lab.port, tls=accomplice) as borrowed:
        assert borrowed.activate() == 401
        assert own.activate() == 200
        assert status_of(lab)["spare"] == ["online"]
        revoke(lab, "spare")
        lab.until(lambda: "spare" not in status_of(lab), seconds=15)
        node = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=own.number))
        assert own.post("pull-messages", node).status_code in {403, 444}
        assert borrowed.activate() == 401
        assert borrowed.post("pull-messages", node).status_code == 401
    assert "spare" not in status_of(lab)
    struck = [entry["fields"]["client"] for entry in audit(lab) if entry["event"] == "struck"]
    assert struck.count("CN=spare") == 1


def audit(lab):
    return [json.loads(line) for line in (lab.state / "audit.jsonl").read_text().splitlines()]


def test_a_machine_whose_certificate_was_renewed_is_shown_once(lab):
    before = lab.identify("renewed")
    with Member(before, lab.port) as member:
        assert member.activate() == 200
    after = lab.identify("renewed", folder="again", replace_living=True)
    publish(lab)
    with Member(after, lab.port) as member:
        assert member.activate() == 200
        assert status_of(lab)["renewed"] == ["online"]


def test_flower_does_not_store_what_a_member_heaps_up(lab):
    """Replies with many objects, large ones and many bytes are refused at the door; the database stays as it is."""
    hoarder = lab.identify("hoarder")
    database = lab.state / "flower.db"
    before = database.stat().st_size
    with Member(hoarder, lab.port) as member:
        assert member.activate() == 200
        assert member.push(objects=30).status_code == 413
        assert member.push_object(bytes(10 * 2**20)).status_code in {413, 444}
        content = bytes(2**22 - 1000)
        assert 429 in [member.push_object(content + bytes([number])).status_code for number in range(6)]
    assert database.stat().st_size < before + 2**20


def test_rows_and_models_that_cannot_be_used_are_told_on_both_sides(config, tmp_path):
    """The machine says what is wrong with its rows; the coordinator hears that something is, and no word of them."""
    with open_lab(tmp_path, config(round={"deadline": 40.0}), ("client-1", "client-2")) as lab:
        lab.up()
        (lab.folder / "bad.jsonl").write_text('{"text": "good", "label": "my secret diagnosis"}\n')
        lab.join("client-1", data=lab.folder / "bad.jsonl")
        lab.join("client-2", base=lab.folder / "nowhere")
        run = lab.run("--set", "data.clients=2")
        assert run.wait(240) == 9, lab.story()
        heard = lab.said("run") + (lab.out / "metrics.jsonl").read_text() + (lab.out / "audit.jsonl").read_text()
        assert "client-1: its rows cannot be used. There, `molehill client status` says why" in lab.said("run")
        assert "secret" not in heard
        assert "client-2: its base model cannot be used" in lab.said("run")
        assert "nowhere" not in heard  # paths stay at home too
        lab.until(lambda: "nowhere" in lab.said("client-2"))
        lab.until(lambda: "bad.jsonl:1" in lab.said("client-1"))
        assert "my secret diagnosis" in lab.said("client-1")
        status = lab.ask("client", "status", "--state", lab.folder / "client-1.state", "--json")
        assert "bad.jsonl:1" in json.loads(status.stdout)["error"]
        assert "Traceback" not in lab.said("run") + lab.said("client-1") + lab.said("client-2")


def test_commands_without_a_coordinator_or_a_machine_say_so(lab, tmp_path):
    for words in (("server", "status"), ("server", "stop"), ("server", "run", lab.file)):
        said = lab.ask(*words, "--state", tmp_path / "none")
        assert (said.returncode, "no coordinator is up. Start it: molehill server up" in said.stderr) == (11, True)
    for words in (("client", "status"), ("client", "evaluate")):
        said = lab.ask(*words, "--state", tmp_path / "none")
        assert (said.returncode, "this machine takes part in nothing" in said.stderr) == (11, True)
    said = lab.ask("client", "forget", "--state", tmp_path / "none")
    assert (said.returncode, "there was nothing to forget" in said.stderr) == (0, True)
