"""One data owner against plans written by hand: real model, real codecs, no server."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from tiny_house import ANCHORED, EXPERTS, FP32, HEAD, PRIVATE, SITE

from molehill.config import MethodRef
from molehill.errors import TrainingError
from molehill.wire.keys import Key
from molehill.wire.message import encode_tree
from molehill.wire.tree import Tree
from molehill_client.state import StateStore
from molehill_client.together import share, train_together


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
    batches = client.batches(client.train_rows, 5)
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
    assert not h.client(0).store.rounds()


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


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_state(house):
    h = house(train={"lr": 1e30, "clip": 1.0})
    with pytest.raises(TrainingError, match=r"client client-1, round 1: .*Lower train\.lr"):
        h.client(0).train(h.plan(0, steps=5))
    assert not h.folder.exists()


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


def test_embeddings_are_means_over_the_tokens_of_a_round(house):
    """With rates of almost 0 all batches are read by the same values."""
    molora = {"preset": "fedamole", "experts": 3, "rank": 2, "dropout": 0.0, "targets": ["query"], "layers": [0]}
    home = house(
        molora=molora,
        personal={"gate": "split"},
        federation={"preset": "fedamole"},
        train={"steps": 3, "lr": 1e-12, "router_lr": 1e-12, "head_lr": 1e-12},
    )
    own = ("*/gate.own.*", "personal")
    scopes = (("*/e1/*", "frozen"), *EXPERTS, own, ("*/gate*", "shared"), *HEAD)
    client, plan = home.client(0), home.plan(0, scopes=scopes)
    reply = client.train(plan)
    assert reply.embeddings.keys() == {SITE}
    told = reply.embeddings[SITE]
    assert told.keys() == {"-", "e0", "e2"}  # of the one that the plan does not let it train nothing is told
    model, stream = home.bench.model, client.batches(client.round_rows, plan.seed)
    tree, inputs = model.tree(), []
    site = model.sites[SITE]
    hook = site.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in islice(stream, 3):
        model(batch.input_ids, batch.attention_mask, batch.labels)
        inputs[-1] = inputs[-1][batch.attention_mask.bool()]
    hook.remove()
    mean = torch.cat(inputs).mean(0).detach().numpy()
    for expert, key in {"-": Key(SITE, "-", "gate.projection"), "e2": Key(SITE, "e2", "A")}.items():
        np.testing.assert_allclose(told[expert], tree[key] @ mean, atol=1e-5)
    plain = house("plain")
    assert plain.client(0).train(plain.plan(0)).embeddings == {}
