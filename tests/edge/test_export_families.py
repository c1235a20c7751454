"""Families of bases that `molehill check` says are known to go to devices."""

from __future__ import annotations

import os

import edge_export
import numpy as np
import pytest
import tiny_models
import torch
import transformers

from molehill import config
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.tasks import devices
from molehill_export.base import _traced_decoder, classifier
from molehill_export.base_quantise import quantise_base
from molehill_export.molora import choose_slots, gate_values, insert

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
LLAMA = {
    **COMMON, "intermediate_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2,
    "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
MIXTURE = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}
WRITES = {
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MIXTURE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 32, "vocab_size": 48},
    "falcon": {**COMMON, "multi_query": True, "alibi": False, "new_decoder_architecture": False},
    "gemma": {**LLAMA, "head_dim": 8},
    "gpt_neox": {**COMMON, "intermediate_size": 64, "max_position_embeddings": 64},
    "olmoe": MIXTURE,
    "opt": {**COMMON, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "phi": {**COMMON, "intermediate_size": 64, "max_position_embeddings": 64},
    "phi3": {**LLAMA, "num_key_value_heads": 4},
    "qwen3_moe": {**MIXTURE, "head_dim": 8, "moe_intermediate_size": 32},
}
ENCODER = {**COMMON, "intermediate_size": 64, "max_position_embeddings": 66, "pad_token_id": 1}
READS = {
    "camembert": ENCODER,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 48, "pad_token_id": 0},
    "electra": {**ENCODER, "embedding_size": 16},
    "mpnet": ENCODER,
    "roberta": ENCODER,
    "xlm-roberta": ENCODER,
}
NIGHTLY = pytest.mark.skipif(not os.environ.get("MOLEHILL_NIGHTLY"), reason="a family more; make nightly")


def _cases(families, first):
    return [pytest.param(name, marks=() if name in first else NIGHTLY) for name in families]


def made(name, auto, keys):
    torch.manual_seed(0)
    return auto.from_config(transformers.AutoConfig.for_model(name, **keys)).eval().requires_grad_(requires_grad=False)


def text():
    ids = torch.randint(5, 48, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, 6:] = False
    return ids, mask


LINEARS = {"targets": "all-linear", "experts": 3, "rank": 2, "scope": "layer"}


@pytest.mark.parametrize("name", _cases(WRITES, {"mixtral", "qwen2_moe"}))
def test_decoders(name):
    _decoder(name, LINEARS)


@pytest.mark.parametrize("name", _cases(["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"], {"olmoe"}))
@pytest.mark.parametrize("preset", ["perft_r", "cartesian_moe"])
def test_experts_beside_the_blocks_of_a_mixture(name, preset):
    _decoder(name, {"preset": preset, "rank": 2})


def _decoder(name, keys):
    section = config.parse({"molora": keys}).molora
    auto = transformers.AutoModelForCausalLM
    model = tiny_models.shake(wrap(made(name, auto, WRITES[name]), section).eval(), scale=0.05)
    ids, mask = text()
    wanted = edge_export.original(model, ids, mask)
    graph = _traced_decoder(made(name, auto, WRITES[name]), model.marks)
    for scheme, bound in (("fp32", 1e-9), ("int8", 0.3), ("int4", 0.3)):
        whole = graph.copy()
        quantise_base(whole, scheme, "logits")
        inserted = insert(whole, model, section.scorer, choose_slots(model, None, 0), scheme)
        whole.tensors.update(gate_values(model, inserted))
        session = edge_export.opened(whole)
        past = {v.name: v.shape for v in session.get_inputs() if v.name.startswith("past_key_values.")}
        empty = {key: np.zeros((3, shape[1], 0, shape[3]), np.float32) for key, shape in past.items()}
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy(), **empty}
        found = session.run(["logits"], feed)[0][mask.numpy()]
        assert edge_export.error(wanted, found) < bound, scheme


@NIGHTLY
@pytest.mark.parametrize("name", READS)
def test_encoders(name):
    section = config.parse({"molora": LINEARS}).molora
    head, auto = Head(32, 3, "mean", anchored=False), transformers.AutoModel
    model = tiny_models.shake(wrap(made(name, auto, READS[name]), section, head=head).eval(), scale=0.1)
    ids, mask = text()
    wanted = edge_export.original(model, ids, mask)
    graph = classifier(made(name, auto, READS[name]), head, model.marks)
    inserted = insert(graph, model, section.scorer, choose_slots(model, None, 0), "fp32")
    graph.tensors.update(gate_values(model, inserted))
    found = edge_export.exported(edge_export.opened(graph), ids, mask)
    assert edge_export.error(wanted, found) < 1e-9


def test_what_is_said_before_a_run_agrees_with_these_tests():
    elsewhere = {"gpt2", "llama", "mistral", "qwen2", "qwen3"}  # in test_export_parity
    assert elsewhere | WRITES.keys() == devices._WRITES
    assert {"albert", "bert", "deberta-v2", "gpt2", "llama"} | READS.keys() == devices._READS
    for name, keys in WRITES.items():
        settings = transformers.AutoConfig.for_model(name, **keys)
        assert devices.remark(settings, writes=True) is None, name
    windowed = transformers.Gemma2Config(sliding_window=16)
    assert "slides over a window" in devices.remark(windowed, writes=True)
    assert "not known" in devices.remark(transformers.MptConfig(), writes=True)
    assert "not known" in devices.remark(transformers.FalconConfig(alibi=True), writes=True)
