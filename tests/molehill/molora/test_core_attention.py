"""Attention by two products against torch's own, in float32 where the two must agree."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, adapted, base, batch, shake

from molehill.errors import ModelError
from molehill.molora import attention


def yes(_ordered):
    return True


def states(model, embeddings, mask):
    out = model(inputs_embeds=embeddings, attention_mask=mask)
    return out[0]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_and_gradients_are_those_of_sdpa(architecture, padding):
    """Llama has grouped-query attention and a causal mask, GPT-2 a causal mask, BERT looks both ways."""
    torch.manual_seed(0)
    model = base(architecture)
    assert model.config._attn_implementation == "sdpa"
    embeddings = torch.randn(3, 9, 32, requires_grad=True)
    mask = torch.ones(3, 9, dtype=torch.long)
    if padding != "none":
        mask[1, slice(6, None) if padding == "right" else slice(3)] = 0
    probe = torch.randn(3, 9, 1) * mask.unsqueeze(-1)  # what padding sees is nobody's business
    found = []
    for name in ("sdpa", attention.NAME):
        if name == attention.NAME:
            attention.register()
            model.set_attn_implementation(name)
        out = states(model, embeddings, mask if padding != "none" else None)
        found.append(((out * mask.unsqueeze(-1)).detach(), *torch.autograd.grad((out * probe).sum(), embeddings)))
    for mine, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("keys", [4, 6])
def test_gradients_are_those_of_finite_differences(keys, monkeypatch):
    """Blocks of three queries and of one, with as many keys or two of the past."""
    monkeypatch.setattr(attention, "_BLOCK", 3)
    torch.manual_seed(0)
    q = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, keys, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    order = torch.full((4, keys), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1 + keys - 4)
    heads = torch.randn(1, 4, 4, keys, dtype=torch.float64) + order
    found = []
    for how in ((None, False), (order, False), (order, True), (None, True), (heads, False), (heads, True)):

        def run(*qkv, how=how):
            return attention._Attention.apply(*qkv, how[0], 0.7, how[1])

        assert torch.autograd.gradcheck(run, (q, k, v))
        found.append(run(q, k, v))
    for one in found[2:4]:
        torch.testing.assert_close(one, found[1])
    torch.testing.assert_close(found[4], found[5])
    scores = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT).flatten(1, 2) * 0.7 + heads
    torch.testing.assert_close(found[4], (scores.softmax(-1).unflatten(1, (2, 2)) @ v.unsqueeze(2)).flatten(1, 2))


def test_more_keys_than_queries_are_the_past():
    """With a cache the queries are the last tokens: each sees all of the past and no later token."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4) for n in (3, 7, 7))
    module = torch.nn.Module()
    module.is_causal = True
    out, _ = attention._bmm_attention(module, q, k, v, None)
    allowed = torch.ones(3, 7, dtype=torch.bool).tril(4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(out, expected.transpose(1, 2))


PADDED = {"attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}
PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 0, 1, 2, 0, 1]])}


@pytest.mark.parametrize(
    ("architecture", "given", "masked", "ordered"),
    [
        ("llama", {}, False, True),
        ("llama", {"attention_mask": torch.ones(2, 9)}, False, True),
        ("llama", PADDED, True, True),
        ("llama", PACKED, True, True),
        ("gpt2", {}, False, True),
        ("bert", {}, False, False),
        ("bert", PADDED, True, False),
    ],
)
def test_a_mask_is_made_only_where_more_than_the_order_masks(architecture, given, masked, ordered, monkeypatch):
    model, calls, apply = base(architecture), [], attention._Attention.apply

    def note(*args):
        calls.append((args[3] is not None, args[5]))
        return apply(*args)

    ids = torch.arange(18).view(2, 9) + 2
    real = given.get("attention_mask", torch.ones(2, 9)).bool()
    with torch.no_grad():
        expected = model(input_ids=ids, **given)[0][real]
        attention.use_fast_attention(model, 9, yes)
        monkeypatch.setattr(attention._Attention, "apply", note)
        found = model(input_ids=ids, **given)[0][real]
    assert calls == [(masked, ordered)] * 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("length", "faster", "switched"),
    [(128, True, True), (attention.MAX_TOKENS + 1, True, False), (128, False, False)],
)
def test_short_inputs_are_switched_where_it_is_faster(length, faster, switched):
    model = base("llama")
    attention.use_fast_attention(model, length, lambda _: faster)
    assert (model.config._attn_implementation == attention.NAME) == switched


def test_a_model_that_would_give_something_else_keeps_its_own(monkeypatch):
    model = base("bert", dtype=torch.bfloat16)
    monkeypatch.setattr(attention, "_mask", lambda **_: None)  # padding would be seen
    attention.use_fast_attention(model, 128, yes)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapted_bf16_model_trains_with_it(architecture):
    grads = []
    for fast in (False, True):
        model = shake(adapted(architecture, dtype=torch.bfloat16, selector="dense", rank=2), scale=0.1)
        if fast:
            attention.use_fast_attention(model.base, 16, yes)
        forward = model(**batch(architecture))
        torch.nn.functional.cross_entropy(forward.logits, forward.labels).backward()
        grads.append(model.grad.clone())
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 40,
    "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MORE_THAN_WE_DO = {
    "sinks": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=16)
    ),
    "soft cap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, sliding_window=16, attn_logit_softcapping=5.0)
    ),
}


@pytest.mark.parametrize("kind", MORE_THAN_WE_DO)
def test_a_model_whose_attention_does_more_keeps_its_own(kind):
    model = MORE_THAN_WE_DO[kind]().to(torch.bfloat16).eval()
    own = model.config._attn_implementation
    ids = torch.arange(1, 31).view(1, 30)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        attention.use_fast_attention(model, 40, yes)
        assert model.config._attn_implementation == own
        assert torch.equal(model(input_ids=ids).logits, before)


def test_windows_and_grouped_heads_are_ours():
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, sliding_window=4, attn_logit_softcapping=None)
    )
    model = model.to(torch.bfloat16).eval()
    ids = torch.arange(1, 31).view(1, 30)
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        attention.use_fast_attention(model, 40, yes)
        assert model.config._attn_implementation == attention.NAME
        after = model(input_ids=ids).logits.float()
    assert float((after - before).square().mean() / before.var()) < 1e-3


@pytest.mark.parametrize(
    "extra", [{"softcap": 5.0}, {"s_aux": torch.zeros(2)}, {"anything": 1}, {"dropout": 0.1}], ids=str
)
def test_what_it_does_not_implement_it_refuses(extra):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ModelError, match=next(iter(extra))):
        attention._bmm_attention(torch.nn.Module(), q, q, q, None, **extra)
    attention._bmm_attention(torch.nn.Module(), q, q, q, None, softcap=None, sliding_window=16, dropout=0.0)


def test_a_learned_bias_gets_its_gradient():
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    bias = torch.randn(1, 2, 3, 3, requires_grad=True)
    out, _ = attention._bmm_attention(torch.nn.Module(), q, k, v, bias)
    (mine,) = torch.autograd.grad(out.square().sum(), bias)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    (other,) = torch.autograd.grad((scores.softmax(-1) @ v).square().sum(), bias)
    torch.testing.assert_close(mine, other)
