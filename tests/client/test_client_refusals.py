"""What a client refuses: plans beyond its own configuration, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_house import EXPERTS, FP32, PRIVATE, SITE

from molehill.config import MethodRef
from molehill.errors import AdapterError, MessageError
from molehill.wire.keys import Key
from molehill.wire.message import encode_tree
from molehill.wire.tree import Tree

WHOLE_GATE = (*EXPERTS, ("*/gate.residual*", "personal"), ("*/gate*", "shared"))
WHOLE_HEAD = (*EXPERTS, ("*/head.residual*", "personal"), ("*/head*", "shared"))


@pytest.mark.parametrize(
    ("sections", "scopes", "why"),
    [
        ({"personal": {"gate": "personal"}}, WHOLE_GATE, r"/gate\..*, which personal\.gate does not share"),
        ({"personal": {"head": "personal"}}, WHOLE_HEAD, r"head/-/head\..*, which personal\.head does not share"),
        (
            {"personal": {"gate": "mixture"}, "molora": {"scorer": {"name": "mixture", "m": 2}}},
            WHOLE_GATE,
            r"/gate\.own\.main.*, which personal\.gate does not share",
        ),
        ({"federation": {"preset": "fedsa"}}, EXPERTS, r"/B, which federation\.policy does not share"),
        ({"federation": {"preset": "ffa"}}, EXPERTS, r"/A, which federation\.policy does not share"),
        ({"federation": {"policy": {"name": "fedpeft", "group": "head"}}}, WHOLE_GATE, r"federation\.policy does not"),
    ],
)
def test_what_a_clients_own_configuration_keeps_is_not_shared(house, sections, scopes, why):
    h = house(**sections)
    client = h.client(0)
    for ask in (client.train, client.evaluate, client.baseline):
        with pytest.raises(MessageError, match=why):
            ask(h.plan(0, scopes=scopes))
    assert client.store.rounds() == []


def test_a_policy_that_claims_the_gate_may_share_it(house):
    """As the server plans it: the policy counts for more than the personal section."""
    h = house(personal={"gate": "personal"}, federation={"policy": {"name": "fedpeft", "group": "gate"}})
    scopes = (("*/gate.residual*", "frozen"), ("*/gate*", "shared"))
    assert {key.kind for key in h.delta(h.client(0).train(h.plan(0, scopes=scopes))).tree} == {"gate"}


@pytest.mark.parametrize(("own", "given"), [(0.5, None), (0.5, 0.6), (None, 0.5)])
def test_another_clip_than_that_of_its_own_configuration_is_refused(house, own, given):
    h = house(privacy={} if own is None else {**PRIVATE, "clip": own})
    with pytest.raises(MessageError, match=rf"clipped to {given}, privacy\.clip is {own}"):
        h.client(0).train(h.plan(0, clip=given))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"codec": MethodRef(name="fp32")}, r"encoded as fp32, wire\.up is int8"),
        (
            {"codec": MethodRef.model_validate({"name": "int8", "block": 8})},
            r"encoded as int8 \(block = 8\), wire\.up is",
        ),
        ({"steps": 3}, r"plan has 3 steps, train\.steps is 2"),
        ({"round": 3}, r"plan is of round 3, run\.rounds is 2"),
        ({"run": "../../elsewhere"}, r"plan is of run '\.\./\.\./elsewhere', run\.name is 'tiny'"),
        ({"rank": None}, r"plan has rank without limit, federation\.policy gives 2 at most"),
    ],
)
def test_more_than_its_own_configuration_says_is_refused(house, more, why):
    h = house(
        wire={"up": "int8"},
        molora={"rank": 4},
        federation={"policy": {"name": "mixed_rank", "ranks": [1, 2]}},
    )
    client, fair = h.client(0), h.plan(0, rank=2)
    for ask in (client.train, client.evaluate, client.baseline):
        with pytest.raises(MessageError, match=why):
            ask(fair.model_copy(update=more))
    assert not h.folder.exists()
    assert client.train(fair.model_copy(update={"steps": 1, "rank": 1})).bytes_up  # less is always fine


@pytest.mark.parametrize(
    ("policy", "fair", "k", "why"),
    [
        ({"name": "mixed_k", "ks": [1, 2]}, 1, 3, r"3 experts per token, federation\.policy gives 2 at most"),
        ({"name": "mixed_k", "ks": [1, 2]}, 1, None, r"no number of experts per token, federation\.policy gives 2"),
        ("fedit", None, 1, r"1 experts per token, federation\.policy leaves that to the selector"),
    ],
)
def test_more_experts_than_the_policy_deals_are_refused(house, policy, fair, k, why):
    h = house(federation={"policy": policy})
    client, plan = h.client(0), h.plan(0, k=fair)
    with pytest.raises(MessageError, match=why):
        client.train(plan.model_copy(update={"k": k}))
    assert client.train(plan).bytes_up


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"client": "somebody"}, "plan is for client 'somebody'"),
        ({"base": "0" * 64}, "Use the same base model and revision"),
        ({"layout": "0" * 64}, "other tensors than this client builds"),
        ({"blobs": {"all": "0" * 64}}, "no blob"),
        ({"blobs": {"all": "../secret"}}, "no blob"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(one, values, message):
    for answer in (one.client(0).train, one.client(0).evaluate):
        with pytest.raises(MessageError, match=message):
            answer(one.plan(0, **values))
    if "blobs" not in values:
        with pytest.raises(MessageError, match=message):
            one.client(0).baseline(one.plan(0, **values))
    assert not one.folder.exists()


def test_a_blob_with_foreign_tensors_is_refused(one):
    foreign = Tree.of({Key("nowhere", "e0", "A"): np.zeros((2, 16), np.float32)})
    with pytest.raises(AdapterError, match="nowhere/e0/A does not exist in this model"):
        one.client(0).train(one.plan(0, tree=foreign))
    damaged = one.exchange.put(encode_tree(one.bench.initial, FP32)[:-9])
    with pytest.raises(MessageError):
        one.client(0).train(one.plan(0, blobs={"all": damaged}))


def test_a_server_cannot_make_a_client_decode_what_it_was_not_told_of(one, monkeypatch):
    """Blobs in another codec, or longer than the model, are refused before anything is made of them."""
    plan, asked = one.plan(0), []
    name = one.exchange.put(encode_tree(one.bench.initial, MethodRef(name="int4")))
    with pytest.raises(MessageError, match=f"the tree comes in codec 'int4', not {one.config.wire.down.name!r}"):
        one.client(0).train(plan.model_copy(update={"blobs": {"all": name}}))
    long = Tree.of({Key(SITE, "e0", "A"): np.zeros((8, one.bench.model.layout.size), np.float32)})
    name = one.exchange.put(encode_tree(long, FP32))
    get = one.exchange.get
    monkeypatch.setattr(one.exchange, "get", lambda name, most=None: asked.append(most) or get(name, most))
    with pytest.raises(MessageError, match=r"a blob of .* bytes, the limit is .*Its plan asks for no more"):
        one.client(0).train(plan.model_copy(update={"blobs": {"all": name}}))
    assert asked[0] < 4 * one.bench.model.layout.size + 2**16
