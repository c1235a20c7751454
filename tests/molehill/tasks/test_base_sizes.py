"""Sizes, positions and sites are read off the model, whatever its configuration says."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from molehill import config
from molehill.errors import ModelError
from molehill.tasks.adapted import open_model

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 34, "pad_token_id": 1,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def open_base(folder, model, make_tokenizer, kind="classification", longest=None, **values):
    torch.manual_seed(0)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = longest or 10**30  # what it is when a tokenizer says nothing
    tokenizer.save_pretrained(folder)
    task = {"kind": kind, "max_length": 16} | ({"labels": ["a", "b"]} if kind == "classification" else {})
    return open_model(
        config.parse(
            {
                "base": {"model": str(folder), "precision": "fp32", "device": "cpu"},
                "task": {**task, **values},
                "molora": {"experts": 2, "rank": 2, "targets": "all-linear"},
            }
        )
    ).model


def gemma3():
    text = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    )


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    text = SIZES | {"num_key_value_heads": 2, "rope_parameters": rope}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **special))


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES)), 32),  # positions begin after the padding index
        (lambda: hf.MPNetForMaskedLM(hf.MPNetConfig(**SIZES)), 32),
        (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), 34),
        (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)), 32),
        (lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT, rotary_dim=4)), 32),
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)), 34),  # no table, but trained on as many
    ],
)
def test_the_longest_input(tmp_path, make_tokenizer, make, limit):
    with pytest.raises(ModelError, match=rf"task.max_length is {limit + 1}, but the model takes {limit} tokens"):
        open_base(tmp_path, make(), make_tokenizer, max_length=limit + 1)
    open_base(tmp_path, make(), make_tokenizer, max_length=limit)


def test_a_table_that_no_configuration_tells_of(tmp_path, make_tokenizer):
    model = hf.MptForCausalLM(hf.MptConfig(vocab_size=64, d_model=16, n_heads=2, n_layers=2, max_seq_len=20))
    with pytest.raises(ModelError, match="the model takes 20 tokens"):
        open_base(tmp_path, model, make_tokenizer, "causal-lm", max_length=64)


def test_without_a_table_the_tokenizer_decides(tmp_path, make_tokenizer):
    model = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2))
    open_base(tmp_path, model, make_tokenizer, "causal-lm", max_length=600)
    with pytest.raises(ModelError, match="the model takes 512 tokens"):
        open_base(tmp_path, model, make_tokenizer, "causal-lm", longest=512, max_length=600)


def test_the_head_is_as_wide_as_the_states(tmp_path, make_tokenizer):
    settings = hf.OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=8,
        max_position_embeddings=32, do_layer_norm_before=False,
    )  # fmt: skip
    model = open_base(tmp_path, hf.OPTForCausalLM(settings), make_tokenizer)
    assert model.head.weight.shape == (2, 8)


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
@pytest.mark.parametrize("make", [gemma3, qwen2_vl])
def test_of_a_multimodal_base_the_language_model_is_adapted(tmp_path, make_tokenizer, kind, make):
    model = open_base(tmp_path, make(), make_tokenizer, kind)
    assert len(model.sites) == 14
    assert not [name for name in model.sites if "vision" in name or "visual" in name]
    (remark,) = model.remarks
    assert "text never reaches" in remark
    assert "vision" in remark or "visual" in remark


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES | MIXTURE)), "86%"),
        (lambda: hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES | MIXTURE)), "86%"),
    ],
)
def test_experts_of_the_base_are_told_of(tmp_path, make_tokenizer, kind, make, share):
    model = open_base(tmp_path, make(), make_tokenizer, kind)
    assert {name.rpartition(".")[2] for name in model.sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    (remark,) = model.remarks
    assert f"({share}) are not adapted" in remark
    assert "experts.gate_up_proj" in remark


def test_nothing_is_told_of_where_all_is_adapted(tmp_path, make_tokenizer):
    for at, make in enumerate(
        (
            lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
            lambda: hf.DistilBertForMaskedLM(
                hf.DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
            ),
            lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**SIZES, embedding_size=8)),
            lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZES)),
            lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
            lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZES)),  # its linears have a forward pass of their own
        )
    ):
        assert open_base(tmp_path / str(at), make(), make_tokenizer).remarks == ()


def test_what_cannot_be_trained_is_refused_at_once(tmp_path, make_tokenizer):
    settings = hf.NystromformerConfig(**SIZES, segment_means_seq_len=16, num_landmarks=8)
    with pytest.raises(ModelError, match="nystromformer: the model cannot be run on rows of text"):
        open_base(tmp_path, hf.NystromformerForMaskedLM(settings), make_tokenizer)


def test_numbers_that_are_not_finite(tmp_path, make_tokenizer):
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZES))
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="numbers that are not finite"):
        open_base(tmp_path, model, make_tokenizer)
