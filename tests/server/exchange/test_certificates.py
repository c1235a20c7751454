"""Who gets an answer of the exchange: certificates, tried over real connections."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest
from exchange_house import NOW, SECOND, put, refusal
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_pki import Authority, serial

from molehill.errors import ConfigError, FederationError, IdentityError, MessageError
from molehill.pki import Identity
from molehill.wire.remote import SERVICE, Patience
from molehill_protos.v1 import exchange_pb2 as pb


def test_nobody_gets_an_answer_without_a_certificate(serving):
    stub = serving.stub(key=False)
    for call, request in (
        (stub.Get, pb.GetRequest(digest="0" * 64)),
        (stub.Offset, pb.OffsetRequest()),
        (stub.Put, put(b"x")),
        (health_pb2_grpc.HealthStub(serving.channel).Check, health_pb2.HealthCheckRequest()),
    ):
        assert refusal(call, request)[0] == "UNAVAILABLE"
    with grpc.insecure_channel(f"127.0.0.1:{serving.port}") as plain:
        assert refusal(health_pb2_grpc.HealthStub(plain).Check, health_pb2.HealthCheckRequest())[0] == "UNAVAILABLE"


def test_health_answers_those_with_a_certificate(serving):
    serving.stub()
    check = health_pb2_grpc.HealthStub(serving.channel).Check
    for name in ("", SERVICE):
        assert check(health_pb2.HealthCheckRequest(service=name), timeout=20).status == 1


def test_a_node_of_another_authority_is_refused(serving, tmp_path):
    stranger = Authority(tmp_path, "other-ca").issue("lab-1")
    trusting = replace(Identity.load(stranger), authority=Identity.load(serving.identities["lab-1"]).authority)
    with pytest.raises(FederationError, match="knows this certificate's authority"):
        serving.node(identity=trusting, patience=SECOND).put(b"x", NOW)
    assert not serving.files("blobs")


def test_a_server_of_another_authority_is_refused_at_once(serving, tmp_path):
    mixed = Authority(tmp_path, "other-ca").issue("lab-1")
    with pytest.raises(ConfigError, match=r"server's certificate is not accepted.*ca\.pem"):
        serving.node(identity=mixed, patience=Patience(stalled=60)).put(b"x", NOW)


def test_a_revoked_certificate_is_refused_from_the_next_call_on(serving):
    node, other = serving.node(), serving.node("lab-2")
    serving.give("lab-2")
    node.put(b"x", NOW)
    (serving.folder / "revoked.json").write_text(json.dumps([serial(serving.identities["lab-1"])]))
    for call in (lambda: node.put(b"x", NOW), lambda: node.get("0" * 64), lambda: node.has("0" * 64)):
        with pytest.raises(MessageError, match=r"this certificate was revoked.*new certificate"):
            call()
    other.put(b"y", NOW)


def test_health_is_not_told_to_a_revoked_certificate(serving):
    serving.stub()
    stub, request = health_pb2_grpc.HealthStub(serving.channel), health_pb2.HealthCheckRequest()
    assert stub.Check(request, timeout=20).status == next(stub.Watch(request, timeout=20)).status == 1
    (serving.folder / "revoked.json").write_text(json.dumps([serial(serving.identities["lab-1"])]))
    assert refusal(stub.Check, request) == ("UNAUTHENTICATED", "this certificate was revoked.")
    with pytest.raises(grpc.RpcError, match="this certificate was revoked"):
        next(stub.Watch(request, timeout=20))


def test_a_damaged_list_of_revoked_certificates_lets_nobody_in(serving):
    (serving.folder / "revoked.json").write_text("[")
    with pytest.raises(FederationError, match="list of revoked certificates is damaged"):
        serving.node(patience=SECOND).put(b"x", NOW)


@pytest.mark.parametrize("names", [("../lab-1",), ("lab 1",), ("lab-1", "lab-2")])
def test_a_common_name_that_cannot_be_a_node_is_refused(serving, authority, names):
    identity = authority.issue(names[0], extra_names=names[1:])
    with pytest.raises(MessageError, match="the common name of this certificate"):
        serving.node(identity=identity).put(b"x", NOW)


def test_a_certificate_that_expired_is_found_on_the_node(serving, authority):
    identity = authority.issue("late", until=-timedelta(hours=1))
    with pytest.raises(IdentityError, match=r"it expired at .* clock of this machine says .* Set the clock"):
        Identity.load(identity)


@pytest.mark.parametrize("damage", ["missing", "garbled", "pair"])
@pytest.mark.parametrize("file", ["key.pem", "cert.pem"])
def test_an_identity_that_cannot_be_used_says_which_file(authority, file, damage):
    identity, other = authority.issue(f"{file}-{damage}"), authority.issue("other")
    if damage == "missing":
        (identity / file).unlink()
    elif damage == "garbled":
        (identity / file).write_text("nothing")
    else:
        (identity / file).write_bytes((other / file).read_bytes())
    with pytest.raises(
        IdentityError, match="do not belong together|not signed by" if damage == "pair" else "there is no|not a "
    ):
        Identity.load(identity)
