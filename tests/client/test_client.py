"""One data owner against plans written by hand: real model, real codecs, no server."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_house import ANCHORED, EXPERTS, FP32, HEAD

from molehill.config import MethodRef
from molehill.errors import AdapterError, MessageError, TrainingError
from molehill.wire.keys import Key
from molehill.wire.message import encode_tree
from molehill.wire.tree import Tree
from molehill_client.state import StateStore
from molehill_client.together import share, train_together

PRIVATE = {"noise": 4.0, "epsilon": 50.0, "delta": 1e-5}
SITE = "encoder.layer.0.attention.self.query"


def test_the_delta_is_trained_less_received_of_what_is_shared(one):
    plan = one.plan(0)
    client = one.client(0)
    reply = client.train(plan)
    delta = one.delta(reply)
    assert set(delta.tree) == {key for key in one.bench.initial if plan.scope(key) == "shared"}
    trained = one.bench.model.tree(delta.tree.layout)
    np.testing.assert_array_equal(delta.tree.flat, trained.flat - one.bench.initial.select(delta.tree.layout).flat)
    assert delta.tree.flat.any()
    assert (delta.run, delta.round, delta.client, delta.base) == ("tiny", 1, "client-1", plan.base)
    assert reply.examples == delta.examples == len(client.train_rows)
    assert reply.bytes_up == len(one.exchange.get(reply.delta))
    assert np.isfinite(reply.loss)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_client_clips_what_it_sends_and_not_what_it_learnt(house, codec):
    free = house("free")
    want = free.delta(free.client(0).train(free.plan(0))).tree.flat
    limit = float(np.linalg.norm(want)) / 3
    bound = house("bound", privacy={**PRIVATE, "clip": limit})
    plan = bound.plan(0, clip=limit, codec=MethodRef(name=codec))
    delta = bound.delta(bound.client(0).train(plan)).tree
    np.testing.assert_allclose(delta.flat, want / 3, atol=1e-6 if codec == "fp32" else 0.01 * np.abs(want).max())
    if codec == "fp32":
        assert np.linalg.norm(delta.flat.astype(np.float64)) <= limit
    trained = bound.bench.model.tree(delta.layout).flat - bound.bench.initial.select(delta.layout).flat
    np.testing.assert_array_equal(trained, want)
    loose = house("loose", privacy={**PRIVATE, "clip": 1e3})
    plan = loose.plan(0).model_copy(update={"clip": 1e3})
    np.testing.assert_array_equal(loose.delta(loose.client(0).train(plan)).tree.flat, want)


def test_tokens_of_the_delta_are_the_real_tokens_of_the_batches(one):
    client = one.client(0)
    delta = one.delta(client.train(one.plan(0)))
    batches = client.batches(5)
    real = sum(float(next(batches).attention_mask.sum()) for _ in range(2))
    for site in one.bench.model.sites:
        assert sum(mass for (at, _), mass in delta.tokens.items() if at == site) == pytest.approx(real, rel=1e-5)


@pytest.mark.parametrize(
    ("frozen", "scopes"),
    [("A", (("*/A", "frozen"), *ANCHORED)), ("gate", (*EXPERTS, *HEAD)), ("head", (*ANCHORED[:4],))],
)
def test_what_the_plan_freezes_keeps_its_values_and_is_not_sent(one, frozen, scopes):
    delta = one.delta(one.client(0).train(one.plan(0, scopes=scopes)))
    assert frozen not in {key.kind for key in delta.tree}
    kept = one.bench.initial.select(lambda key: key.kind == frozen)
    np.testing.assert_array_equal(one.bench.model.tree(kept.layout).flat, kept.flat)


def test_a_plan_that_trains_nothing_is_refused(one):
    with pytest.raises(TrainingError, match="client client-1, round 1: the plan trains no tensor"):
        one.client(0).train(one.plan(0, scopes=()))


def test_a_client_does_not_depend_on_who_used_the_model_before(house):
    alone, shared = house("alone"), house("shared")
    want = alone.delta(alone.client(1).train(alone.plan(1)))
    shared.client(0).train(shared.plan(0))
    shared.client(0).evaluate(shared.plan(0))
    reply = shared.client(1).train(shared.plan(1))
    np.testing.assert_array_equal(shared.delta(reply).tree.flat, want.tree.flat)
    mine, theirs = (h.client(1).store.before(2).tree for h in (shared, alone))
    np.testing.assert_array_equal(mine.flat, theirs.flat)


def test_what_a_client_could_do_alone_does_not_depend_on_any_federation(house):
    alone, federated = house("alone"), house("federated")
    want = alone.client(1).baseline(alone.plan(1, 0)).stages
    for number in (0, 1):
        federated.client(number).train(federated.plan(number))
    assert federated.client(1).baseline(federated.plan(1, 0)).stages == want
    assert set(want) == {"base", "local"}


def test_the_model_is_as_it_was_after_somebody_was_stopped_in_the_middle(house):
    calm, stopped = house("calm"), house("stopped")
    want = calm.delta(calm.client(1).train(calm.plan(1))).tree.flat

    def stop(step, steps):
        raise KeyboardInterrupt

    hurried = stopped.client(0)
    hurried.observe = stop
    with pytest.raises(KeyboardInterrupt):
        hurried.train(stopped.plan(0))
    stopped.bench.model.state.enabled = False
    stopped.bench.model.use_uniform_gate(uniform=True)
    np.testing.assert_array_equal(stopped.delta(stopped.client(1).train(stopped.plan(1))).tree.flat, want)


def test_personal_state_is_where_the_next_round_starts(house):
    one, scopes = house(personal={"gate": "personal"}), GATES["personal"]
    one.client(0).train(one.plan(0, scopes=scopes))
    before = one.client(0).store.before(2).tree
    assert before.flat.any()
    assert {key.kind for key in before} == {"gate"}
    one.client(0).train(one.plan(0, 2, seed=6, scopes=scopes))
    after = one.client(0).store.before(3).tree
    assert 0 < np.abs(after.flat - before.flat).max() < 0.05
    fresh = one.client(1)
    fresh.store = StateStore(one.folder / "new", "tiny", one.bench.base_digest)
    assert not fresh.store.before(2).tree


def test_a_repeated_round_starts_from_what_was_before_it(one):
    one.client(0).train(one.plan(0))
    first = one.delta(one.client(0).train(one.plan(0, 2)))
    again = one.delta(one.client(0).train(one.plan(0, 2)))
    np.testing.assert_array_equal(first.tree.flat, again.tree.flat)


def test_bytes_down_counts_what_the_client_did_not_have(one):
    frozen = one.bench.initial.select(lambda key: key.kind == "A")
    rest = one.bench.initial.select(lambda key: key.kind != "A")
    blobs = {"A": encode_tree(frozen, FP32), "rest": encode_tree(rest, FP32)}

    def train(round_, rest):
        names = {"A": one.exchange.put(blobs["A"]), "rest": one.exchange.put(rest)}
        return one.client(0).train(one.plan(0, round_, blobs=names)).bytes_down

    assert train(1, blobs["rest"]) == len(blobs["A"]) + len(blobs["rest"])
    assert train(2, blobs["rest"]) == 0
    moved = rest.copy()
    moved.flat += 1e-3
    assert train(3, encode_tree(moved, FP32)) == len(encode_tree(moved, FP32))


def test_a_low_rank_client_trains_and_sends_its_first_ranks_only(one):
    plan = one.plan(0, rank=1)
    tree = one.delta(one.client(0).train(plan)).tree
    assert tree[Key(SITE, "e0", "A")].shape == (1, 16)
    assert tree[Key(SITE, "e0", "B")].shape == (16, 1)
    whole = one.bench.model.tree(lambda key: key.kind in {"A", "B"})
    assert all(not (v[1:] if key.kind == "A" else v[:, 1:]).any() for key, v in whole.items())


def test_patches_of_all_rounds_add_up(one):
    rng = np.random.default_rng(0)
    arrays = [
        {
            Key(SITE, "e0", "patch.A"): rng.normal(size=(n, 16)).astype(np.float32),
            Key(SITE, "e0", "patch.B"): rng.normal(size=(16, n)).astype(np.float32),
        }
        for n in (1, 3)
    ]
    one.client(0).evaluate(one.plan(0, patches=[Tree.of(each) for each in arrays]))
    bank = one.bench.model.sites[SITE].bank
    mine = bank.patch_expert == 0
    product = bank.patch_Bt[mine].T @ bank.patch_A[mine]
    want = sum(each[Key(SITE, "e0", "patch.B")] @ each[Key(SITE, "e0", "patch.A")] for each in arrays)
    np.testing.assert_allclose(product.numpy(), want, rtol=1e-5, atol=1e-6)
    one.client(1).evaluate(one.plan(1))
    assert len(bank.patch_expert) == 0


def test_error_feedback_is_kept_and_sent_later(one):
    codec = MethodRef.model_validate({"name": "compeft", "density": 0.1})
    one.client(0).train(one.plan(0, codec=codec))
    memory = one.client(0).store.before(2).memory
    assert memory.flat.any()
    sent = one.delta(one.client(0).train(one.plan(0, 2, codec=codec))).tree
    assert memory.layout == sent.layout
    fresh = one.client(0)
    fresh.store = StateStore(one.folder / "fresh", "tiny", one.bench.base_digest)
    fresh.store.save(1, one.client(0).store.before(2))
    state = fresh.store.before(2)
    state.memory = Tree(state.memory.layout)
    fresh.store.save(1, state)
    assert not np.array_equal(one.delta(fresh.train(one.plan(0, 2, codec=codec))).tree.flat, sent.flat)


def test_what_is_sent_does_not_depend_on_residuals(house):
    """A client that has fitted its residuals sends the same bytes as one without any."""
    h, without = house("own"), house("without", personal={"gate": "global", "head": "global"})
    scopes = tuple((pattern, "frozen" if "residual" in pattern else scope) for pattern, scope in ANCHORED)
    for number in (1, 2):
        mine = h.client(0).train(h.plan(0, number))
        h.client(0).evaluate(h.plan(0, number))
        assert h.client(0).store.before(number + 1).tree.flat.any()
        theirs = without.client(0).train(without.plan(0, number, scopes=scopes))
        assert mine.delta == theirs.delta


def test_residuals_are_fitted_to_the_model_as_received(house):
    h = house(personal={"gate_lr": 0.05, "head_lr": 0.05})
    h.client(0).train(h.plan(0))
    state = h.client(0).store.before(2)
    assert not [key for key in state.tree if key.residual]
    first = h.client(0).evaluate(h.plan(0))
    kept = h.client(0).store.before(2)
    assert all(key.residual for key in kept.tree)
    assert kept.memory.layout == state.memory.layout
    assert h.client(0).evaluate(h.plan(0)).stages == first.stages  # whatever was fitted before
    np.testing.assert_array_equal(h.client(0).store.before(2).tree.flat, kept.tree.flat)
    h.client(0).train(h.plan(0, 2))
    assert not [key for key in h.client(0).store.before(3).tree if key.residual]


def test_residuals_that_diverge_name_their_own_learning_rates(house):
    h = house(personal={"gate_lr": 1e38, "head_lr": 1e38})
    with pytest.raises(TrainingError, match=r"Lower personal\.gate_lr and personal\.head_lr"):
        h.client(0).evaluate(h.plan(0))


def test_a_newcomer_fits_its_residuals_too(one):
    stages = one.client(1).evaluate(one.plan(1)).stages
    assert one.client(1).store.before(2).tree.flat.any()
    assert stages["personalised"].loss != stages["global"].loss


def test_without_personal_steps_nothing_is_fitted(house):
    h = house(personal={"steps": 0})
    stages = h.client(0).evaluate(h.plan(0)).stages
    assert stages["personalised"] == stages["global"]
    assert not h.folder.exists()


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


GATES = {
    "anchored": ANCHORED,
    "personal": (*EXPERTS, ("*/gate*", "personal"), *HEAD),
    "split": (*EXPERTS, ("*/gate.own.*", "personal"), ("*/gate*", "shared"), *HEAD),
    "own head": (*EXPERTS, ("*/gate*", "shared"), ("*/head*", "personal")),
}


def _sections(gate):
    if gate == "split":
        return {"personal": {"gate": "split"}, "molora": {"scorer": {"name": "mixture", "m": 2}}}
    return {"personal": {"gate": "global", "head": "personal"} if gate == "own head" else {"gate": gate}}


@pytest.mark.parametrize("gate", GATES)
def test_global_scores_use_no_personal_tensor_and_personalised_ones_do(house, gate):
    h = house(**_sections(gate))
    tree = h.bench.initial.copy()
    tree.flat[...] = np.random.default_rng(1).normal(size=tree.flat.shape) / 4  # experts that a gate can choose from
    values = {"scopes": GATES[gate], "tree": tree}
    h.client(0).train(h.plan(0, **values))
    before = h.client(0).evaluate(h.plan(0, **values)).stages
    assert (before["personalised"] != before["global"]) is (gate != "own head")
    state = h.client(0).store.before(2)
    state.tree.flat[...] = np.random.default_rng(0).normal(size=state.tree.flat.shape) * 3
    h.client(0).store.save(1, state)
    after = h.client(0).evaluate(h.plan(0, **values)).stages
    # Residuals are fitted anew.
    assert (after["personalised"] == before["personalised"]) is (gate == "anchored")
    # A head that nobody shares is the one thing there is to score with.
    assert (after["global"] == before["global"]) is (gate != "own head")


def test_a_head_that_the_policy_keeps_is_used_for_the_global_score(house):
    scopes = (("*/A", "shared"), ("*/B", "personal"), ("*/gate*", "shared"), ("*/head*", "personal"))
    h = house(personal={"gate": "global", "head": "global"}, train={"lr": 0.1})
    h.client(0).train(h.plan(0, scopes=scopes, steps=20))
    stages = h.client(0).evaluate(h.plan(0, scopes=scopes)).stages
    untrained = h.client(1).evaluate(h.plan(1, scopes=scopes)).stages
    assert stages["global"].loss != untrained["global"].loss
    assert stages["global"] != stages["personalised"]  # its B is personal, and no part of the global model


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


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_state(house):
    h = house(train={"lr": 1e30, "clip": 1.0})
    with pytest.raises(TrainingError, match=r"client client-1, round 1: .*Lower train\.lr"):
        h.client(0).train(h.plan(0, steps=5))
    assert not h.folder.exists()


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


def test_a_model_that_cannot_be_trained_is_told_apart_from_training_that_diverges(house):
    """The first step starts from what was received; a later one from what this client made of it."""
    good, bad = house(), house("ruined")
    ruined = bad.bench.initial.copy()
    ruined.flat[:] = 3e38
    reply = bad.client(0).train(bad.plan(0, tree=ruined))
    assert reply.unusable.startswith(("the loss is", "the gradient is not finite"))
    assert reply.unusable.endswith("at step 1: it learnt nothing from what it was sent")
    assert (reply.delta, reply.bytes_up, reply.loss) == ("", 0, None)
    assert bad.client(0).store.rounds() == []  # nothing of it is kept
    both = share(train_together, [bad.client(0), good.client(1)], [bad.plan(0, tree=ruined), good.plan(1)])
    assert [bool(reply.unusable) for reply in both] == [True, False]
    wild = house("wild", train={"lr": 1e38, "steps": 4, "clip": None})
    with pytest.raises(TrainingError, match=r"at step [234]\. Lower train\.lr"):
        wild.client(0).train(wild.plan(0, steps=4))
