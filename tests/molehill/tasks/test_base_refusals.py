"""Bases that would load as something else than they are, or run otherwise than experts need, are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DebertaConfig,
    DebertaModel,
    GPT2Config,
    GPT2LMHeadModel,
    LongformerConfig,
    LongformerModel,
    OPTConfig,
    OPTForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from molehill import config
from molehill.errors import DataError, ModelError
from molehill.tasks.base_model import is_here, load_base
from molehill.tasks.sources import is_local, read_rows

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def load(model, kind="causal-lm", precision="fp32"):
    base = config.Base.model_validate({"model": str(model), "precision": precision, "device": "cpu"})
    return load_base(base, config.Task(kind=kind, max_length=8))


def change(folder, name="config.json", **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["causal-lm", "classification"])
def test_weights_that_the_configuration_leaves_out(llama_folder, kind):
    change(llama_folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"leaves out \S*layers\.1\.input_layernorm\.weight and 8 more"):
        load(llama_folder, kind)
    change(llama_folder, num_hidden_layers=2)
    edit(llama_folder, lambda held: held.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}))
    with pytest.raises(ModelError, match=r"leaves out \S*layers\.0\.self_attn\.q_proj\.bias"):
        load(llama_folder, kind)
    edit(llama_folder, lambda held: held.pop("model.layers.0.self_attn.q_proj.bias"))
    edit(llama_folder, lambda held: held.update({"model.norm.bias": torch.ones(16)}))
    with pytest.raises(ModelError, match=r"leaves out \S*norm\.bias and 0 more"):
        load(llama_folder, kind)


def test_weights_beside_the_layers_that_the_configuration_leaves_out(tmp_path, tokenizer):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path)
    change(tmp_path, _remove_final_layer_norm=True)
    with pytest.raises(ModelError, match=r"leaves out \S*decoder\.final_layer_norm\.bias and 1 more"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["causal-lm", "classification"])
def test_masks_and_angles_of_older_versions_may_lie_in_the_layers(llama_folder, tokenizer, tmp_path, kind):
    edit(llama_folder, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(llama_folder, kind)
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=2, n_head=2, n_embd=16, n_positions=32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    edit(folder, lambda held: held.update(masks))
    load(folder, kind)


def test_positions_may_be_whole_numbers(bert_folder):
    edit(bert_folder, lambda held: held.update({"bert.embeddings.position_ids": torch.arange(64)[None]}))
    load(bert_folder, "classification")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("kind", ["causal-lm", "classification"])
def test_weights_that_are_whole_numbers(llama_folder, dtype, kind):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit(llama_folder, lambda held: held.update({name: held[name].to(dtype)}))
    with pytest.raises(ModelError, match=r"is quantised \(model.layers.0.self_attn.q_proj.weight is stored as"):
        load(llama_folder, kind)


def test_layers_that_run_on_other_rows(tmp_path, tokenizer):
    torch.manual_seed(0)
    padded = LongformerModel(LongformerConfig(**SMALL, attention_window=8, max_position_embeddings=64))
    turned = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32))
    for name, model in (("longformer", padded), ("xlnet", turned)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=f"the layers of {name} do not run on the tokens of a batch"):
            load(tmp_path / name, "classification")


def test_a_base_that_runs_in_one_precision_only(tmp_path, tokenizer):
    DebertaModel(DebertaConfig(**SMALL, relative_attention=True, pos_att_type=["c2p"])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path, "classification")
    with pytest.raises(ModelError, match=r'deberta: the model cannot be run .* Set base.precision = "fp32", or'):
        load(tmp_path, "classification", "bf16")


def test_null_is_not_the_default(llama_folder):
    digest = load(llama_folder).info.digest
    change(llama_folder, sliding_window=None)
    assert load(llama_folder).info.digest != digest


def test_ways_to_run_a_model_are_ours(bert_folder):
    digest = load(bert_folder, "classification").info.digest
    change(bert_folder, chunk_size_feed_forward=2, return_dict=False)
    found = load(bert_folder, "classification")
    assert (found.model.config.chunk_size_feed_forward, found.model.config.return_dict) == (0, True)
    assert {m.chunk_size_feed_forward for m in found.model.modules() if hasattr(m, "chunk_size_feed_forward")} == {0}
    assert found.info.digest == digest


@pytest.mark.parametrize("length", ["many", [512], {"a": 1}])
def test_a_longest_input_that_is_no_number(llama_folder, length):
    change(llama_folder, "tokenizer_config.json", model_max_length=length)
    with pytest.raises(ModelError, match=r"tokenizer_config.json: model_max_length is .* not a number"):
        load(llama_folder)


@pytest.mark.parametrize(
    ("name", "said"), [("~nobody-of-that-name/x", "no such place"), ("a" * 5000, "name too long")], ids=["home", "long"]
)
def test_places_where_the_system_cannot_look(name, said):
    base = config.Base.model_validate({"model": name, "device": "cpu"})
    for look in (is_here, lambda base: load_base(base, config.Task(kind="causal-lm", max_length=8))):
        with pytest.raises(ModelError, match=f"(?i){said}"):
            look(base)
    for read in (read_rows, is_local):
        with pytest.raises(DataError, match=f"(?i){said}"):
            read(name)
