"""Owners cluster their rows, tell the centres where a plan and the configuration say so, and keep them."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_house import ANCHORED, EXPERTS, HEAD

from molehill.errors import ConsentError, MessageError, TrainingError
from molehill.kmeans import nearest
from molehill.wire.keys import OWN_PLACES, PLACES
from molehill_client.consent import Consent, require_consent
from molehill_client.policy import read
from molehill_server.planning.assigning import Leaning
from molehill_server.planning.planner import Planner

SCOPES = (("*/gate.places", "frozen"), ("*/gate.own.*", "personal"), *EXPERTS, *HEAD)
APART = {"scopes": (("*/e2/*", "frozen"), *SCOPES), "blobs": {}, "apart": True, "lean": {"e0": 2.0, "e1": 2.0}}


@pytest.fixture
def home(house):
    return house(
        molora={"preset": "fedrouter", "experts": 3, "rank": 2, "dropout": 0.0, "layers": [0]},
        personal={"gate": "split", "head": "global"},
        federation={"preset": "fedrouter"},
        train={"weight_decay": 0.5},
    )


def key_of(home, role):
    (key,) = [key for key in home.bench.initial if key.role == role]
    return key


def batch_of(home, rows):
    return home.bench.task.collate(list(rows))


def states_of(home, batch):
    return home.bench.model.states_of(batch.input_ids, batch.attention_mask, batch.labels).double().numpy()


def test_centres_are_found_once_told_while_apart_and_kept(home):
    client, mine = home.client(0), key_of(home, OWN_PLACES)
    reply = client.train(home.plan(0, **APART))
    assert reply.places.keys() == {mine.site}
    told, states = np.array(reply.places[mine.site]), states_of(home, batch_of(home, client.round_rows))
    labels = nearest(states, told)
    for number, centre in enumerate(told):
        np.testing.assert_allclose(centre, states[labels == number].mean(0), atol=1e-5)
    kept = client.store.before(2).tree[mine]
    np.testing.assert_array_equal(kept[:2], told.astype(np.float32))  # no decay of weights moved them
    assert not kept[2].any()
    sent = home.delta(reply).tree
    assert {key.kind for key in sent} == {"A", "B", "head"}
    assert {key.expert for key in sent} == {"e0", "e1", "-"}
    scopes, lean = (("*/e0/*", "frozen"), ("*/e1/*", "frozen"), *SCOPES), {"e0": 0.0, "e1": 0.0, "e2": 2.0}
    again = client.train(home.plan(0, 2, scopes=scopes, lean=lean))
    assert again.places == {}
    np.testing.assert_array_equal(client.store.before(3).tree[mine], kept)


def test_whose_first_reply_was_lost_has_all_experts_in_the_end(home):
    client, lean = home.client(0), key_of(home, "gate.own.lean")
    client.train(home.plan(0, **APART))
    assert client.store.before(2).tree[lean].tolist() == [2, 2, 0]
    written = Planner(home.config, home.bench.base_digest).plan(
        client.name, 1, home.bench.initial.layout, {}, 0, leaning=Leaning()
    )
    client.begin(home.plan(0, lean=written.lean, scopes=written.scopes), after=True)
    assert home.bench.model.tree(lambda key: key == lean)[lean].tolist() == [0, 0, 0]


def test_a_base_that_makes_nothing_finite_of_a_row_is_said(home):
    client, table = home.client(0), home.bench.model.base.get_input_embeddings().weight
    used, before = client.round_rows[0].input_ids[1], table.detach().clone()
    try:
        table.data[used] = float("inf")
        with pytest.raises(TrainingError, match=r"numbers that are not finite of \d+ of \d+ rows") as error:
            client.train(home.plan(0, **APART))
        assert (client.name in error.value.where, "base.precision" in error.value.mend) == (True, True)
    finally:
        table.data.copy_(before)


def test_centres_leave_in_no_other_way(home, house):
    layout, personal = home.bench.model.layout, home.config.personal
    for gate in ("split", "anchored"):
        config = home.config.model_copy(update={"personal": personal.model_copy(update={"gate": gate})})
        for role in (PLACES, OWN_PLACES):
            plan = home.plan(0, scopes=((f"*/{role}", "shared"), *SCOPES))
            with pytest.raises(MessageError, match=r"which molora\.scorer does not share"):
                require_consent(plan, config, layout, "c")
    plain = house("plain", molora={"scorer": "leaning"})
    plan = plain.plan(0, scopes=(("*/gate.own.*", "shared"), *ANCHORED))
    with pytest.raises(MessageError, match=r"gate\.own\.lean, which personal\.gate does not share"):
        require_consent(plan, plain.config, plain.bench.model.layout, "c")
    told = plain.client(0).train(plain.plan(0, scopes=SCOPES, apart=True, blobs={}))
    assert told.places == {}  # its own configuration has no assignment that goes by them


def test_an_owner_has_to_allow_it(home, tmp_path):
    path = tmp_path / "policy.toml"
    text = '[protection]\nneeds = "nothing"\n[base]\nmodels = ["*"]\n[share]\ntell = ["rows", "time", "loss", "tokens"'
    path.write_text(f"{text}]\n", encoding="utf-8")
    with pytest.raises(ConsentError, match=r"it is told places \(the centres of a few clusters of the rows"):
        Consent(read(path)).require_run(home.config, own_base=True)
    path.write_text(f'{text}, "places"]\n', encoding="utf-8")
    Consent(read(path)).require_run(home.config, own_base=True)


def test_a_row_teaches_the_expert_of_its_cluster_alone(home):
    client, model = home.client(0), home.bench.model
    client.train(home.plan(0, **APART))
    state = client.store.before(2).tree
    model.load(home.bench.initial)
    model.load(state)
    batch = batch_of(home, client.round_rows)
    cluster = nearest(states_of(home, batch), state[key_of(home, OWN_PLACES)][:2].astype(np.float64))
    model.train()
    model.base.eval()
    for row in (int(np.flatnonzero(cluster == number)[0]) for number in (0, 1)):
        model.grads.zero_()
        model(batch.input_ids, batch.attention_mask, batch.labels).nll()[row].backward()
        learns = {key.expert for key, slot in model.slots.items() if model.grad[slot.start : slot.stop].any()}
        assert learns == {f"e{cluster[row]}", "-"}  # and the head
