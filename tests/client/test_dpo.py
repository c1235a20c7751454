"""Direct preference optimisation against its formulas, on numbers and on a model."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import adapted, shake

from molehill import registry
from molehill.molora.forward import Forward
from molehill.molora.pairs import margins
from molehill.tasks.batches import IGNORE, Batch
from molehill.tasks.preference import PairSum

BETA = 0.3


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def dpo(beta=BETA):
    return registry.build("objective", "dpo", {"beta": beta})


def passed(scores, labels, rows, reference):
    return Forward(scores, labels, rows, [], lambda: reference)


@pytest.fixture
def drawn():
    """Two pairs with answers of 2, 1, 1 and 3 tokens."""
    torch.manual_seed(0)
    rows = torch.tensor([0, 0, 1, 2, 3, 3, 3])
    return (
        torch.randn(7, 5, dtype=torch.float64),
        torch.randint(0, 5, (7,)),
        rows,
        torch.randn(7, 5, dtype=torch.float64),
    )


def log_p(scores, labels, rows, row):
    each = scores.log_softmax(-1)[torch.arange(len(labels)), labels]
    return each[rows == row].sum()


def test_the_loss_is_equation_7(drawn):
    scores, labels, rows, reference = drawn
    expected = []
    for chosen, rejected in ((0, 1), (2, 3)):
        ratio = [log_p(scores, labels, rows, row) - log_p(reference, labels, rows, row) for row in (chosen, rejected)]
        expected.append(-math.log(1 / (1 + math.exp(-BETA * (ratio[0] - ratio[1])))))
    assert float(dpo()(passed(*drawn))) == pytest.approx(sum(expected) / 2)


def test_an_answer_counts_by_all_of_its_tokens(drawn):
    """A mean over tokens, as of a likelihood, would not know how long an answer is."""
    scores, labels, rows, reference = drawn
    twice = [torch.cat([part[:2], part]) for part in (scores, labels, rows, reference)]
    gained = log_p(scores, labels, rows, 0) - log_p(reference, labels, rows, 0)
    assert float(margins(passed(*twice))[0] - margins(passed(*drawn))[0]) == pytest.approx(float(gained))


def test_the_gradient_is_that_of_both_log_probabilities_weighed_by_the_doubt(drawn):
    scores, labels, rows, reference = drawn
    z = scores.clone().requires_grad_()
    (found,) = torch.autograd.grad(dpo()(passed(z, labels, rows, reference)), z)
    expected = torch.zeros_like(scores)
    for pair, (chosen, rejected) in enumerate(((0, 1), (2, 3))):
        doubt = torch.sigmoid(-BETA * margins(passed(*drawn))[pair])
        for sign, row in ((-1, chosen), (1, rejected)):
            (slope,) = torch.autograd.grad(log_p(z, labels, rows, row), z)
            expected += sign * BETA * doubt * slope / 2
    torch.testing.assert_close(found, expected)


def test_what_is_said_of_all_answers_alike_changes_nothing(drawn):
    """Unlike fine-tuning: a logit that all chosen and rejected tokens share has no gradient where both are as long."""
    torch.manual_seed(1)
    base, rows = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    labels = torch.tensor([2, 3, 2, 3])  # one answer twice
    scores = base.repeat(1, 1)
    scores[2:] = scores[:2]
    forward = passed(scores, labels, rows, scores.flip(-1))
    assert float(dpo()(forward)) == pytest.approx(math.log(2))


def pairs(seed=0, count=3):
    """A batch of pairs for a causal LM with a vocabulary of 40."""
    torch.manual_seed(seed)
    ids = torch.randint(2, 40, (2 * count, 7))
    labels = ids.clone()
    labels[:, :3] = IGNORE
    labels[1, 5:] = IGNORE
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), labels, None, "pair")


def test_at_the_start_nothing_is_preferred_and_the_chosen_answers_are_pulled_up():
    model, batch = adapted("llama", experts=2, rank=2), pairs()
    loss = dpo()(model(batch.input_ids, batch.attention_mask, batch.labels))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    gained = model.grad.clone()
    model.grads.zero_()
    forward = model(batch.input_ids, batch.attention_mask, batch.labels)
    of_rows = torch.zeros(6).index_add(0, forward.rows, -forward.nll())
    (-BETA / 2 * (of_rows[0::2] - of_rows[1::2]).mean()).backward()
    torch.testing.assert_close(gained, model.grad, rtol=1e-4, atol=1e-7)


def test_clients_in_the_same_passes_have_each_their_own_loss():
    model = adapted("llama", experts=2, rank=2)
    shake(model)
    first, second = pairs(0), pairs(1)
    alone = [dpo()(model(b.input_ids, b.attention_mask, b.labels)).item() for b in (first, second)]
    model.stack(2)
    ids, mask, labels = (
        torch.cat([getattr(first, name), getattr(second, name)]) for name in ("input_ids", "attention_mask", "labels")
    )
    parts = model(ids, mask, labels).by_client(2, len(first))
    assert [dpo()(part).item() for part in parts] == pytest.approx(alone, rel=1e-5)


def test_figures_are_over_pairs_and_the_loss_is_the_objectives(drawn):
    found = []
    for objective in (dpo(1.0), dpo(0.1)):
        total = PairSum()
        total.by(objective)
        total.add(passed(*drawn))
        found.append(total.scores())
    gained = margins(passed(*drawn))
    assert found[0].figures == found[1].figures
    assert found[1].n == 2
    assert found[1].figures["margin"].value == pytest.approx(float(gained.mean()))
    assert found[1].figures["preferred"].value == pytest.approx(float((gained > 0).double().mean()))
    for scores, beta in zip(found, (1.0, 0.1), strict=True):
        assert scores.loss == pytest.approx(float(dpo(beta)(passed(*drawn))))


def test_an_answer_that_gained_as_much_as_the_other_counts_half(drawn):
    scores, labels, rows, _ = drawn
    total = PairSum()
    total.by(dpo())
    total.add(passed(scores, labels, rows, scores))
    assert total.scores().figures["preferred"].value == 0.5
    assert total.scores().loss == pytest.approx(math.log(2))


def test_a_batch_of_pairs_counts_its_pairs():
    assert pairs(count=3).predictions == 3
