"""Logits and gradients of families of bases with kernels of ours and without."""

from __future__ import annotations

import pytest
import torch
import transformers

from molehill.molora import attention
from molehill.molora.recompute import keep_less

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40, "pad_token_id": 0}
ENCODER = {**COMMON, "intermediate_size": 64, "max_position_embeddings": 66}
DECODER = {**ENCODER, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4, "attn_logit_softcapping": None}
OURS = {
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 4},
    "mixtral": {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 2},
    "qwen2": DECODER,
    "qwen3": DECODER,
    "gemma": DECODER,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": DECODER,
    "phi": {**ENCODER, "bos_token_id": 1, "eos_token_id": 2},
    "phi3": {**DECODER, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66, "vocab_size": 40},
    "gpt_neox": {**ENCODER, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {**COMMON, "ffn_dim": 64, "max_position_embeddings": 66, "word_embed_proj_dim": 32,
            "activation_function": "gelu"},  # one whose gradient does not jump where rounding changes a sign
    "bert": ENCODER,
    "roberta": ENCODER,
    "electra": {**ENCODER, "embedding_size": 32},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 40, "pad_token_id": 0},
    "modernbert": {**ENCODER, "local_attention": 6, "global_attn_every_n_layers": 2, "bos_token_id": 1,
                   "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
}  # fmt: skip
THEIRS = {  # their attention does more, or is not transformers' own
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 32, "vocab_size": 40},
    "falcon": {**COMMON, "alibi": True, "multi_query": True, "new_decoder_architecture": False},
    "mpnet": ENCODER,
    "gemma2": {**GEMMA, "attn_logit_softcapping": 5.0},
}
TOKENS = 11


def made(family, keys, dtype):
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(family, **keys)
    settings.initializer_range = 0.2
    model = transformers.AutoModel.from_config(settings).to(dtype).eval()
    return model.requires_grad_(requires_grad=False)


def adopted(model, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 4)
    attention.use_fast_attention(model, TOKENS, lambda _: True)
    keep_less(model)
    return model


def passed(model, padding):
    """States of real tokens, and the gradient for the embeddings."""
    generator = torch.Generator().manual_seed(1)
    weight = next(model.parameters())
    embeddings, probe = torch.randn(2, 3, TOKENS, 32, generator=generator).bfloat16().to(weight.dtype)
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    if padding != "none":
        mask[1, slice(7, None) if padding == "right" else slice(4)] = 0
    real = mask.bool()
    out = model(inputs_embeds=embeddings.requires_grad_(), attention_mask=mask if padding != "none" else None)[0]
    (grad,) = torch.autograd.grad((out * probe)[real].float().sum(), embeddings)
    return out.detach()[real].float(), grad[real].float()


def error(found, wanted):
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", OURS)
def test_in_float32_they_are_the_same(family, padding, monkeypatch):
    model = made(family, OURS[family], torch.float32)
    wanted = passed(model, padding)
    found = passed(adopted(model, monkeypatch), padding)
    assert model.config._attn_implementation == attention.NAME
    assert max(error(found, wanted)) < 1e-5


@pytest.mark.parametrize("family", OURS)
def test_in_bf16_they_are_as_close_to_float32_as_without(family, monkeypatch):
    wanted = passed(made(family, OURS[family], torch.bfloat16).float(), "right")
    own = error(passed(made(family, OURS[family], torch.bfloat16), "right"), wanted)
    ours = error(passed(adopted(made(family, OURS[family], torch.bfloat16), monkeypatch), "right"), wanted)
    for mine, other in zip(ours, own, strict=True):
        assert mine < 1.25 * other


@pytest.mark.parametrize("family", THEIRS)
def test_an_attention_that_is_not_for_us_stays(family, monkeypatch):
    model = made(family, THEIRS[family], torch.float32)
    own, wanted = model.config._attn_implementation, passed(model, "right")
    found = passed(adopted(model, monkeypatch), "right")
    assert model.config._attn_implementation == own
    assert max(error(found, wanted)) < 1e-5
