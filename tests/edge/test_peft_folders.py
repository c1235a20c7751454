"""PEFT folders, both ways: what plain peft has saved is taken exactly or refused by name; it opens what we save."""

from __future__ import annotations

import json

import peft
import pytest
import tiny_world
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from molehill.cli import app
from molehill.errors import AdapterError, BundleError
from molehill.molora.unwrap import unwrapped
from molehill_edge import experts
from molehill_edge import manifest as manifests
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]
IDS = torch.tensor([[1, 20, 21, 22, 23, 2]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_world.save_base(tmp_path_factory.mktemp("base") / "llama", "llama", initializer_range=0.2)


def save(base, folder, **keys):
    """What peft saves of a LoRA with factors that are not zero; returns its model."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM",
                "init_lora_weights": False}  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings | keys)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 5}},
        {"use_rslora": True, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"down_proj": 3}},
        {"task_type": None, "target_modules": "all-linear"},
        {"layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "rslora with patterns", "all linear", "one layer"],
)
def test_a_lora_of_peft_is_taken_exactly(base, tmp_path, keys):
    theirs = save(base, tmp_path, **keys)
    ours = open_source(tmp_path)
    with torch.no_grad():
        want = theirs(input_ids=IDS).logits
        found = ours.model.base(input_ids=IDS)[0]
    with torch.no_grad(), unwrapped(ours.model) as base_again:
        plain = base_again(input_ids=IDS).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert (plain - want).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"use_dora": True}, r"DoRA \(use_dora\) cannot be an expert"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules \(modules_to_save: lm_head\) cannot be an expert"),
        ({"bias": "lora_only"}, r"trained biases \(bias = 'lora_only'\)"),
        ({"init_lora_weights": "pissa"}, r"a base that its start has changed \(init_lora_weights = 'pissa'\)"),
        ({"trainable_token_indices": [1, 2]}, r"trained tokens \(trainable_token_indices\)"),
        ({"modules_to_save": ["lm_head", "norm"]}, r"whole modules \(modules_to_save: lm_head, norm\) cannot"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens.*cannot be part of an expert"),
    ],
)  # fmt: skip
def test_what_is_more_than_a_lora_is_refused_by_name(base, tmp_path, keys, why):
    save(base, tmp_path, **keys)
    with pytest.raises(AdapterError, match=why) as caught:
        open_source(tmp_path)
    assert "no adapter here" not in str(caught.value)
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "bundle")])
    assert done.exit_code == 5
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"peft_type": "VERA"}, "peft type 'VERA' cannot be an expert"),
        ({"task_type": "SEQ_CLS"}, "the task SEQ_CLS has no head that could be taken along"),
        ({"use_something_new": True}, "the key 'use_something_new', which this version does not know"),
        ({"base_model_name_or_path": None}, "it does not name its base. Say where it is: --base DIR"),
        ({"base_model_name_or_path": "local:llama"}, "the base 'llama' was a folder. Say where it is: --base DIR"),
    ],
)
def test_other_folders_are_refused_by_name(base, tmp_path, change, why):
    save(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError) as caught:
        open_source(tmp_path)
    assert why in str(caught.value)


def test_an_adapter_of_another_base_is_refused_by_module(base, tmp_path):
    save(base, tmp_path)
    other = tiny_world.save_base(tmp_path / "gpt2", "gpt2")
    with pytest.raises(AdapterError, match=r"it is for another base: .*proj.* matches no linear module"):
        open_source(tmp_path, str(other))


def test_a_lora_of_peft_becomes_a_bundle_and_a_device_says_what_it_takes(base, tmp_path):
    save(base, tmp_path / "lora", use_rslora=True)
    words = ["export", str(tmp_path / "lora"), "--out", str(tmp_path / "bundle"), "--quantize", "fp32"]
    done = CliRunner().invoke(app, [*words, "--expert-files", str(tmp_path / "experts")])
    assert done.exit_code == 0, done.output
    made, _ = manifests.load(tmp_path / "bundle")
    assert [slot.id for slot in made.slots] == ["e0"]
    assert experts.read(tmp_path / "experts/e0.expert.safetensors", made).id == "e0"
    for path in (tmp_path / "lora", tmp_path / "lora/adapter_model.safetensors"):
        with pytest.raises(BundleError, match=r"this is a PEFT folder.*--expert-files DIR"):
            experts.read(path, made)


def test_weights_in_a_pickle_are_refused_with_a_way_out(base, tmp_path):
    save(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle.*save_pretrained"):
        open_source(tmp_path, str(base))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_auto_classes_of_peft_open_an_expert_of_a_run(tmp_path, kind):
    """By the base's folder, which is what a run had; the name of a hub id stays what it is."""
    base = tiny_world.save_base(tmp_path / "base", kind)
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(30, kind))
    causal = {"task": {"kind": "causal-lm", "max_length": 32}, "molora": {"targets": ["q_proj"], "selector": "dense"}}
    simulate(
        tiny_world.config(base, source, run={"rounds": 1}, **(causal if kind == "llama" else {})), tmp_path / "run"
    )
    folder = tmp_path / "run/adapter/experts/e1"
    said = json.loads((folder / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == (str(base.resolve()), None)
    assert str(tmp_path) not in (tmp_path / "run/adapter/molora.json").read_text()
    auto = peft.AutoPeftModelForCausalLM if kind == "llama" else peft.AutoPeftModelForFeatureExtraction
    model = auto.from_pretrained(folder)
    assert any("lora_A" in name for name, _ in model.named_modules())
