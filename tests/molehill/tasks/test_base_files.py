"""A base is its configuration and its weights, and nothing that lies beside them."""

from __future__ import annotations

import json
import pickle
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from molehill import config
from molehill.errors import ModelError
from molehill.tasks.base_model import is_here, load_base

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft reads it

IDS = torch.tensor([[4, 5, 6, 7]])


def load(model):
    base = config.Base.model_validate({"model": str(model), "precision": "fp32", "device": "cpu"})
    return load_base(base, config.Task(kind="causal-lm", max_length=32))


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def adapter(folder):
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    model.save_pretrained(folder)


def generation(folder):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": -5, "eos_token_id": [2, 7]}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('ran')")


def pickles(folder):
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))


def stale(folder):
    save_file({"lm_head.weight": torch.ones(64, 16)}, folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def code(folder):
    change(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize("litter", [adapter, generation, pickles, stale, code])
def test_what_lies_beside_the_weights_changes_nothing(llama_folder, tmp_path, litter):
    clean = load(shutil.copytree(llama_folder, tmp_path / "clean"))
    litter(llama_folder)
    found = load(llama_folder)
    assert type(found.model) is LlamaForCausalLM
    assert [name for name, _ in found.model.named_modules()] == [name for name, _ in clean.model.named_modules()]
    assert torch.equal(found.model(IDS).logits, clean.model(IDS).logits)
    assert found.info.digest == clean.info.digest


def test_of_a_generation_config_only_the_end_tokens_count(llama_folder):
    generation(llama_folder)
    settings = load(llama_folder).model.generation_config
    assert settings.eos_token_id == [2, 7]
    assert settings.temperature != -5
    (llama_folder / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"generation_config.json is damaged"):
        load(llama_folder)


def test_exported_graphs_are_built_from_the_base_alone(llama_folder):
    for litter in (adapter, generation, pickles, stale):
        litter(llama_folder)
    with load(llama_folder).stored.alone() as folder:
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
        assert not {name for name in names if "adapter" in name or "index" in name or name.endswith((".bin", ".py"))}


def test_the_digest_tells_functions_apart(llama_folder):
    digest = load(llama_folder).info.digest
    change(llama_folder, _name_or_path="elsewhere", torch_dtype="float16", transformers_version="1", use_cache=False)
    assert load(llama_folder).info.digest == digest
    change(llama_folder, num_attention_heads=4, num_key_value_heads=4, head_dim=4)
    assert load(llama_folder).info.digest != digest


def test_weights_of_two_models_in_one_index(llama_folder):
    tensors = load_file(llama_folder / "model.safetensors")
    (llama_folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-1.safetensors": names[:4], "model-2.safetensors": names[3:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, llama_folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=rf"{names[3]} is in model-2.safetensors and in another file"):
        load(llama_folder)


@pytest.mark.parametrize("key", ["transformers_weights", "configuration_files", "fusion_config"])
def test_settings_that_lead_elsewhere(llama_folder, key):
    change(llama_folder, **{key: "other.safetensors"})
    with pytest.raises(ModelError, match=f"config.json says {key}"):
        load(llama_folder)


def test_an_adapter_is_no_base(llama_folder):
    adapter(llama_folder)
    (llama_folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter \(adapter_config.json\) and no model"):
        load(llama_folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "int8"}}, "torchao"),
        ({"compression_config": {"format": "pack-quantized"}}, "full precision"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ],
)
def test_quantised_by_its_settings(llama_folder, settings, said):
    change(llama_folder, **settings)
    with pytest.raises(ModelError, match=rf"the base is quantised.*{said}.*Give the full-precision checkpoint"):
        load(llama_folder)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("weight", torch.zeros(16, 16).to(torch.float8_e4m3fn)),
        ("qweight", torch.zeros(2, 16, dtype=torch.int32)),
        ("weight_scale_inv", torch.ones(1, 1)),
    ],
)
def test_quantised_by_its_weights(llama_folder, part, tensor):
    path = llama_folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.0.self_attn.q_proj.{part}"] = tensor
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"quantised \(model.layers.0.self_attn.q_proj.{part} is stored as"):
        load(llama_folder)


def test_what_is_here(llama_folder, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--someone--llama" / "snapshots" / commit
    shutil.copytree(llama_folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    hub = config.Base(model="someone/llama", precision="fp32", device="cpu")
    assert is_here(hub)
    found = load_base(hub, config.Task(kind="causal-lm", max_length=32), offline=True)
    assert (found.info.id, found.info.revision) == ("someone/llama", commit)
    (snapshot / "model.safetensors").unlink()
    assert not is_here(hub)
    assert not is_here(config.Base(model="someone/other"))
