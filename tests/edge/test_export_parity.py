"""Every preset as a graph gives the logits of torch; and the graph reads a text at once or token by token alike."""

from __future__ import annotations

import edge_export
import numpy as np
import pytest
import tiny_models
import torch

from molehill import config
from molehill.errors import ModelError
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.tasks.base_model import load_base
from molehill_export.base import classifier
from molehill_export.molora import choose_slots, gate_values, insert

# Their scorers read what routers in a graph cannot.
READERS = {
    "fedamole": "reads the experts themselves",
    "parrot": "reads the prompt of a text",
    "fedrouter": "reads what the base alone makes of a text",
    **dict.fromkeys(("context_peft", "per_language", "ppap"), "goes by the domain of a text"),
}
PRESETS = [name for name in tiny_models.presets() if name not in READERS]
# (relative error, same prediction) at most and at least; random experts and routers are the worst case of rounding
LIMITS = {
    "llama": {"int8": (0.02, 0.8), "int4": (0.2, 0.6)},
    "minilm": {"int8": (0.08, 0.75), "int4": (0.5, 0.55)},
}
LESS = {"deep_moe": 0.1}  # two layers of experts, of which the second reads what rounding made of the first


def _keys(preset: str, architecture: str) -> dict:
    keys: dict = {"preset": preset}
    if preset == "mola":  # as many steps as the tiny models have layers
        keys["allocation"] = {"name": "by_depth", "experts": (2, 3)}
    if preset in {"loha", "lokr"}:  # of small numbers a product of several says little
        keys["alpha"] = 400.0 if preset == "loha" else 64.0
    return keys | ({"rank": 4} if architecture != "minilm" else {})


def _cases() -> list:
    return [
        pytest.param(architecture, preset, id=f"{architecture}-{preset}")
        for architecture in edge_export.ARCHITECTURES
        for preset in PRESETS
    ]


@pytest.mark.parametrize("preset", sorted(READERS))
def test_a_scorer_that_reads_more_than_its_input_is_refused(preset):
    model, section = edge_export.adapted("llama", **_keys(preset, "llama"))
    with pytest.raises(ModelError, match=READERS[preset]):
        edge_export.session(model, section, "llama")


@pytest.mark.parametrize(("architecture", "preset"), _cases())
def test_every_preset_gives_the_logits_of_torch(architecture, preset):
    model, section = edge_export.adapted(architecture, **_keys(preset, architecture))
    if preset == "mumoe":  # whose f are around 1, and the mean of 64 of them is small
        for site in model.sites.values():
            site.bank.f.data.mul_(10).add_(4)
    ids, mask = edge_export.batch(architecture)
    wanted = edge_export.original(model, ids, mask)
    found = edge_export.exported(edge_export.session(model, section, architecture), ids, mask)
    assert np.abs(found - wanted).max() < 1e-4
    assert edge_export.error(wanted, edge_export.frozen(architecture)) > 1e-3  # the experts count
    if architecture == "gpt2":
        return  # from here on the same code as the other two
    for scheme, (error, agreement) in LIMITS[architecture].items():
        found = edge_export.exported(edge_export.session(model, section, architecture, scheme), ids, mask)
        assert edge_export.error(wanted, found) < error, scheme
        assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= agreement - LESS.get(preset, 0), scheme


@pytest.mark.parametrize("family", list(edge_export.FAMILIES))
def test_families_of_decoders(family):
    model, section = edge_export.adapted(family, targets="all-linear", experts=4, rank=4, scope="layer")
    ids, mask = edge_export.batch(family, tokens=48)
    wanted = edge_export.original(model, ids, mask)
    found = edge_export.exported(edge_export.session(model, section, family), ids, mask)
    assert np.abs(found - wanted).max() < 1e-4
    found = edge_export.exported(edge_export.session(model, section, family, "int4"), ids, mask)
    assert edge_export.error(wanted, found) < 0.2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_decoder_classifies(architecture):
    settings = config.Base(model=str(edge_export.folder(architecture)), precision="fp32", device="cpu")
    task = config.Task(labels=("a", "b", "c"), max_length=16)
    head = Head(64, 3, "last", anchored=False)
    model = wrap(load_base(settings, task).model, config.parse({"molora": {"targets": "all-linear"}}).molora, head=head)
    tiny_models.shake(model.eval(), scale=0.1)
    graph = classifier(load_base(settings, task).model, head, list(model.sites))
    inserted = insert(graph, model, config.MoLoRA().scorer, choose_slots(model, None, 0), "fp32")
    graph.tensors.update(gate_values(model, inserted))
    ids, mask = edge_export.batch(architecture, rows=5)
    found = edge_export.exported(edge_export.opened(graph), ids, mask)
    assert np.abs(found - edge_export.original(model, ids, mask)).max() < 1e-4
    alone = edge_export.exported(edge_export.opened(graph), ids[:1], mask[:1])
    assert np.abs(found[:1] - alone).max() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_text_at_once_equals_token_by_token(architecture):
    model, section = edge_export.adapted(architecture, targets="all-linear", experts=4, rank=4, scope="layer")
    opened = edge_export.session(model, section, architecture)
    ids, _ = edge_export.batch(architecture, rows=2)
    whole = edge_export.exported(opened, ids, torch.ones_like(ids, dtype=torch.bool)).reshape(*ids.shape, -1)
    past = edge_export.no_past(opened, len(ids))
    outputs = [output.name for output in opened.get_outputs() if output.name.startswith(("logits", "present"))]
    for end in (3, *range(4, ids.shape[1] + 1)):  # a first part, then one by one
        start = past["past_key_values.0.key"].shape[2]
        feed = {"input_ids": ids[:, start:end].numpy(), "attention_mask": np.ones((2, end), np.int64), **past}
        found = dict(zip(outputs, opened.run(outputs, feed), strict=True))
        assert np.abs(found["logits"] - whole[:, start:end]).max() < 1e-4
        past = {name.replace("present", "past_key_values"): found[name] for name in outputs if name != "logits"}


def test_overrides_act_as_in_training():
    model, section = edge_export.adapted("llama", targets="all-linear", experts=4, rank=4, scope="layer")
    opened = edge_export.session(model, section, "llama")
    ids, mask = edge_export.batch("llama")
    bias = torch.randn(len(model.routers), 4)
    allowed = torch.tensor([True, False, True, True])
    for row, group in zip(bias, model.routers.values(), strict=True):
        group.overrides.bias, group.overrides.expert_mask = row, allowed
    given = {"router_bias": bias.flatten().numpy(), "expert_mask": allowed.repeat(len(bias)).numpy()}
    before = edge_export.exported(opened, ids, mask)
    found = edge_export.exported(opened, ids, mask, **given)
    assert np.abs(found - edge_export.original(model, ids, mask)).max() < 1e-4
    assert np.abs(found - before).max() > 1e-2


def test_patches_are_part_of_their_experts():
    model, section = edge_export.adapted("llama", targets="all-linear", experts=3, rank=2)
    rng = np.random.default_rng(0)
    for name, site in model.sites.items():
        model.set_patches({})
        A = rng.standard_normal((3, site.site.d_in)).astype(np.float32) * 0.1
        B = rng.standard_normal((site.site.d_out, 3)).astype(np.float32) * 0.1
        site.bank.set_patches({1: (torch.from_numpy(A), torch.from_numpy(B))})
        assert name in model.sites
    ids, mask = edge_export.batch("llama")
    opened = edge_export.session(model, section, "llama")
    assert np.abs(edge_export.exported(opened, ids, mask) - edge_export.original(model, ids, mask)).max() < 1e-4
