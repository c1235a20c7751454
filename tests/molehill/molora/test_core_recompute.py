"""What is made again in the backward pass against what is kept."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, adapted, base, batch, shake, training
from torch import nn

from molehill.molora import build, recompute

DTYPES = [torch.float32, torch.bfloat16]


def passed(architecture, dtype, **keys):
    """Logits, gradients and the bytes that the graph keeps beside parameters."""
    model = training(shake(adapted(architecture, dtype=dtype, selector="dense", rank=2, **keys), scale=0.1))
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: no address is used twice
        return tensor

    torch.manual_seed(0)  # dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward = model(**batch(architecture))
        loss = nn.functional.cross_entropy(forward.logits, forward.labels)
    loss.backward()
    return forward.logits.detach(), model.grad.clone(), sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [{}, {"dropout": 0.3}, {"targets": [r"(q_proj|query|c_attn)$"]}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_changes_but_what_is_kept(architecture, keys, dtype, monkeypatch):
    logits, grad, size = passed(architecture, dtype, **keys)
    monkeypatch.setattr(build, "keep_less", lambda base: None)
    expected, expected_grad, plain = passed(architecture, dtype, **keys)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert size < plain if dtype == torch.bfloat16 and not keys else size <= plain


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_graph_can_be_walked_in_part_and_again(architecture):
    model = shake(adapted(architecture, selector="dense", rank=2))
    forward = model(**batch(architecture))
    loss = forward.logits.square().mean()
    learns = [parameter for parameter, _, _ in model.places]
    whole = torch.autograd.grad(loss, learns, retain_graph=True)
    parts = [torch.autograd.grad(loss, parameter, retain_graph=True)[0] for parameter in learns]
    again = torch.autograd.grad(loss, learns)
    for one, two, three in zip(whole, parts, again, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three)


def test_an_output_that_was_written_to_has_no_source():
    norm = nn.Sequential(nn.LayerNorm(4)).requires_grad_(requires_grad=False)
    recompute.keep_less(norm)
    x = torch.randn(2, 4, requires_grad=True) * 1
    y = norm(x)
    assert recompute.source_of(y) is not None
    y.add_(1)
    assert recompute.source_of(y) is None
    z = norm(x)
    x.add_(1)
    assert recompute.source_of(z) is None


def test_a_gated_block_of_another_form_stays_as_it_is():
    block = base("llama").model.layers[0].mlp
    recompute.keep_less(block)
    assert block.forward.func is recompute._gated

    class Doubled(type(block)):
        def forward(self, x):
            return 2 * super().forward(x)

    kin = Doubled(base("llama").config)
    recompute.keep_less(kin)
    assert "forward" not in vars(kin)


def test_without_gradients_nothing_is_remembered():
    norm = nn.Sequential(nn.LayerNorm(4)).requires_grad_(requires_grad=False)
    recompute.keep_less(norm)
    assert recompute.source_of(norm(torch.randn(2, 4))) is None
    with torch.no_grad():
        assert recompute.source_of(norm(torch.randn(2, 4, requires_grad=True))) is None


class GatedLayerNorm(nn.LayerNorm):
    """A norm that gets a gate beside its input, as those of state-space models do."""

    def forward(self, x, gate=None, *, shift=0.0):
        y = super().forward(x) + shift
        return y if gate is None else y * gate


def test_a_norm_that_gets_more_than_its_input_is_left_alone():
    torch.manual_seed(0)
    plain = GatedLayerNorm(4)
    ours = GatedLayerNorm(4)
    recompute.keep_less(nn.ModuleList([ours]))
    x, gate = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    for args, extras in (((x,), {}), ((x, None), {}), ((x, gate), {}), ((x,), {"shift": 2.0}), ((x,), {"gate": gate})):
        found, wanted = ours(*args, **extras), plain(*args, **extras)
        assert torch.equal(found, wanted)
        for mine, other in zip(*(torch.autograd.grad(y.square().sum(), x) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(mine, other)
