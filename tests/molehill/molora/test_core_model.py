"""The model as a whole: one flat vector, wire form, patches, token counts and the base behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, WIDTH, adapted, base, batch, presets, shake

from molehill.errors import AdapterError
from molehill.molora.head import Head
from molehill.molora.interfaces import Told
from molehill.wire.keys import Key
from molehill.wire.tree import Layout, Tree

PRESETS = presets()
SITE = "model.layers.0.self_attn.q_proj"


def logits(model, architecture="llama"):
    with torch.no_grad():
        return model(**batch(architecture)).logits


# ---- one flat vector


@pytest.mark.parametrize("preset", PRESETS)
def test_all_that_learns_lies_in_one_vector_and_all_its_gradients_in_another(preset):
    model = shake(adapted("bert", preset=preset, gate="anchored"))
    learns = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learns == {id(parameter) for parameter, _, _ in model.places}
    assert sum(parameter.numel() for parameter, _, _ in model.places) == model.n_parameters == model.layout.size
    model.flat.zero_()
    assert not any(parameter.any() for parameter, _, _ in model.places)
    shake(model)
    model(**batch("bert"), told=Told(task_ids=torch.zeros(3, dtype=torch.long))).logits.square().sum().backward()
    collected = torch.cat([parameter.grad.flatten() for parameter, _, _ in model.places])
    assert torch.equal(collected, model.grad)
    assert torch.count_nonzero(model.grad)
    assert not any(parameter.grad is not None for parameter in model.parameters() if id(parameter) not in learns)


def test_the_start_depends_on_seed_site_and_expert_only():
    one, same, other = (adapted("llama", experts=2, rank=2, seed=seed) for seed in (3, 3, 4))
    assert one.tree().digest == same.tree().digest != other.tree().digest
    more = adapted("llama", experts=3, rank=2, seed=3, targets=("q_proj", "up_proj"))
    for key in (Key(SITE, e, "A") for e in ("e0", "e1")):
        np.testing.assert_array_equal(more.tree()[key], one.tree()[key])


# ---- wire form


@pytest.mark.parametrize("preset", PRESETS)
def test_tree_and_load_are_inverse(preset):
    model = shake(adapted("gpt2", preset=preset, gate="anchored"))
    other = adapted("gpt2", preset=preset, gate="anchored", seed=8)
    other.load(model.tree())
    np.testing.assert_allclose(other.tree().flat, model.tree().flat, rtol=1e-6)
    assert other.tree().layout == model.layout


def test_the_scale_is_absorbed_in_b():
    model = shake(adapted("llama", experts=2, rank=4, alpha=6.0))
    tree, bank = model.tree(), model.sites[SITE].bank
    np.testing.assert_array_equal(tree[Key(SITE, "e1", "A")], bank.A[4:].detach())
    np.testing.assert_allclose(tree[Key(SITE, "e1", "B")], 1.5 * bank.Bt[4:].detach().T, rtol=1e-6)
    assert tree[Key(SITE, "e1", "B")].shape == (WIDTH, 4)


def test_a_part_of_the_tree_can_be_taken_and_loaded():
    model = shake(adapted("llama", experts=2, rank=2))
    before = model.tree()
    part = model.tree(lambda key: key.expert == "e1")
    assert {key.expert for key in part} == {"e1"}
    assert model.tree(part.layout).digest == part.digest
    model.load(Tree(part.layout))
    for key, value in model.tree().items():
        np.testing.assert_array_equal(value, 0 if key.expert == "e1" else before[key])


def test_a_lower_rank_fills_the_first_ranks_and_the_rest_never_learns():
    small, large = (
        shake(adapted("llama", experts=2, rank=2, alpha=2.0)),
        shake(adapted("llama", experts=2, rank=5, alpha=5.0)),
    )
    large.load({key: value for key, value in small.tree().items() if key.kind in {"A", "B"}})
    for key, value in small.tree().items():
        if key.kind in {"A", "B"}:
            wide = large.tree()[key] if key.kind == "A" else large.tree()[key].T
            narrow = value if key.kind == "A" else value.T
            np.testing.assert_allclose(wide[:2], narrow, rtol=1e-6)
            assert not wide[2:].any()
    large.load({key: value for key, value in small.tree().items() if key.kind == "gate"})
    torch.testing.assert_close(logits(large), logits(small), rtol=1e-4, atol=1e-4)
    large(**batch()).logits.square().sum().backward()
    for site in large.sites.values():
        for expert in range(2):
            unused = slice(5 * expert + 2, 5 * expert + 5)
            assert not site.bank.A.grad[unused].any()
            assert not site.bank.Bt.grad[unused].any()
            assert site.bank.Bt.grad[5 * expert : 5 * expert + 2].any()


@pytest.mark.parametrize(
    ("key", "shape", "reason"),
    [
        (Key("nowhere", "e0", "A"), (2, WIDTH), "does not exist"),
        (Key(SITE, "e9", "A"), (2, WIDTH), "does not exist"),
        (Key(SITE, "e0", "A"), (2, WIDTH + 1), "has shape"),
        (Key(SITE, "e0", "A"), (3, WIDTH), "has shape"),
        (Key(SITE, "e0", "B"), (WIDTH, 3), "has shape"),
        (Key(SITE, "-", "gate.weight"), (1, WIDTH), "has shape"),
    ],
)
def test_what_does_not_fit_is_refused(key, shape, reason):
    model = adapted("llama", experts=2, rank=2)
    with pytest.raises(AdapterError, match=reason):
        model.load(Tree(Layout({key: shape})))


# ---- patches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_patch_is_an_addition_to_its_expert(architecture):
    """Adding (A_p, B_p) as a patch is the same as training that expert at a higher rank."""
    patched = shake(adapted(architecture, experts=2, rank=2, alpha=2.0))
    name = list(patched.sites)[1]
    site = patched.sites[name].site
    A, B = np.random.default_rng(0).normal(size=(2, 3, max(site.d_in, site.d_out))).astype(np.float32)
    A, B = A[:, : site.d_in], B[:, : site.d_out].T
    before = logits(patched, architecture)
    patched.set_patches({(name, "e1"): (A, B)})
    merged = adapted(architecture, experts=2, rank=5, alpha=5.0)
    tree = dict(patched.tree())
    tree[Key(name, "e1", "A")] = np.concatenate([tree[Key(name, "e1", "A")], A])
    tree[Key(name, "e1", "B")] = np.concatenate([tree[Key(name, "e1", "B")], B], 1)
    merged.load(tree)
    after = logits(patched, architecture)
    torch.testing.assert_close(after, logits(merged, architecture), rtol=1e-4, atol=1e-4 * float(after.abs().max()))
    assert (after - before).abs().max() > 1e-2
    patched.set_patches({})
    assert torch.equal(logits(patched, architecture), before)


def test_a_patch_for_nobody_is_refused():
    model = adapted("llama", experts=2, rank=2)
    pair = (np.zeros((1, WIDTH), np.float32), np.zeros((WIDTH, 1), np.float32))
    for place in [("nowhere", "e0"), (SITE, "e2")]:
        with pytest.raises(AdapterError, match="patch for"):
            model.set_patches({place: pair})
    with pytest.raises(AdapterError, match="patch for"):
        adapted("llama", preset="mov").set_patches({(SITE, "e0"): pair})


# ---- passes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_is_the_base_and_leaves_no_trace(architecture):
    model, at = shake(adapted(architecture, experts=2, rank=2)), batch(architecture)
    model.state.collect = True
    model.count_tokens(on=True)
    forward = model(**at)
    records, tokens = len(forward.records), model.tokens()
    reference = forward.reference()
    assert not reference.requires_grad
    with torch.no_grad():
        out = base(architecture)(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long())[0]
        if architecture == "bert":
            expected = model.head(model.head.pool(out, at["attention_mask"]))
        else:
            expected = out[:, :-1][at["labels"][:, 1:] != -100]
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
    assert (reference - forward.logits).abs().max() > 1e-2
    assert (len(forward.records), model.tokens()) == (records, tokens)
    assert model.state.enabled


@pytest.mark.parametrize("full", [True, False])
def test_predictions_are_those_of_tokens_with_a_label(full):
    model, at = adapted("llama"), batch()
    labels = at["input_ids"].clone()
    if not full:
        labels[0, :4], labels[1, 2:] = -100, -100
    forward = model(at["input_ids"], torch.ones_like(at["attention_mask"]), labels)
    wanted = labels[:, 1:] != -100
    assert forward.labels.tolist() == labels[:, 1:][wanted].tolist()
    assert forward.rows.tolist() == wanted.nonzero()[:, 0].tolist()
    with torch.no_grad():
        out = base("llama")(input_ids=at["input_ids"]).logits
    torch.testing.assert_close(forward.logits.detach(), out[:, :-1][wanted], rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(forward.logits, forward.labels)
    torch.testing.assert_close(loss.detach(), F.cross_entropy(out[:, :-1].transpose(1, 2), labels[:, 1:]))


@pytest.mark.parametrize("preset", ["molora", "mola", "loramoe", "poly", "mhr", "deepseek"])
def test_counted_mass_is_that_of_real_tokens(preset):
    model, at = shake(adapted("llama", preset=preset)), batch()
    model.state.collect = True
    model.count_tokens(on=True)
    for _ in range(2):
        with torch.no_grad():
            forward = model(**at)
    real = 2 * int(at["attention_mask"].sum())
    counted = model.tokens()
    for record in forward.records:
        weights = record.route.weights
        weights = weights.mean(2) if weights.dim() == 4 else weights
        expected = 2 * (weights.expand(3, 7, -1) * at["attention_mask"].unsqueeze(-1)).sum((0, 1))
        mine = [counted[record.site.name, f"e{e}"] for e in range(len(expected))]
        np.testing.assert_allclose(mine, expected, rtol=1e-4)
        if (record.site.name, "shared0") in counted:
            assert counted[record.site.name, "shared0"] == real
    model.count_tokens(on=True)
    assert not any(model.tokens().values())


# ---- head


def test_pooling_looks_at_real_tokens_only():
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    pooled = {kind: Head(3, 2, kind, anchored=False).pool(hidden, mask) for kind in ("mean", "cls", "last")}
    torch.testing.assert_close(pooled["mean"], torch.stack([hidden[0, :2].mean(0), hidden[1, 1:].mean(0)]))
    assert torch.equal(pooled["cls"], hidden[:, 0])
    assert torch.equal(pooled["last"], torch.stack([hidden[0, 1], hidden[1, 3]]))
