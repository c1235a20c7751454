"""A base whose weights stay in their files computes what the loaded one does, to the bit."""

from __future__ import annotations

import pytest
import tiny_models
import tiny_world
import torch
import transformers

from molehill import config
from molehill.molora.build import wrap
from molehill.molora.trial import takes, trial_of
from molehill.tasks import mapped
from molehill.tasks.base_model import load_base

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
IDS = torch.tensor([[4, 5, 6, 7, 9], [8, 3, 2, 1, 1]])


def load(folder, *, streamed):
    base = config.Base(model=str(folder), precision="fp32", device="cpu")
    return load_base(base, config.Task(kind="causal-lm", max_length=32), streamed=lambda _: streamed)


@pytest.fixture(scope="module", params=["untied float32", "tied bfloat16", "untied bfloat16, several files"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("streamed") / "base"
    dtype = torch.bfloat16 if "bfloat16" in request.param else torch.float32
    tied = request.param.startswith("tied")
    tiny_world.save_base(path, "llama", **SIZES, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if "several" in request.param:
        (path / "model.safetensors").unlink()
        model.save_pretrained(path, max_shard_size="30KB")
        assert len(list(path.glob("*.safetensors"))) > 2
    else:
        model.save_pretrained(path)
    return path


def test_it_answers_as_the_loaded_base(folder):
    whole, lean = load(folder, streamed=False), load(folder, streamed=True)
    assert lean.info == whole.info
    assert lean.limit == whole.limit
    stored = {weight.dtype for weight in lean.model.parameters()}
    assert stored == {torch.bfloat16 if "bfloat16" in str(lean.stored.settings) else torch.float32}
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(lean.model(IDS).logits, whole.model(IDS).logits, rtol=0, atol=0)
    assert {weight.dtype for weight in lean.model.parameters()} == stored
    assert trial_of(lean.model) == trial_of(whole.model)
    assert takes(lean.model, 16)
    assert {weight.dtype for weight in lean.model.parameters()} == stored  # also after a pass that was broken off


def test_experts_learn_on_it_as_on_the_loaded_base(folder):
    section = config.parse({"molora": {"targets": "all-linear", "experts": 2, "rank": 2, "scope": "layer"}}).molora
    grads = []
    for streamed in (False, True):
        model = tiny_models.shake(wrap(load(folder, streamed=streamed).model, section), scale=0.1)
        mask = torch.ones_like(IDS, dtype=torch.bool)
        model(IDS, mask, IDS).scores.square().sum().backward()
        grads.append(model.grad.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5 * float(grads[0].abs().max()))


def test_a_base_whose_weights_have_other_names_is_loaded(tmp_path):
    tiny_world.save_base(tmp_path / "base", "gpt2", hidden_size=32)
    inner = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").transformer
    (tmp_path / "base" / "model.safetensors").unlink()
    inner.save_pretrained(tmp_path / "base")  # without the prefix
    whole, lean = (load(tmp_path / "base", streamed=streamed).model for streamed in (False, True))
    assert not lean.transformer.h[0]._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(lean(IDS).logits, whole(IDS).logits, rtol=0, atol=0)


def test_mapped_tensors_are_what_safetensors_reads(folder):
    stored = load(folder, streamed=False).stored
    found = mapped.mapped(stored)
    assert found.keys() == stored.tensors().keys()
    for name, stretch in stored.tensors().items():
        mapped.release()
        torch.testing.assert_close(found[name], stretch[:], rtol=0, atol=0)
