"""Experts beside whole feed-forward blocks, and the steps that topologies take through them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, adapted, base, batch, separate, shake, training

from molehill.errors import ConfigError, ModelError
from molehill.molora.feed_forward import choose_blocks
from molehill.molora.unwrap import unwrapped

BLOCKS = {"llama": "model.layers.{}.mlp", "gpt2": "transformer.h.{}.mlp", "bert": "encoder.layer.{}"}
TOPOLOGIES = {
    "beside": {"topology": "beside"},
    "chain": {"topology": {"name": "chain", "rounds": 2}, "shared": 1},
    "product": {"topology": "product", "shared": 1, "blend": "by_token"},
    "strata": {"topology": "strata", "selector": {"name": "top_k", "k": 1, "renorm": "none"}},
    "multi_head": {"topology": "multi_head"},
}
every_topology = pytest.mark.parametrize("keys", TOPOLOGIES.values(), ids=TOPOLOGIES)


def built(architecture="llama", **keys):
    return adapted(architecture, **{"experts": 4, "rank": 2, **keys})


def states(model, architecture="llama"):
    given = batch(architecture)
    with torch.no_grad():
        out = model.base(input_ids=given["input_ids"], attention_mask=given["attention_mask"].long())
    return out[0]


def around(model, block):
    """What a block reads and gives, and what it gives without experts."""
    seen = {}
    hook = block.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    states(model)
    hook.remove()
    with unwrapped(model), torch.no_grad():
        return seen["x"], seen["y"], block(seen["x"])


@every_topology
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_starts_as_the_base_bit_for_bit_and_all_of_it_learns(architecture, keys):
    model = training(built(architecture, **keys))
    assert BLOCKS[architecture].format(0) in model.sites
    given = batch(architecture)
    plain = base(architecture)(input_ids=given["input_ids"], attention_mask=given["attention_mask"].long())[0]
    assert torch.equal(states(model, architecture), plain)
    separate(shake(model, scale=0.1))
    forward = model(**given)
    torch.nn.functional.cross_entropy(forward.logits, forward.labels).backward()
    silent = {key.name for key, slot in model.slots.items() if not bool(model.grad[slot.start : slot.stop].any())}
    assert silent <= {key.name for key in model.layout if key.expert.startswith("e")}  # one that nobody was sent to


@every_topology
def test_the_base_is_there_as_it_was(keys):
    model = shake(built("llama", **keys))
    given = batch()
    changed = states(model)
    with unwrapped(model) as frozen, torch.no_grad():
        plain = frozen(input_ids=given["input_ids"], attention_mask=given["attention_mask"].long())[0]
        assert not any(module._forward_pre_hooks for module in frozen.modules())
    assert torch.equal(plain, base("llama")(input_ids=given["input_ids"], attention_mask=given["attention_mask"])[0])
    assert torch.equal(states(model), changed)
    model.state.enabled = False
    assert torch.equal(states(model), plain)


@every_topology
def test_experts_can_change_places(keys):
    one = separate(shake(built("llama", **keys)))
    other = built("llama", **keys)
    order = [1, 0, 2, 3] if keys["topology"] == "strata" else [2, 0, 3, 1]  # within a stratum
    renamed = {f"e{n}": f"e{to}" for n, to in enumerate(order)}
    values = {}
    for key, value in one.tree().items():
        if key.expert in renamed:
            values[key._replace(expert=renamed[key.expert])] = value
        elif key.role == "gate.weight":
            moved = value.copy()
            moved[order] = value
            values[key] = moved
        else:
            values[key] = value
    other.load(values)
    torch.testing.assert_close(states(other), states(one), atol=1e-5, rtol=1e-4)


def test_beside_is_a_sum_of_experts_from_the_input_of_the_block_to_its_output():
    model = shake(built("llama", topology="beside", selector="dense"))
    site = model.sites["model.layers.1.mlp"]
    x, y, frozen = around(model, model.base.model.layers[1].mlp)
    weights = site.group.router.logits(x @ site.group.router.effective("weight").T).softmax(-1)
    factors = [(site.bank.A[site.bank.rows(e)], site.bank.Bt[site.bank.rows(e)]) for e in range(4)]
    wanted = sum(weights[..., e : e + 1] * (x @ A.T @ B * 8.0) for e, (A, B) in enumerate(factors))
    torch.testing.assert_close(y, frozen + wanted, atol=1e-5, rtol=1e-4)


def test_an_expert_of_one_that_is_always_on_is_what_a_routed_one_of_one_is():
    routed = shake(built("llama", topology="beside", experts=1, selector="dense"))
    assert not routed.routers
    always = built("llama", topology="beside", experts=1, shared=1, selector="dense")
    values = {key._replace(expert="shared0"): value for key, value in routed.tree().items()}
    always.load(values)
    torch.testing.assert_close(states(always), states(routed), atol=1e-6, rtol=1e-5)


def copied(to, source):
    """A model with the values of another, as far as it has them."""
    to.load({key: value for key, value in source.tree().items() if key in to.layout})
    return to


@pytest.mark.parametrize(
    "topology",
    [
        {"name": "chain", "rounds": 1},
        {"name": "strata", "strata": 1},
        {"name": "multi_head", "heads": 1, "mixed": False},
    ],
)
def test_the_least_of_each_is_beside_bit_for_bit(topology):
    one = separate(shake(built("llama", topology=topology)))
    assert torch.equal(states(copied(built("llama", topology="beside"), one)), states(one))


def test_rounds_are_no_single_round_of_more_experts_and_all_of_them_move_the_bank():
    chain = separate(shake(built("llama", topology="chain")))
    assert [name for name in chain.routers if "layers.0" in name] == ["model.layers.0.mlp", "model.layers.0.mlp.step2"]
    wide = copied(built("llama", topology="beside", selector={"name": "top_k", "k": 4}), chain)
    assert not torch.allclose(states(chain), states(wide), atol=1e-3)
    for dead in ("model.layers.1.mlp", "model.layers.1.mlp.step2"):  # the bank learns from either round alone
        model = separate(shake(training(built("llama", topology="chain"))))
        with torch.no_grad():
            model.routers[dead].overrides.weights = torch.zeros(4)
        forward = model(**batch())
        torch.nn.functional.cross_entropy(forward.logits, forward.labels).backward()
        slots = [slot for key, slot in model.slots.items() if key.site == "model.layers.1.mlp" and key.role == "B"]
        assert any(bool(model.grad[slot.start : slot.stop].any()) for slot in slots)


def test_a_first_layer_of_one_expert_shifts_the_input_of_the_second():
    model = separate(shake(built("llama", topology={"name": "product", "norm": False})))
    with torch.no_grad():
        for name, group in model.routers.items():
            if not name.endswith("bank2"):
                group.overrides.weights = torch.tensor([1.0, 0, 0, 0])
    site, second = model.sites["model.layers.0.mlp"], model.sites["model.layers.0.mlp.bank2"]
    model.state.collect = True
    x, y, frozen = around(model, model.base.model.layers[0].mlp)
    rows = site.bank.rows(0)
    shift = x @ site.bank.A[rows].T @ site.bank.Bt[rows] * 8.0
    record = next(record for record in model.state.records if record.site.name.endswith("0.mlp.bank2"))
    moved = second.bank.delta(x + shift, y, record.route.weights)
    torch.testing.assert_close(y, frozen + shift + moved, atol=1e-4, rtol=1e-4)


def test_the_second_layer_reads_what_has_the_size_of_the_input():
    model = shake(built("llama", topology="product"), scale=3.0)
    read = []
    bank = model.sites["model.layers.0.mlp.bank2"].bank
    given, bank.delta = bank.delta, lambda x, y0, weights: read.append(x) or given(x, y0, weights)
    seen = []
    model.base.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states(model)
    sizes = [x.float().pow(2).mean(-1) for x in (read[0], seen[0])]
    torch.testing.assert_close(*sizes, atol=1e-4, rtol=1e-3)


def test_strata_only_rise_and_a_token_has_one_expert_to_as_many_as_there_are_strata():
    model = separate(shake(built("llama", **TOPOLOGIES["strata"])), 20.0)
    model.state.collect = True
    states(model)
    first, second = (
        next(record.route for record in model.state.records if record.site.name == name)
        for name in ("model.layers.0.mlp", "model.layers.0.mlp.step2")
    )
    stratum = first.weights.argmax(-1) // 2
    went_on = (second.weights > 0).any(-1)
    assert bool((first.weights > 0).any(-1).all())
    assert torch.equal(went_on, stratum == 0)  # those of the last stratum are done
    assert 0 < int(went_on.sum()) < went_on.numel()
    assert not bool(second.weights[..., :2].any())  # and nobody goes back
    model.count_tokens(on=True)
    states(model)
    mass = [model.tokens()["model.layers.0.mlp", f"e{n}"] for n in range(4)]
    mask = batch()["attention_mask"]
    assert sum(mass) == pytest.approx(float((first.weights + second.weights).sum(-1)[mask].sum()) / 2, rel=1e-5)


def test_parts_of_a_token_are_routed_by_themselves_and_padding_counts_for_none():
    model = separate(shake(built("llama", topology="multi_head")), 20.0)
    model.state.collect = True
    model.count_tokens(on=True)
    states(model)
    record = next(record for record in model.state.records if record.site.name == "model.layers.0.mlp")
    mask = batch()["attention_mask"]
    assert record.route.weights.shape == (3, 7 * 4, 4)
    assert torch.equal(record.mask, mask.repeat_interleave(4, 1))
    chosen = record.route.weights.argmax(-1).view(3, 7, 4)
    assert bool((chosen != chosen[..., :1]).any())
    mass = [model.tokens()["model.layers.0.mlp", f"e{n}"] for n in range(4)]
    assert sum(mass) == pytest.approx(float(mask.sum()), rel=1e-5)  # a token counts once
    assert model.sites["model.layers.0.mlp"].site.d_in * 4 == model.sites["model.layers.0.mlp.bank2"].site.d_in


def test_what_does_not_fit_is_told():
    with pytest.raises(ConfigError, match=r"3 experts cannot be dealt to 2 strata.*molora.experts|molora.experts"):
        built("llama", topology="strata", experts=3)
    with pytest.raises(ConfigError, match="cannot be cut into 5 parts"):
        built("llama", topology={"name": "multi_head", "heads": 5})
    with pytest.raises(ConfigError, match=r"molora\.scope"):
        built("llama", topology="beside", scope="layer")
    with pytest.raises(ModelError, match="no feed-forward block that is meant"):
        built("llama", topology="beside", targets=["q_proj"])
    assert [span.site.name for span in choose_blocks(base("bert"), "all-linear", [1])] == ["encoder.layer.1"]
    assert len(choose_blocks(base("llama"), ["mlp"])) == 2
