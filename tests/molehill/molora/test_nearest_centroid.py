"""A row goes to the expert of the nearest centroid, by what the base alone makes of its prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import adapted, base, batch, shake, training
from transformers import DynamicCache

from molehill import registry
from molehill.decoding.stream import Asked, Reader
from molehill.errors import AnswerError, ModelError
from molehill.kmeans import kmeans, nearest
from molehill.molora.decode import TorchPasses, write
from molehill.molora.interfaces import Settles

EYE = torch.eye(3)


def scorer(lean=(0.0, 0.0, 0.0), places=None, mine=None):
    found = registry.build("scorer", "nearest_centroid", d_in=8, n_experts=3, width=3)
    with torch.no_grad():
        found.lean.copy_(torch.tensor(lean))
        found.places.copy_(torch.zeros(3, 3) if places is None else places)
        found.mine.copy_(torch.zeros(3, 3) if mine is None else mine)
    return found


def chosen(z):
    assert z.shape[1:] == (1, 3)
    return z[:, 0].argmax(-1).tolist()


def test_two_rows_of_one_owner_go_to_the_experts_nearest_to_each(context):
    rows = context(base=0.9 * EYE[[1, 0, 2]])
    z = scorer((2.0, 2.0, 0.0), EYE)(rows)
    assert chosen(z) == [1, 0, 0]  # the third's own is closed to this owner; both open ones are as far
    torch.testing.assert_close(z[0, 0, :2], -((rows.base[0] - EYE) ** 2).sum(1)[:2])
    assert chosen(scorer((2.0, 2.0, 1.0), EYE)(rows)) == [1, 0, 2]
    assert chosen(scorer(places=EYE)(rows)) == [1, 0, 2]  # to the shared model nothing is closed
    assert chosen(scorer((0.0, 2.0, 0.0), 1e30 * EYE)(rows)) == [1, 1, 1]  # however far it is
    assert chosen(scorer(places=EYE * torch.tensor([[1.0], [1.0], [0.0]]))(rows))[2] != 2  # who has no centroid is none


def test_in_training_a_row_goes_by_the_cluster_that_it_is_in(context):
    mine = torch.stack([EYE[0] * 4, EYE[1] * 4, torch.zeros(3)])
    row = context(base=torch.tensor([[2.1, 0.0, 1.9]]), training=True)
    assert chosen(scorer((2.0, 2.0, 0.0), mine=mine)(row)) == [0]  # before there are centroids, to that of its place
    places = torch.stack([EYE[2] * 2, EYE[1] * 4, EYE[0] * 4.2])
    member = scorer((2.0, 2.0, 2.0), places, mine)
    assert chosen(member(row)) == [2]  # the expert of its cluster's centre
    row.training = False
    assert chosen(member(row)) == [0]  # its own nearest


def test_settling_finds_planted_clusters_for_the_experts_that_are_ones_own():
    found, rng = scorer((0.0, 2.0, 2.0)), torch.Generator().manual_seed(0)
    assert isinstance(found, Settles)
    assert found.unsettled
    rows = torch.cat([EYE[0].expand(7, 3), 5 + EYE[1].expand(4, 3)]) + 0.01 * torch.randn(11, 3, generator=rng)
    found.settle(rows, 0)
    assert not found.unsettled
    assert not found.mine[0].any()
    torch.testing.assert_close(found.settled(), torch.stack([rows[:7].mean(0), rows[7:].mean(0)]))
    found.settle(rows[:1].expand(5, 3), 0)  # there is but one point
    torch.testing.assert_close(found.mine, torch.stack([torch.zeros(3), rows[0], torch.zeros(3)]))
    assert not scorer().unsettled  # nobody said what is its own
    found.settle(1e25 * rows, 0)  # whose squares float32 does not have
    torch.testing.assert_close(found.settled(), 1e25 * torch.stack([rows[:7].mean(0), rows[7:].mean(0)]))


def test_kmeans_finds_the_least_sum_of_squares_and_says_the_same_again():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(at, 0.1, (6, 2)) for at in (0, 5, 9)])[rng.permutation(18)]
    centres = kmeans(points, 3, 1)
    labels = nearest(points, centres)
    assert sorted(np.bincount(labels).tolist()) == [6, 6, 6]
    assert labels[0] == 0
    for number, centre in enumerate(centres):
        np.testing.assert_allclose(centre, points[labels == number].mean(0))
    assert np.array_equal(centres, kmeans(points.copy(), 3, 1))
    assert np.allclose(kmeans(points, 1, 0), points.mean(0))


def routed(architecture, at, *, apart=True):
    """A model of two experts, each nearest to one of the first two rows."""
    model = shake(adapted(architecture, preset="fedrouter", experts=2, dropout=0.0))
    (group,) = model.routers.values()
    states = model.states_of(**at)
    with torch.no_grad():
        for parameter in group.router.scorer.parameters():
            parameter.zero_()
        group.router.scorer.places.copy_(states[:2] if apart else states[[0, 0]])
    model.state.collect = True
    return model, states


def routes(model, at):
    with torch.no_grad():
        model(**at)
    (record,) = model.state.records
    return record.route.weights[:, 0].tolist()


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
def test_the_state_is_the_mean_of_the_base_alone_over_real_tokens(architecture):
    at = batch(architecture)
    model, states = routed(architecture, at)
    ids, mask = at["input_ids"], at["attention_mask"]
    out = base(architecture)(ids, attention_mask=mask.long(), output_hidden_states=True)
    for row in range(3):
        torch.testing.assert_close(states[row], out.hidden_states[-1][row, mask[row]].mean(0), rtol=1e-4, atol=1e-5)
    assert routes(model, at)[:2] == [[1.0, 0.0], [0.0, 1.0]]
    assert routes(training(model), at)[:2] == [[1.0, 0.0], [0.0, 1.0]]  # experts far from 0 change nothing of it
    model.state.enabled = False
    with torch.no_grad():
        model(**at)
    assert model.state.base is None


def test_the_answer_has_no_say():
    at = batch("llama", rows=2)
    at["labels"][:, :4] = -100
    model, states = routed("llama", at)
    other = {**at, "input_ids": at["input_ids"].clone()}
    other["input_ids"][:, 4:] = at["input_ids"][:, 4:].flip(0)
    torch.testing.assert_close(model.states_of(**other), states)
    other["input_ids"] = at["input_ids"].flip(0)
    torch.testing.assert_close(model.states_of(**other), states.flip(0))
    assert routes(model, other) == [[0.0, 1.0], [1.0, 0.0]]


def alone(model, prompt, tokens):
    """Logits after a prompt and tokens of an answer to it, all in one pass."""
    ids = torch.tensor([[*prompt, *tokens]])
    known = model.states_of(torch.tensor([prompt]), torch.ones(1, len(prompt)), torch.full((1, len(prompt)), -100))
    with torch.no_grad(), model.state.about(known):
        return model.base(ids).logits[0, -1].numpy()


def test_an_answer_keeps_the_expert_of_its_prompt_and_no_prompt_has_that_of_another():
    at = batch("llama", rows=2)
    at["input_ids"][1, :3] = at["input_ids"][0, :3]  # they begin alike
    model, _ = routed("llama", at)
    model.state.collect = False
    first, second = (row.tolist() for row in at["input_ids"])
    whole, answer = TorchPasses(model), [5, 9, 11, 3, 8, 20]
    for prompt in (first, second, first):
        passes = whole.about(prompt)
        for n in range(len(answer) + 1):
            found = passes.logits([*prompt, *answer[:n]])
            np.testing.assert_allclose(found, alone(model, prompt, answer[:n]), rtol=1e-4, atol=1e-4)
            assert passes.kept([*prompt, *answer[:n], 7]) == len(prompt) + n
    assert passes.kept(second) == 0
    losses = passes.losses([*first, *answer])[len(first) - 1 :]
    for n, loss in enumerate(losses):
        scores = torch.from_numpy(alone(model, first, answer[:n])).log_softmax(-1)
        assert loss == pytest.approx(-float(scores[answer[n]]), abs=1e-3)


def beginning_alike():
    """A model, and two prompts of its two experts, of which one begins with the other."""
    model, _ = routed("llama", batch("llama", rows=2))
    model.state.collect = False
    long = [5, 9, 14, 3, 22]
    (group,) = model.routers.values()
    with torch.no_grad():
        for place, ids in zip(group.router.scorer.places, (long[:2], long), strict=True):
            place.copy_(
                model.states_of(torch.tensor([ids]), torch.ones(1, len(ids)), torch.full((1, len(ids)), -100))[0]
            )
    return model, long[:2], long


def test_a_prompt_that_begins_with_another_has_its_own_expert():
    model, short, long = beginning_alike()
    passes = TorchPasses(model)
    whole = alone(model, long, [])
    assert np.abs(alone(model, short, long[2:]) - whole).max() > 0.1
    for ids in (short, long, long):
        np.testing.assert_allclose(passes.logits(ids), alone(model, ids, []), rtol=1e-4, atol=1e-4)
        assert passes.kept([*ids, 7]) == 0
    one, two = passes.about(short), passes.about(long)
    for ids in (short, long, short, [*long, 8], long):  # the answers to both prompts in turns
        np.testing.assert_allclose(one.logits(ids), alone(model, short, ids[2:]), rtol=1e-4, atol=1e-4)
        if ids != short:
            np.testing.assert_allclose(two.logits(ids), alone(model, long, ids[5:]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(two.logits(short), alone(model, short, []), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(two.logits([*long, 8]), alone(model, long, [8]), rtol=1e-4, atol=1e-4)
    assert one.losses(long)[-1] != pytest.approx(two.losses(long)[-1], abs=1e-3)
    passes.close()
    with pytest.raises(AnswerError, match="was closed"):
        one.logits(long)
    plain = TorchPasses(adapted("llama"))
    assert plain.about(short) is plain


def test_whoever_writes_with_the_base_has_the_expert_of_the_prompt():
    model, short, long = beginning_alike()
    hf, ids = model.base, torch.tensor([long, long[::-1]])
    hf.generation_config.eos_token_id = None
    found = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=True)
    for prompt, row in zip(ids.tolist(), found.tolist(), strict=True):
        for n, token in enumerate(row[5:]):
            assert int(alone(model, prompt, row[5 : 5 + n]).argmax()) == token
    cache = DynamicCache()
    with torch.no_grad():
        hf(torch.tensor([short]), past_key_values=cache, use_cache=True)
        after = hf(torch.tensor([long[2:]]), past_key_values=cache, use_cache=True).logits[0, -1]
        np.testing.assert_allclose(after.numpy(), alone(model, short, long[2:]), rtol=1e-4, atol=1e-4)
        with pytest.raises(ModelError, match="goes on with a cache of which they know no such beginning"):
            hf(torch.tensor([[3], [4]]), past_key_values=cache, use_cache=True)  # it is of one row
        own = hf(torch.tensor([short]), use_cache=True).past_key_values
        with pytest.raises(ModelError, match="goes on with a cache"):
            hf(torch.tensor([[3]]), past_key_values=own, use_cache=True)


def test_many_answers_at_once_are_those_of_each_alone():
    at = batch("llama", rows=2)
    model, _ = routed("llama", at)
    model.state.collect = False
    prompts = [at["input_ids"][0, :5].tolist(), at["input_ids"][1].tolist()]
    reader = Reader(lambda ids: " ".join(map(str, ids)), frozenset(), 64)
    together = [each.tokens for each in write(model, prompts, reader, Asked(max_new_tokens=6))]
    for prompt, tokens in zip(prompts, together, strict=True):
        for n, token in enumerate(tokens):
            assert int(alone(model, prompt, tokens[:n]).argmax()) == token
