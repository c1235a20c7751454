"""The gradient of RMS norms against autograd's and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from molehill.molora import recompute
from molehill.molora.norms import RMSForm, form_of, rms_norm

DTYPES = [torch.float32, torch.bfloat16]
WIDTH = 32


class CentredRMSNorm(LlamaRMSNorm):
    """A norm that takes the mean off, so that it is none of ours."""

    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


NORMS = {
    "of its weight": (lambda: LlamaRMSNorm(WIDTH, eps=1e-5), RMSForm(0.0, 1e-5)),
    "of one and its weight": (lambda: GemmaRMSNorm(WIDTH, eps=1e-6), RMSForm(1.0, 1e-6)),
    "torch": (lambda: nn.RMSNorm(WIDTH, eps=1e-3), RMSForm(0.0, 1e-3)),
    "another eps": (lambda: nn.RMSNorm(WIDTH), None),
    "a mean": (lambda: CentredRMSNorm(WIDTH), None),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), None),
}


def made(kind, dtype):
    torch.manual_seed(0)
    norm = NORMS[kind][0]()
    nn.init.normal_(norm.weight)
    return norm.to(dtype).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_told_apart_by_their_gradient(kind, dtype):
    assert form_of(made(kind, dtype)) == NORMS[kind][1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_outputs_and_gradients_are_the_norms_own(kind, dtype):
    plain, ours = made(kind, dtype), made(kind, dtype)
    recompute.keep_less(nn.ModuleList([ours]))
    x = torch.randn(2, 3, 5, WIDTH).transpose(1, 2).to(dtype).requires_grad_()
    probe = torch.randn(2, 5, 3, WIDTH).to(dtype)
    found, wanted = ours(x), plain(x)
    assert torch.equal(found, wanted)
    mine, other = (torch.autograd.grad(y, x, probe)[0] for y in (found, wanted))
    assert mine.dtype == dtype
    assert (mine - other).float().norm() < (1e-6 if dtype == torch.float32 else 5e-3) * other.float().norm()


def test_gradients_are_those_of_finite_differences():
    norm, form = made("of one and its weight", torch.float64), RMSForm(1.0, 0.3)
    norm.eps = 0.3

    def plain(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.3) * (1 + norm.weight)

    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, norm.weight, form, plain), x)


def test_a_norm_that_learns_keeps_its_own_gradient():
    norm = made("of its weight", torch.float32)
    recompute.keep_less(nn.ModuleList([norm]))
    norm.weight.requires_grad_()
    norm(torch.randn(2, WIDTH, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None
