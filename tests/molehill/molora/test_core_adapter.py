"""Adapter folders: round trips, plain peft on both sides, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny_models import ARCHITECTURES, adapted, base, batch, presets, shake

from molehill import config
from molehill.errors import AdapterError
from molehill.molora.adapter import Manifest, load_adapter, read_manifest, read_peft, save_adapter
from molehill.molora.interfaces import Told
from molehill.molora.peft_folder import write_peft

PRESETS = presets()
DIGEST = "d" * 64
PEFT_NOISE = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def manifest(architecture, **keys):
    task = "classification" if architecture == "bert" else "causal-lm"
    return Manifest(
        base={"id": "tiny", "digest": DIGEST}, task=task, molora=config.parse({"molora": keys}).molora, ranks={}
    )


def logits(model, architecture):
    with torch.no_grad():
        at, none = batch(architecture), torch.zeros(3, dtype=torch.long)
        return model(**at, told=Told(none, torch.zeros_like(at["input_ids"]))).logits


def patches_for(model, name, expert, rank=2):
    site = model.sites[name].site
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(rank, site.d_in)), rng.normal(size=(site.d_out, rank))
    return {(name, expert): (A.astype(np.float32), B.astype(np.float32))}


# ---- round trips ----


PAIRS = {(preset, ARCHITECTURES[i % 3]) for i, preset in enumerate(PRESETS)} | {("molora", a) for a in ARCHITECTURES}


@pytest.mark.parametrize(("preset", "architecture"), sorted(PAIRS))
def test_save_load_same_logits(tmp_path, preset, architecture):
    model = shake(adapted(architecture, preset=preset))
    model.use_personal(gate=False, head=True)  # what owners fit of a mixer is not in the folder
    save_adapter(tmp_path, model, manifest(architecture, preset=preset))
    read = read_manifest(tmp_path)
    other = adapted(architecture, seed=9, **read.molora.model_dump(exclude_none=True))
    assert not torch.equal(logits(other, architecture), logits(model, architecture))
    load_adapter(tmp_path, other, base_digest=DIGEST)
    torch.testing.assert_close(logits(other, architecture), logits(model, architecture), rtol=1e-5, atol=1e-5)
    # a vector is stored as 1 + v, all else as it is
    kept = model.layout.where(lambda key: not key.residual)
    atol = 2e-7 if preset == "mov" else 0
    np.testing.assert_allclose(other.tree(kept).flat, model.tree(kept).flat, rtol=0, atol=atol)


def test_patches_come_back_as_patches(tmp_path):
    model = shake(adapted("llama", experts=3, rank=2))
    name = "model.layers.1.mlp.up_proj"
    model.set_patches(patches_for(model, name, "e1") | patches_for(model, "model.layers.0.self_attn.q_proj", "e0", 1))
    save_adapter(tmp_path, model, manifest("llama", experts=3, rank=2))
    other = adapted("llama", experts=3, rank=2, seed=9)
    load_adapter(tmp_path, other, base_digest=DIGEST)
    bank = other.sites[name].bank
    assert bank.patch_expert.tolist() == [1, 1]
    assert not bank.patch_A.requires_grad
    torch.testing.assert_close(logits(other, "llama"), logits(model, "llama"), rtol=1e-5, atol=1e-5)


def test_personal_residuals_stay_at_home(tmp_path):
    model = shake(adapted("bert", gate="anchored", experts=2, rank=2))
    save_adapter(tmp_path, model, manifest("bert", experts=2, rank=2))
    names = [*load_file(tmp_path / "router.safetensors"), *load_file(tmp_path / "head.safetensors")]
    assert names
    assert not any("residual" in name for name in names)


# ---- peft on the other side ----


@PEFT_NOISE
@pytest.mark.parametrize("keys", [{"experts": 3, "rank": 2}, {"preset": "hmoe"}, {"preset": "mov", "experts": 3}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_expert_in_plain_peft_is_that_expert_at_weight_one(tmp_path, architecture, keys):
    model = shake(adapted(architecture, **keys))
    name = next(iter(model.sites))
    if keys.get("preset") != "mov":
        model.set_patches(patches_for(model, name, "e1"))
    save_adapter(tmp_path, model, manifest(architecture, **keys))
    for group in model.routers.values():
        group.overrides.expert_mask = torch.arange(group.router.n_experts) == 1
    at = batch(architecture)
    with torch.no_grad():
        mine = model.base(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long())[0]
        plain = peft.PeftModel.from_pretrained(base(architecture), tmp_path / "experts" / "e1").eval()
        other = plain(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long())[0]
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@PEFT_NOISE
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_peft_lora_can_come_in(tmp_path, architecture, rslora):
    last = {"llama": "o_proj", "bert": "value", "gpt2": "c_fc"}[architecture]
    shape = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={last: 2}, alpha_pattern={last: 5},
        use_rslora=rslora, init_lora_weights=False, fan_in_fan_out=architecture == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(base(architecture), shape)
    theirs.save_pretrained(tmp_path)
    factors = read_peft(tmp_path)
    seen = set()
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = factors[name]["A"], factors[name]["B"]
            delta = module.get_delta_weight("default").detach()
            delta = delta.T if architecture == "gpt2" else delta
            torch.testing.assert_close(torch.from_numpy(B @ A), delta, rtol=1e-5, atol=1e-6)
            seen.add(A.shape[0])
    assert seen == {2, 4}
    assert len(factors) == len(adapted(architecture).sites)


def test_readers_without_patterns_find_the_same_adapter(tmp_path):
    """Such as versions of vLLM: the largest rank is r, and the scale is 1 at every linear."""
    rng = np.random.default_rng(0)
    wanted = {f"layers.{rank}.q_proj": (rng.normal(size=(rank, 5)), rng.normal(size=(6, rank))) for rank in (2, 4)}
    expert = {name: {"A": A.astype(np.float32), "B": B.astype(np.float32)} for name, (A, B) in wanted.items()}
    write_peft(tmp_path, "LORA", expert, ("org/base", None), task="CAUSAL_LM", conv=False)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (said["r"], said["lora_alpha"], said["bias"]) == (4, 4, "none")
    assert said["alpha_pattern"] == said["rank_pattern"] == {r"layers\.2\.q_proj": 2}
    assert not {"use_rslora", "use_dora", "modules_to_save"} & said.keys()
    for name, (A, B) in wanted.items():
        found = [tensors.pop(f"base_model.model.{name}.lora_{part}.weight") for part in "BA"]
        np.testing.assert_allclose(found[0] @ found[1], B @ A, rtol=1e-5, atol=1e-6)
    assert not tensors


def test_an_adapter_stored_in_bf16_can_come_in(tmp_path):
    A, B = torch.randn(2, 8).bfloat16(), torch.randn(6, 2).bfloat16()
    name = "base_model.model.layers.0.q_proj"
    save_torch({f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    text = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": null}'
    (tmp_path / "adapter_config.json").write_text(text)
    read = read_peft(tmp_path)["layers.0.q_proj"]
    np.testing.assert_array_equal(read["A"], A.float())
    np.testing.assert_array_equal(read["B"], 2 * B.float())


# ---- what is refused ----


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path, adapted("bert", experts=2, rank=2), manifest("bert", experts=2, rank=2))
    return tmp_path


def load(folder):
    load_adapter(folder, adapted("bert", experts=2, rank=2), base_digest=DIGEST)


def edit(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def replace(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def without_a_site(tensors):
    site = next(iter(tensors)).partition(".lora_")[0]
    for name in [name for name in tensors if name.startswith(site)]:
        del tensors[name]


def wide(tensors):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = np.zeros((2, 5), np.float32)


LORA, ROUTER = "experts/e1", "router.safetensors"
CONFIG, WEIGHTS = f"{LORA}/adapter_config.json", f"{LORA}/adapter_model.safetensors"
NO_MANIFEST, NO_CONFIG = "not a valid adapter description", "not a PEFT configuration"
DAMAGE = {
    "no manifest": (lambda f: (f / "molora.json").unlink(), "no adapter here"),
    "manifest is no JSON": (lambda f: (f / "molora.json").write_text("{"), NO_MANIFEST),
    "manifest is no text": (lambda f: (f / "molora.json").write_bytes(b"\xff\xfe"), NO_MANIFEST),
    "manifest has a foreign key": (lambda f: edit(f / "molora.json", colour="red"), NO_MANIFEST),
    "manifest lacks a key": (lambda f: (f / "molora.json").write_text("{}"), NO_MANIFEST),
    "no expert": (lambda f: shutil.rmtree(f / LORA), "no PEFT adapter here"),
    "expert is no JSON": (lambda f: (f / CONFIG).write_text("nonsense"), NO_CONFIG),
    "expert is a list": (lambda f: (f / CONFIG).write_text("[]"), NO_CONFIG),
    "alpha is text": (lambda f: edit(f / CONFIG, lora_alpha="much"), NO_CONFIG),
    "a pattern is no expression": (lambda f: edit(f / CONFIG, alpha_pattern={"(": 2}), NO_CONFIG),
    "weights are cut": (lambda f: cut(f / WEIGHTS), "not a valid safetensors"),
    "weights are text": (lambda f: (f / WEIGHTS).write_text("hello"), "not a valid safetensors"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "cannot be read"),
    "factors do not fit the site": (lambda f: replace(f / WEIGHTS, wide), "has shape"),
    "a site is missing": (lambda f: replace(f / WEIGHTS, without_a_site), "has no tensors for"),
    "a factor is missing": (lambda f: replace(f / WEIGHTS, lambda t: t.pop(sorted(t)[1])), "do not fit each other"),
    "no router": (lambda f: (f / ROUTER).unlink(), "cannot be read"),
    "router is empty": (lambda f: replace(f / ROUTER, dict.clear), "lacks"),
    "router has bad names": (lambda f: replace(f / ROUTER, lambda t: t.update(x=np.ones(1))), "bad tensor name"),
    "no head": (lambda f: (f / "head.safetensors").unlink(), "cannot be read"),
    "DoRA": (lambda f: edit(f / CONFIG, use_dora=True), "DoRA"),
    "LoRA with biases": (lambda f: edit(f / CONFIG, lora_bias=True), "LoRA biases"),
    "another method": (lambda f: edit(f / CONFIG, peft_type="VERA"), "'VERA' cannot be an expert"),
    "IA3 among LoRAs": (lambda f: edit(f / CONFIG, peft_type="IA3"), "which cannot be part of an expert"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_with_the_reason(folder, damage):
    act, reason = DAMAGE[damage]
    load(folder)
    act(folder)
    with pytest.raises(AdapterError, match=reason):
        load(folder)


def test_a_folder_with_one_other_bit_is_refused_by_name(folder):
    """Also where it is as good an adapter as before: another weight, or another rank."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        at = whole.index(b"tiny") if path.suffix == ".json" else len(whole) - 5
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(AdapterError, match=rf"{path.name}: the file was damaged"):
            load(folder)
        path.write_bytes(whole)
    load(folder)


def test_a_folder_of_an_older_version_has_no_digests(folder):
    path = folder / "molora.json"
    said = json.loads(path.read_text())
    assert len(said.pop("files")) == sum(each.is_file() for each in folder.rglob("*")) == 7
    path.write_text(json.dumps(said))
    load(folder)


def test_another_base_is_refused(folder):
    with pytest.raises(AdapterError, match="weight digest dddddddddddd, this base has eeeeeeeeeeee"):
        load_adapter(folder, adapted("bert", experts=2, rank=2), base_digest="e" * 64)


def test_another_shape_is_refused(folder):
    with pytest.raises(AdapterError):
        load_adapter(folder, adapted("bert", experts=3, rank=2), base_digest=DIGEST)
