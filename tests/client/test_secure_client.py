"""The real client under secure aggregation: what it sends, keeps and refuses."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_pki import Authority

from molehill.errors import IdentityError, MessageError, ResumeError, TrainingError
from molehill.pki import Identity, Signer
from molehill.secure import messages
from molehill.secure.fixed import FixedPoint
from molehill.secure.masks import add_mask
from molehill.secure.vector import Form
from molehill.wire.message import decode_masked
from molehill.wire.tree import Tree
from molehill_client.client import Client
from molehill_client.state import StateStore
from molehill_client.together import share, train_together

SECURE = {"privacy": {"secure_aggregation": True}, "wire": {"up": "fp32"}}


@pytest.fixture
def secret(house):
    return house(**SECURE)


def exchange_keys(clients, round_=1, attempt=0):
    """The company of every client, after keys and shares went round."""

    def to(client, **values):
        return {"run": "tiny", "round": round_, "attempt": attempt, "client": client.name, **values}

    adverts = tuple(client.masker.keys(messages.AskKeys(**to(client))) for client in clients)
    said = {c.name: c.masker.shares(messages.AskShares(**to(c, adverts=adverts))).sealed for c in clients}
    cap = max(len(client.train_rows) for client in clients)
    return {
        name: messages.Company(attempt=attempt, cap=cap, inbox={o: said[o][name] for o in said if o != name})
        for name in said
    }


def masked(house, reply, form):
    return decode_masked(house.exchange.get(reply.delta), 2**24, form.size).numbers


def test_the_sum_of_what_clients_send_is_that_of_their_deltas(secret, house):
    clients = [secret.client(number) for number in range(3)]
    companies = exchange_keys(clients)
    plans = [secret.plan(number, company=companies[c.name]) for number, c in enumerate(clients)]
    replies = [client.train(plan) for client, plan in zip(clients, plans, strict=True)]
    plain = house("plain")
    deltas = [plain.delta(plain.client(number).train(plain.plan(number))) for number in range(3)]
    form = Form(deltas[0].tree.layout, 1)
    numbers = [masked(secret, reply, form) for reply in replies]
    total = sum(numbers)
    for client in clients:  # the server would have the seeds from the shares
        memory = client.masker._load()
        assert memory.stage == "masked"
        add_mask(total, bytes.fromhex(memory.seed), subtract=True)
    cap = max(len(client.train_rows) for client in clients)
    point = FixedPoint.of(secret.config, 3, cap)
    expected = sum(form.fill(d.tree, d.examples, d.tokens, [0.0]) for d in deltas)
    np.testing.assert_allclose(point.decode(total)[:-1], expected[:-1], atol=1e-5)
    for delta, vector in zip(deltas, numbers, strict=True):
        values = vector.view(np.int64)[: form.layout.size].astype(np.float64)
        assert abs(np.corrcoef(values, delta.tree.flat)[0, 1]) < 5 / np.sqrt(form.layout.size)


def test_a_reply_tells_no_loss_and_an_evaluation_no_tokens(secret):
    clients = [secret.client(number) for number in range(3)]
    company = exchange_keys(clients)[clients[0].name]
    reply = clients[0].train(secret.plan(0, company=company))
    assert reply.loss is None
    assert reply.metrics == {}
    assert clients[0].evaluate(secret.plan(0)).tokens == {}


def test_clients_of_one_process_train_together(secret):
    clients = [secret.client(number) for number in range(3)]
    companies = exchange_keys(clients)
    plans = [secret.plan(number, company=companies[c.name]) for number, c in enumerate(clients)]
    replies = share(train_together, clients, plans)
    assert [reply.client for reply in replies] == [client.name for client in clients]


def test_a_plan_in_the_open_is_refused_before_anything_is_trained(secret):
    client = secret.client(0)
    exchange_keys([secret.client(number) for number in range(3)])
    with pytest.raises(MessageError, match="asks for a delta in the open"):
        client.train(secret.plan(0))
    assert client.store.rounds() == []


def test_a_client_that_was_restarted_goes_on(secret):
    clients = [secret.client(number) for number in range(3)]
    companies = exchange_keys(clients)
    again = secret.client(0)
    reply = again.train(secret.plan(0, company=companies[clients[0].name]))
    assert reply.bytes_up > 0
    with pytest.raises(MessageError, match="are 'masked'"):
        secret.client(0).train(secret.plan(0, company=companies[clients[0].name]))


def test_secrets_lie_encrypted(secret):
    client = secret.client(0)
    exchange_keys([client, *(secret.client(number) for number in (1, 2))])
    path = client.store.folder / "masking.sealed"
    memory = client.masker._load()
    data = path.read_bytes()
    for text in (memory.seed, memory.masks_key, memory.shares_key):
        assert text.encode() not in data
        assert bytes.fromhex(text) not in data
    assert path.stat().st_mode & 0o077 == 0
    other = StateStore(secret.folder / "client-2", "tiny", secret.bench.base_digest)
    (other.folder / "masking.sealed").write_bytes(data)
    with pytest.raises(ResumeError, match="belongs to another client"):
        other.load_secret()
    assert client.store.rounds() == []


def test_a_change_beyond_the_bound_is_not_sent(house):
    wild = house(**SECURE, round={"norm_bound": 1e-6})
    clients = [wild.client(number) for number in range(3)]
    company = exchange_keys(clients)[clients[0].name]
    with pytest.raises(TrainingError, match=r"its change has norm .*, above the bound of 1e-06"):
        clients[0].train(wild.plan(0, company=company))


def test_clipping_comes_before_the_mask(house):
    private = {"secure_aggregation": True, "clip": 0.01, "noise": 4.0, "epsilon": 50.0, "delta": 1e-5}
    secret = house(**{**SECURE, "privacy": private})
    clients = [secret.client(number) for number in range(3)]
    companies = {name: c.model_copy(update={"cap": 1}) for name, c in exchange_keys(clients).items()}
    put = {}

    class Watched(Form):
        def fill(self, change, weight, tokens, figures):
            put["change"], put["tokens"] = change, tokens
            return super().fill(change, weight, tokens, figures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("molehill_client.participant.Form", Watched)
        clients[0].train(secret.plan(0, company=companies[clients[0].name], clip=0.01))
    assert np.linalg.norm(put["change"].flat) <= 0.01
    assert isinstance(put["change"], Tree)
    assert put["tokens"] is None


@pytest.fixture
def signed(secret):
    def make(number, authority, *, server=False):
        plain = secret.client(number)
        identity = Identity.load(authority.issue(plain.name, server=server))
        return Client(secret.bench, plain.name, plain.train_rows, plain.test_rows, plain.store, signer=Signer(identity))

    return make


def test_a_server_cannot_join_with_its_own_identity(signed, tmp_path):
    """Its masks it could take off by itself, so the others would hide behind one fewer."""
    ours = Authority(tmp_path)
    with pytest.raises(IdentityError, match="certificate of a server, which is no owner's machine"):
        exchange_keys([signed(0, ours), signed(1, ours), signed(2, ours, server=True)])


def test_keys_signed_by_another_authority_are_refused(secret, signed, tmp_path):
    ours, theirs = Authority(tmp_path), Authority(tmp_path, "theirs")
    exchange_keys([signed(number, ours) for number in range(3)])
    with pytest.raises(IdentityError, match="not signed by"):
        exchange_keys([signed(0, ours), signed(1, ours), signed(2, theirs)])
    with pytest.raises(IdentityError, match="there is no signature"):
        exchange_keys([signed(0, ours), signed(1, ours), secret.client(2)])
