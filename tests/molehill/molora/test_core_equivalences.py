"""What a mixture must be equal to: peft's LoRA, its own base, itself with experts renamed, itself in bf16."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, adapted, base, batch, presets, separate, shake, training

from molehill.config import parse
from molehill.molora.interfaces import Told
from molehill.wire.keys import Key
from molehill.wire.tree import Tree

PRESETS = presets()
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def states(model, at):
    """Logits of a decoder, token states of an encoder."""
    return model.base(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long())[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_expert_is_peft_lora(architecture):
    ours = shake(adapted(architecture, preset="lora", rank=4, alpha=8.0))
    theirs = peft.get_peft_model(
        base(architecture),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[architecture], fan_in_fan_out=architecture == "gpt2"),
    ).eval()
    factors = {}
    for name, site in ours.sites.items():
        module = theirs.base_model.model.get_submodule(name)
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(site.bank.A)
            B.copy_(site.bank.Bt.T)
        factors[name] = (A, B)
    assert len(factors) == sum("lora_A" in name for name, _ in theirs.named_parameters())
    at = batch(architecture)
    mine, other = states(ours, at), theirs(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long())[0]
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    probe = torch.randn(mine.shape)
    (mine * probe).sum().backward()
    (other * probe).sum().backward()
    for name, site in ours.sites.items():
        for grad, parameter in ((site.bank.A.grad, factors[name][0]), (site.bank.Bt.grad.T, factors[name][1])):
            size = float(parameter.grad.abs().max())
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("gate", ["global", "anchored"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_start_is_the_base_bit_for_bit(preset, architecture, gate):
    at = batch(architecture)
    with torch.no_grad():
        plain = base(architecture)(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long())[0]
        model = adapted(architecture, preset=preset, gate=gate, seed=5)
        assert torch.equal(states(model, at), plain)
        assert torch.equal(states(training(model), at), plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "preset",
    [
        name
        for name in PRESETS
        if name not in {"hmoe", "fedlease", "fff", "stratified_moe"}
        and parse({"molora": {"preset": name}}).molora.experts > 1
    ],
)  # of unlike ranks; with a router for each; in a tree; in strata
def test_permuting_experts_permutes_weights_and_nothing_else(preset, architecture):
    model = separate(shake(adapted(architecture, preset=preset), scale=0.15))
    at, tasks = batch(architecture), torch.zeros(3, dtype=torch.long)
    before, routes = observed(model, at, tasks)
    tree = model.tree()
    turned = {}
    for key, value in tree.items():
        site = model.sites.get(key.site)
        if key.kind == "gate" and not key.residual:  # what owners fit of a mixer knows no experts
            router = model.routers[key.site].router
            (part,) = [name for name, role in router.roles().items() if role == key.role]
            axis = router.scorer.axes().get(part, -1)  # a blend has none
            turned[key] = value if axis < 0 else np.flip(value, axis)
        elif key.expert.startswith("e"):
            routed = site.bank.n_experts - site.shared
            turned[Key(key.site, f"e{routed - 1 - int(key.expert[1:])}", key.role)] = value
        else:
            turned[key] = value
    model.load(Tree.of(turned))
    after, mirrored = observed(model, at, tasks)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert routes
    for route, mirror in zip(routes, mirrored, strict=True):
        torch.testing.assert_close(mirror.flip(-1), route, rtol=1e-3, atol=1e-4)


def observed(model, at, tasks):
    model.state.collect = True
    with torch.no_grad():
        forward = model(**at, told=Told(task_ids=tasks))
    return forward.logits, [record.route.weights for record in forward.records]


@pytest.mark.parametrize("selector", ["dense", {"name": "top_k", "k": 2}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_in_bf16_point_where_those_in_fp32_do(architecture, selector):
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = shake(adapted(architecture, dtype=dtype, selector=selector, rank=2), scale=0.1)
        for group in model.routers.values():  # no ties that rounding could break
            group.overrides.bias = torch.tensor([0.0, 9.0, 9.0, 0.0])
        forward = model(**batch(architecture))
        F.cross_entropy(forward.logits, forward.labels).backward()
        grads.append(model.grad.clone())
    assert F.cosine_similarity(*grads, dim=0) > 0.99
    assert grads[1].dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture):
    model = shake(adapted(architecture, experts=3, rank=2))
    at = batch(architecture)
    per_token = [name for name, value in at.items() if value.dim() == 2]
    wide = at | {name: F.pad(at[name], (0, 4), value=-100 if name == "labels" else 0) for name in per_token}
    with torch.no_grad():
        torch.testing.assert_close(model(**wide).logits, model(**at).logits, rtol=1e-4, atol=1e-4)
