"""What every kind of expert, and every mixer of them, must have and do, whoever adds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molehill import registry
from molehill.errors import ConfigError
from molehill.molora.banks import FittedMixer, Modulates, PairBank
from molehill.molora.interfaces import Site
from molehill.molora.peft_folder import _PRODUCTS
from molehill.wire.keys import KINDS
from molehill_export.stacks import stacks

KINDS_OF_EXPERTS = [method.name for method in registry.methods("expert")]
MIXERS = [method.name for method in registry.methods("mixer")]
SITE = Site(0, "layers.0.up", 1, 6, 10)
RANKS = (2, 3, 1)


def bank_of(name, ranks=RANKS, *, shaken=True):
    bank = registry.build("expert", name, site=SITE, ranks=ranks, alpha=4.0)
    init = registry.build("init", "lora")
    for expert in range(bank.n_experts):
        bank.start(expert, init, torch.Generator().manual_seed(expert))
    if shaken:
        with torch.no_grad():
            for parameter in bank.parameters():
                parameter.add_(torch.randn_like(parameter) / 2)
    return bank


def mixer_of(name, *, shaken=True):
    fits = registry.get("mixer", name).target.fits
    mixer = registry.build("mixer", name, **({"site": SITE} if fits else {}))
    if fits and shaken:
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.normal_()
    return mixer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs():
    return torch.randn(2, 3, SITE.d_in), torch.randn(2, 3, SITE.d_out)


@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
def test_it_starts_as_the_base(name):
    x, y0 = inputs()
    delta = bank_of(name, shaken=False).delta(x, y0, torch.full((1, 1, 3), 1 / 3))
    assert torch.equal(delta, torch.zeros(2, 3, SITE.d_out))


@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
def test_parts_are_all_there_is_and_each_is_of_one_expert(name):
    """Zeros in all parts of an expert take away what it says, and nothing of the others."""
    bank, (x, y0) = bank_of(name), inputs()
    before, parts = bank.outputs(x, y0), list(bank.parts())
    assert {part.role.partition(".")[0] for part in parts} <= {*KINDS}
    assert len({(part.expert, part.role) for part in parts}) == len(parts)
    counted = {parameter: torch.zeros(len(value)) for parameter, value in bank.named_parameters()}
    for part in parts:
        counted[part.parameter][part.rows] += 1
    assert all(bool((rows == 1).all()) for rows in counted.values())
    with torch.no_grad():
        for part in parts:
            if part.expert == 1:
                bank.get_parameter(part.parameter)[part.rows] = 0
    after = bank.outputs(x, y0)
    assert torch.equal(after[:, :, 1], torch.zeros(2, 3, SITE.d_out))
    torch.testing.assert_close(after[:, :, [0, 2]], before[:, :, [0, 2]])
    assert float(before.detach()[:, :, 1].abs().max()) > 0


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("ranks", [RANKS, (2, 2, 2)])
@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
def test_the_delta_is_the_weighted_sum_of_outputs(name, ranks, patched):
    bank, (x, y0) = bank_of(name, ranks), inputs()
    if patched and isinstance(bank, PairBank):
        bank.set_patches({e: (torch.randn(p, SITE.d_in), torch.randn(SITE.d_out, p)) for e, p in ((0, 1), (2, 3))})
    outputs = bank.outputs(x, y0)
    assert outputs.shape == (2, 3, bank.n_experts, SITE.d_out)
    for shape in ((1, 1, 3), (2, 1, 3), (2, 3, 3)):
        weights = torch.rand(shape)
        torch.testing.assert_close(bank.delta(x, y0, weights), (outputs * weights.unsqueeze(-1)).sum(2))


@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
def test_it_reads_what_it_says_it_reads(name):
    bank, (x, y0) = bank_of(name), inputs()
    weights = torch.full((1, 1, 3), 1 / 3)
    other = bank.delta(x, torch.randn_like(y0), weights)
    assert torch.equal(other, bank.delta(x, y0, weights)) is not bank.needs_output


@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
def test_factors_are_of_pairs_and_what_peft_reads_has_its_roles(name):
    bank = bank_of(name)
    roles = {part.role for part in bank.parts()}
    assert (bank.kind == "pairs") is isinstance(bank, PairBank)
    assert (roles == {"A", "B"}) is isinstance(bank, PairBank)
    assert {"A", "B"}.isdisjoint(roles) is not isinstance(bank, PairBank)
    assert bank.modulates is isinstance(bank, Modulates)
    known = {"LORA": {"A", "B"}, "IA3": {"dense.v"}} | {name: {*named} for name, named in _PRODUCTS.items()}
    assert bank.peft is None or roles == known[bank.peft]


@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
def test_a_weight_is_what_the_expert_adds_to_the_linear(name):
    bank, (x, y0) = bank_of(name), inputs()
    for expert in range(bank.n_experts):
        found = bank.weight(expert)
        if found is not None:
            weight, bias = found
            torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), bank.outputs(x, y0)[:, :, expert])
    assert found is not None or not isinstance(bank, PairBank)


@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
def test_another_bank_of_the_kind_takes_tensors_as_they_travel(name):
    """What the exporter does: scales absorbed in the tensors, an expert more, whose rows are zeros."""
    bank, (x, y0) = bank_of(name), inputs()
    other = bank.like(SITE, (*bank.ranks, 2 if bank.size else 1))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        for part in bank.parts():
            (same,) = [each for each in other.parts() if (each.expert, each.role) == (part.expert, part.role)]
            assert same.scale == 1.0
            wire = bank.get_parameter(part.parameter)[part.rows] * part.scale
            other.get_parameter(same.parameter)[same.rows] = wire
    weights = torch.rand(2, 3, 4)
    torch.testing.assert_close(other.delta(x, y0, weights), bank.delta(x, y0, weights[..., :3]))


@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
def test_its_tensors_can_go_to_a_device(name):
    """See `molehill.molora.banks.Part`; what is said of experts of three ranks is so of these too."""
    bank = bank_of(name)
    if isinstance(bank, PairBank):  # which go in as products
        return
    for stack in stacks(bank):
        for part in bank.parts():
            if part.role == stack.role:
                value = bank.get_parameter(part.parameter)[part.rows].detach().numpy()
                stored = stack.stored(value.T if part.transposed else value)
                assert stored.shape == stack.empty(bank.ranks[part.expert]).shape
                assert np.array_equal(stored.reshape(value.shape), value)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("ranks", [RANKS, (2, 2, 2)])
@pytest.mark.parametrize("name", KINDS_OF_EXPERTS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_refuses_what_it_does_not_want_and_mixes_what_it_says(mixer, name, ranks, tokens):
    bank, (x, y0), mix = bank_of(name, ranks), inputs(), mixer_of(mixer)
    weights = torch.randn(2, tokens, 3).softmax(-1)
    unmet = {
        "pairs": bank.kind != "pairs",
        "equal_ranks": len({*bank.ranks}) > 1,
        "row_route": tokens > 1,
        "vectors": not bank.modulates,
        "no_shared": False,
    }
    assert mix.fits is isinstance(mix, FittedMixer)
    if any(unmet[wish] for wish in mix.wants):
        with pytest.raises(ConfigError):
            mix(bank, x, y0, weights)
        return
    outputs, made = bank.outputs(x, y0), mix(bank, x, y0, weights)
    assert made.shape == y0.shape
    same = torch.allclose(made, (outputs * weights.unsqueeze(-1)).sum(2), atol=1e-5)
    assert same is (mix.mixes == "outputs")
    assert same or not mix.fused
    alone = torch.tensor([0.0, 1.0, 0.0]).expand(2, tokens, 3)
    kept = torch.allclose(mix(bank, x, y0, alone), outputs[:, :, 1], atol=1e-5)
    assert kept is mix.keeps() is not mix.fits


@pytest.mark.parametrize("name", [name for name in MIXERS if registry.get("mixer", name).target.fits])
def test_a_mixer_that_owners_fit_is_the_sum_of_outputs_before_and_for_all_others(name):
    bank, (x, y0), weights = bank_of("lora"), inputs(), torch.randn(2, 3, 3).softmax(-1)
    plain, start, fitted = bank.delta(x, y0, weights), mixer_of(name, shaken=False), mixer_of(name)
    assert not any(each.any() for each in start.parameters())
    torch.testing.assert_close(start(bank, x, y0, weights), plain)
    assert start.keeps()
    assert not torch.allclose(fitted(bank, x, y0, weights), plain, atol=1e-3)
    fitted.personal = False
    assert torch.equal(fitted(bank, x, y0, weights), plain)
    assert fitted.keeps()


def test_a_bottleneck_without_activation_is_a_lora_with_biases():
    lora, (x, y0) = bank_of("lora"), inputs()
    bank = registry.build(
        "expert", "bottleneck", {"activation": "none", "source": "input"}, site=SITE, ranks=RANKS, alpha=4.0
    )
    with torch.no_grad():
        bank.down.copy_(lora.A)
        bank.up.copy_(lora.Bt * lora.spread.sum(0).unsqueeze(-1))
    weights = torch.rand(2, 3, 3)
    torch.testing.assert_close(bank.delta(x, y0, weights), lora.delta(x, y0, weights))
    with torch.no_grad():
        bank.bias.fill_(1)
        bank.shift.fill_(2)
    biased = bank.outputs(x, y0)
    weight, bias = bank.weight(1)
    torch.testing.assert_close(biased[:, :, 1], torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_a_bottleneck_is_no_linear_function_and_reads_the_frozen_output(activation):
    bank = registry.build("expert", "bottleneck", {"activation": activation}, site=SITE, ranks=(3,), alpha=4.0)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
        bank.bias.zero_()
        bank.shift.zero_()
    (x, y0), one = inputs(), torch.ones(1, 1, 1)
    assert bank.needs_output
    assert bank.weight(0) is None
    both = bank.delta(x, y0, one) + bank.delta(x, -y0, one)
    assert float(both.detach().abs().max()) > 1e-2
    halved = registry.build(
        "expert", "bottleneck", {"activation": activation, "scale": 0.5}, site=SITE, ranks=(3,), alpha=4.0
    )
    halved.load_state_dict(bank.state_dict())
    torch.testing.assert_close(halved.delta(x, y0, one), bank.delta(x, y0, one) / 2)
