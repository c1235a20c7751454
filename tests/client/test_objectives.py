"""Objectives against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, adapted, base, batch, shake

from molehill import registry
from molehill.molora import likelihoods
from molehill.molora.forward import Forward
from molehill.molora.likelihoods import of_class


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def objective(name, **params):
    return registry.build("objective", name, params)


def forward_of(logits, labels, reference=None):
    return Forward(logits, labels, torch.arange(len(labels)), [], lambda: reference)


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 5, (6,)), torch.randn(6, 5, dtype=torch.float64)


def gradient(function, logits, labels, reference=None):
    logits = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(forward_of(logits, labels, reference)), logits)
    return grad


def test_sft_is_the_mean_negative_log_probability(drawn):
    logits, labels, _ = drawn
    expected = -logits.log_softmax(-1)[torch.arange(6), labels].mean()
    torch.testing.assert_close(objective("sft")(forward_of(logits, labels)), expected)


def test_the_negative_log_likelihood_is_that_of_torch(drawn):
    logits, labels, _ = drawn
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: of_class(z, labels), logits)
    ours, theirs = of_class(logits, labels), F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ours, theirs)
    probe = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((y * probe).sum(), logits)[0] for y in (ours, theirs)))


def test_logits_in_bf16_give_what_their_float32_copies_give():
    torch.manual_seed(0)
    logits = torch.randn(5, 7).bfloat16().requires_grad_()
    labels, probe = torch.arange(5), torch.randn(5)
    loss = of_class(logits, labels)
    expected = F.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad((y * probe).sum(), logits)[0] for y in (loss, expected))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


def test_logits_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(likelihoods, "_AT_ONCE", 10)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 1, 1, 2])
    torch.testing.assert_close(of_class(logits, labels), F.cross_entropy(logits, labels, reduction="none"))
    assert torch.autograd.gradcheck(lambda z: of_class(z, labels), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_label_whose_probability_is_no_number_has_its_loss(dtype):
    logits = torch.tensor([[0.0, 300.0, 1.0], [2000.0, 0.0, 0.0], [0.0, 0.1, 0.2]], dtype=dtype).requires_grad_()
    labels = torch.tensor([2, 1, 2])
    ours, theirs = of_class(logits, labels), F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y.mean(), logits)[0] for y in (ours, theirs)))
    with torch.no_grad():
        assert torch.equal(of_class(logits, labels), ours)


def test_the_graph_of_a_loss_can_be_walked_again():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = of_class(logits, torch.tensor([0, 1, 2, 0])).mean()
    once, again = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_the_gradient_of_dft_is_that_of_sft_times_the_probability(drawn):
    logits, labels, _ = drawn
    p = logits.softmax(-1)[torch.arange(6), labels]
    expected = gradient(objective("sft"), logits, labels) * p.unsqueeze(-1)
    torch.testing.assert_close(gradient(objective("dft"), logits, labels), expected)
    torch.testing.assert_close(objective("dft")(forward_of(logits, labels)), -(p * p.log()).mean())


def test_asft_without_its_coefficient_is_dft_and_asks_for_no_reference(drawn):
    logits, labels, _ = drawn

    def nobody():
        raise AssertionError

    forward = Forward(logits, labels, torch.arange(6), [], nobody)
    assert torch.equal(objective("asft", coef=0.0)(forward), objective("dft")(forward))


def test_asft_adds_the_divergence_from_the_reference(drawn):
    logits, labels, reference = drawn
    ours, theirs = logits.softmax(-1), reference.softmax(-1)
    kl = (theirs * (theirs / ours).log()).sum(-1).mean()
    expected = objective("dft")(forward_of(logits, labels)) + 0.3 * kl
    torch.testing.assert_close(objective("asft", coef=0.3)(forward_of(logits, labels, reference)), expected)
    pull = gradient(objective("asft", coef=0.3), logits, labels, reference) - gradient(objective("dft"), logits, labels)
    torch.testing.assert_close(pull, 0.3 * (ours - theirs) / 6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_the_start_there_is_no_divergence(architecture):
    model, at = adapted(architecture, experts=2, rank=2), batch(architecture)
    forward = model(**at)
    torch.testing.assert_close(objective("asft", coef=5.0)(forward), objective("dft")(forward))
    forward = shake(model)(**at)
    assert objective("asft", coef=5.0)(forward) > objective("dft")(forward) + 1e-3


def test_the_loss_of_a_decoder_is_transformers_own():
    model, at = adapted("llama", experts=2, rank=2), batch("llama")
    with torch.no_grad():
        expected = base("llama")(
            input_ids=at["input_ids"], attention_mask=at["attention_mask"].long(), labels=at["labels"]
        ).loss
    torch.testing.assert_close(objective("sft")(model(**at)).detach(), expected)
