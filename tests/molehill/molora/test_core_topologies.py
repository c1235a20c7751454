"""Blocks, parameter mixing, vectors, shared routes and residuals against what they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, adapted, base, batch, separate, shake

from molehill.errors import ConfigError, ModelError
from molehill.molora.interfaces import Told
from molehill.molora.presets.targets import FFN
from molehill.wire.keys import Key

MLP = {  # first linears, last linear, and the block between them
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", lambda gate, up: F.silu(gate) * up),
    "bert": (("intermediate.dense",), "output.dense", F.gelu),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj", lambda h: F.gelu(h, approximate="tanh")),
}
PREFIX = {"llama": "model.layers", "bert": "encoder.layer", "gpt2": "transformer.h"}


def logits(model, architecture="llama", task=None):
    at = batch(architecture)
    tasks = None if task is None else torch.full((3,), task)
    with torch.no_grad():
        return model(**at, told=Told(task_ids=tasks)).logits


def seen_by(module):
    """Input and output of a module in the last pass."""
    seen = {}
    module.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    return seen


def weights_of(model, name, expert):
    """Frozen weight plus one expert, and the bias."""
    site, tree = model.sites[name], model.tree()
    delta = tree[Key(name, expert, "B")] @ tree[Key(name, expert, "A")]
    return site.weight + torch.from_numpy(delta), site.bias


def assert_close(mine, other):
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


# ---- MixLoRA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixlora_block_is_a_mixture_of_copies_of_the_block(architecture):
    model = separate(shake(adapted(architecture, preset="mixlora", experts=3, rank=2), scale=0.2))
    first, last, activation = MLP[architecture]
    for layer in range(2):
        names = [f"{PREFIX[architecture]}.{layer}.{name}" for name in (*first, last)]
        entry, leave = seen_by(model.sites[names[0]]), seen_by(model.sites[names[-1]])
        logits(model, architecture)
        gate = torch.from_numpy(model.tree()[Key(names[0], "-", "gate.weight")])
        best = (entry["x"] @ gate.T).topk(2)
        weights = torch.zeros(*best.indices.shape[:2], 3).scatter(-1, best.indices, best.values.softmax(-1))
        expected = 0
        for e in range(3):
            hidden = activation(*(F.linear(entry["x"], *weights_of(model, name, f"e{e}")) for name in names[:-1]))
            expected = expected + weights[..., e, None] * F.linear(hidden, *weights_of(model, names[-1], f"e{e}"))
        assert_close(leave["y"], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixing_blocks_is_not_mixing_linears(architecture):
    keys = {"targets": FFN, "experts": 3, "rank": 2, "scope": "block"}
    block, linear = (
        separate(shake(adapted(architecture, topology=topology, **keys), scale=0.2))
        for topology in ("block_ffn", "parallel")
    )
    assert block.layout == linear.layout
    assert (logits(block, architecture) - logits(linear, architecture)).abs().max() > 1e-2


def test_linears_outside_the_block_have_one_plain_lora():
    model = adapted("llama", preset="mixlora")
    outside = {name for name, site in model.sites.items() if site.group is None}
    assert outside == {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}
    assert all(model.expert_ids(model.sites[name]) == ("shared0",) for name in outside)


def test_a_block_needs_all_its_linears():
    with pytest.raises(ConfigError, match="feed-forward block"):
        adapted("llama", topology="block_ffn", targets=("up_proj",))


# ---- Poly and MHR ---------------------------------------------------------------------------------------------------


def tables(model, values):
    with torch.no_grad():
        for group in model.routers.values():
            group.router.scorer.table.copy_(values)
    return model


def test_mixed_parameters_are_one_lora():
    model = shake(adapted("llama", preset="poly", experts=3, rank=2))
    merged, tree = base("llama"), model.tree()
    gates = {}
    for name, group in model.routers.items():
        gate = group.router.scorer.table[0, 0].sigmoid()
        gates[name] = (gate / gate.sum()).tolist()
    for name in model.sites:
        A, B = (sum(g * tree[Key(name, f"e{e}", role)] for e, g in enumerate(gates[name])) for role in "AB")
        with torch.no_grad():
            merged.get_submodule(name).weight += torch.from_numpy(B @ A)
    at = batch()
    with torch.no_grad():
        expected = merged(input_ids=at["input_ids"], attention_mask=at["attention_mask"].long()).logits
    wanted = at["labels"][:, 1:] != -100
    assert_close(logits(model, task=0), expected[:, :-1][wanted])
    by_output = shake(adapted("llama", preset="poly", experts=3, rank=2, mixer="output"))
    assert (logits(by_output, task=0) - logits(model, task=0)).abs().max() > 1e-2


def test_heads_that_do_not_divide_the_features_are_refused():
    with pytest.raises(ConfigError, match=r"5 heads do not divide the 32 features in and 32 out of .*q_proj"):
        adapted("llama", preset="mhr", scorer={"name": "task_table", "splits": 5})


def test_mhr_is_poly_by_block_of_features():
    keys = {"preset": "mhr", "experts": 3, "rank": 2}
    row = torch.randn(1, 1, 3)
    poly = tables(shake(adapted("llama", **keys, scorer={"name": "task_table", "splits": 1})), row)
    same = shake(adapted("llama", **keys))
    same.load({key: value for key, value in poly.tree().items() if key.kind != "gate"})
    assert_close(logits(tables(same, row.expand(1, 4, 3))), logits(poly))
    assert (logits(tables(same, torch.randn(1, 4, 3))) - logits(poly)).abs().max() > 1e-2


def test_parameters_cannot_be_mixed_by_token():
    model = adapted("llama", mixer="param", experts=2)
    with pytest.raises(ConfigError, match="one route per row"):
        logits(model)


# ---- vectors ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_vectors_rescale_the_frozen_output_whatever_the_route(architecture):
    model = shake(adapted(architecture, preset="mov", experts=3))
    site = next(iter(model.sites.values()))
    with torch.no_grad():
        site.bank.v.copy_(torch.linspace(-1, 1, site.site.d_out).expand(3, -1))
        x = torch.randn(2, 5, site.site.d_in)
        expected = F.linear(x, site.weight, site.bias) * (1 + torch.linspace(-1, 1, site.site.d_out))
        assert_close(site(x), expected)


# ---- scopes ----


@pytest.mark.parametrize(("scope", "routes"), [("site", 14), ("block", 4), ("layer", 2), ("model", 1)])
def test_sites_of_a_scope_share_one_route(scope, routes):
    model = shake(adapted("llama", scope=scope, experts=3, rank=2))
    model.state.collect = True
    model.count_tokens(on=True)
    with torch.no_grad():
        forward = model(**batch())
    assert len(model.routers) == len(forward.records) == routes
    assert len({id(record.route) for record in forward.records}) == routes
    assert sum(key.kind == "gate" for key in model.layout) == routes
    mass = {}
    for (name, expert), tokens in model.tokens().items():
        mass.setdefault(name, {})[expert] = tokens
    assert len(mass) == 14
    assert len({tuple(sorted(by_expert.items())) for by_expert in mass.values()}) == routes


def test_a_shared_route_counts_in_gradients_of_its_router():
    """The router's gradient comes through every site of its scope, not only through the one that computed it."""
    model = shake(adapted("llama", scope="model", experts=3, rank=2))
    name, group = next(iter(model.routers.items()))
    others = [site for other, site in model.sites.items() if other != name]
    with torch.no_grad():  # the first site adds nothing, so its own mixture gives the router no gradient
        model.sites[name].bank.Bt.zero_()
    assert others
    model(**batch()).logits.square().sum().backward()
    assert group.router.scorer.weight.grad.abs().max() > 1e-3


def test_a_shared_route_needs_the_width_of_its_first_site():
    model = adapted("llama", scope="block", targets=("up_proj", "down_proj"), experts=2)
    with pytest.raises(ModelError, match="was first reached with 64 features"):
        model.sites["model.layers.0.mlp.down_proj"](torch.zeros(1, 2, 64))


def test_a_shared_route_needs_equal_numbers_of_experts():
    with pytest.raises(ConfigError, match="different numbers of experts"):
        adapted("llama", preset="mola", scope="model")


# ---- residuals ----


@pytest.mark.parametrize("scorer", ["linear", "mixture"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_anchored_router_is_the_shared_one_plus_a_residual(architecture, scorer):
    keys = {"experts": 3, "rank": 2, "scorer": scorer}
    own = shake(adapted(architecture, gate="anchored", **keys))
    shared = adapted(architecture, **keys)
    tree = own.tree()
    shared.load({key: value for key, value in tree.items() if ".residual" not in key.role})
    personal = logits(own, architecture)
    own.use_personal(gate=False, head=False)
    assert torch.equal(logits(own, architecture), logits(shared, architecture))
    assert (personal - logits(own, architecture)).abs().max() > 1e-2
    for key, value in tree.items():
        kind, _, rest = key.role.partition(".residual.")
        if rest:
            whole = next(k for k in tree if k.site == key.site and k.role in (f"{kind}.{rest}", f"{kind}.own.{rest}"))
            shared.load({whole: tree[whole] + value})
    assert_close(logits(shared, architecture), personal)


def test_a_uniform_gate_is_the_mean_of_all_experts():
    model = shake(adapted("llama", experts=3, rank=2))
    model.use_uniform_gate(uniform=True)
    mean = shake(adapted("llama", experts=3, rank=2, selector="dense"))
    with torch.no_grad():
        for group in mean.routers.values():
            group.router.scorer.weight.zero_()
    assert_close(logits(model), logits(mean))
