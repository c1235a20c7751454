"""Which modules are adapted, and what is said when none is."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import FFN, WIDTH, adapted, base, batch, shake

from molehill.errors import ModelError
from molehill.molora.targets import choose, find_sites
from molehill.molora.trial import trial_of

LAST = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "bert": {"query", "key", "value", "dense"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}


@pytest.mark.parametrize(("architecture", "per_layer"), [("llama", 7), ("bert", 6), ("gpt2", 4)])
def test_all_linear_is_every_linear_inside_the_layers(architecture, per_layer):
    sites = find_sites(base(architecture), "all-linear")
    assert len(sites) == 2 * per_layer  # and neither the LM head nor the embeddings
    assert {site.name.rpartition(".")[2] for site in sites} == LAST[architecture]
    assert [site.layer for site in sites] == [0] * per_layer + [1] * per_layer
    assert {site.n_layers for site in sites} == {2}


def test_shapes_are_those_of_the_product_for_linear_and_conv1d():
    gpt2, llama = (
        {site.name.partition(".0.")[2]: (site.d_in, site.d_out) for site in find_sites(base(model), "all-linear")}
        for model in ("gpt2", "llama")
    )
    assert gpt2["attn.c_attn"] == (WIDTH, 3 * WIDTH)
    assert (gpt2["mlp.c_fc"], gpt2["mlp.c_proj"]) == ((WIDTH, FFN), (FFN, WIDTH))
    assert (llama["self_attn.k_proj"], llama["mlp.down_proj"]) == ((WIDTH, WIDTH // 2), (FFN, WIDTH))


@pytest.mark.parametrize(
    ("architecture", "targets", "expected"),
    [
        ("bert", ("query",), ["attention.self.query"]),
        ("bert", ("attention.output.dense",), ["attention.output.dense"]),
        ("bert", (r"(?<!attention\.)output\.dense",), ["output.dense"]),
        ("bert", ("dense",), ["attention.output.dense", "intermediate.dense", "output.dense"]),
        ("llama", ("q_proj", "self_attn.v_proj"), ["self_attn.q_proj", "self_attn.v_proj"]),
        ("llama", (r"mlp\..*",), ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("llama", r"[qv]_proj", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("gpt2", ("mlp.c_proj",), ["mlp.c_proj"]),
    ],
)
def test_a_pattern_matches_an_end_of_the_path_at_a_dot(architecture, targets, expected):
    names = [site.name for site in find_sites(base(architecture), targets, layers=[1])]
    assert [name.partition(".1.")[2] for name in names] == expected


def test_part_of_a_name_is_no_match():
    with pytest.raises(ModelError):
        find_sites(base("llama"), ("proj",))


@pytest.mark.parametrize("targets", [("nothing",), ("q_proj", "nothing"), "nothing"])
def test_a_pattern_without_a_match_is_an_error_that_lists_what_there_is(targets):
    with pytest.raises(ModelError, match=r"'nothing' matches no linear.*down_proj, gate_proj, k_proj") as caught:
        find_sites(base("llama"), targets)
    assert caught.value.where == "molora.targets"


def test_a_pattern_that_is_no_regular_expression_is_an_error():
    with pytest.raises(ModelError, match=r"'\(' is no regular expression: missing \)") as caught:
        find_sites(base("llama"), ("(",))
    assert caught.value.where == "molora.targets"


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(ModelError, match=r"layers \[7\] hold no target.*The model has 2 layers") as caught:
        find_sites(base("llama"), "all-linear", layers=[7])
    assert caught.value.where == "molora.layers"


def test_only_the_chosen_layers_are_adapted_and_none_below_is_differentiated():
    model = adapted("llama", layers=(1,), experts=2, rank=2)
    assert {site.site.layer for site in model.sites.values()} == {1}
    states = []
    for layer in model.base.model.layers:
        layer.register_forward_hook(lambda _, __, out: states.append(out))
    seen = []
    model.sites["model.layers.1.self_attn.q_proj"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch()).logits.sum().backward()
    assert [state.requires_grad for state in states] == [False, True]
    assert [x.requires_grad for x in seen] == [False]
    assert torch.count_nonzero(model.grad)


def test_even_the_first_layer_needs_no_gradient_of_its_input():
    model = adapted("bert", experts=2, rank=2)
    inputs = {}
    for name, site in model.sites.items():
        site.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].requires_grad}))
    model(**batch("bert")).logits.sum().backward()
    assert sorted(name for name, wanted in inputs.items() if not wanted) == [
        f"encoder.layer.0.attention.self.{name}" for name in ("key", "query", "value")
    ]


class Mixture(torch.nn.Module):
    """Two linear experts, of which a token meets one, and a router with a forward pass of its own."""

    def __init__(self, layer):
        super().__init__()
        width = layer.gate_proj.in_features
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.idle = torch.nn.Linear(width, width)

    def forward(self, x):
        return self.experts[1](x)


def test_an_expert_that_no_token_met_is_adapted_like_its_siblings():
    model = base("llama")
    for layer in model.model.layers:
        layer.mlp = Mixture(layer.mlp)
    choice = choose(model, "all-linear")
    names = {site.name.partition("layers.1.")[2] for site in choice.sites}
    assert {"mlp.experts.0", "mlp.experts.1"} <= names
    assert "mlp.idle" not in names
    assert choice.remarks == ("weights that text never reaches are not adapted: 2 of model.layers.#.mlp.idle",)
    with pytest.raises(ModelError, match=r"matches only modules that text never reaches, such as .*mlp.idle"):
        choose(model, ("idle",))


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("gate_up_proj", r"experts.gate_up_proj, which is one parameter of 4 x 96 x 32 for all experts"),
        (r"mlp\.experts", r"is one parameter of 4 x"),
        ("gate", r"mlp.gate.weight, which is a parameter of 4 x 32, not a linear module"),
        ("lm_head", r"lm_head.weight, which lies outside the transformer layers"),
        ("nothing", r"matches no linear module of the base model"),
    ],
)
def test_why_a_target_is_no_linear_of_the_layers(target, why):
    model = mixtral()
    with pytest.raises(ModelError, match=rf"{why}.*Linear modules in its layers: k_proj, o_proj, q_proj, v_proj"):
        choose(model, (target,))


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            intermediate_size=48, vocab_size=40, max_position_embeddings=64, num_experts_per_tok=2,
        )
    ).eval()  # fmt: skip


def test_only_what_the_targets_name_is_told_of():
    assert choose(mixtral(), ("q_proj",)).remarks == ()
    (remark,) = choose(mixtral(), "all-linear", layers=[1]).remarks
    assert remark.startswith("18,560 of the 21,632 weights in the layers (86%) are not adapted")


def test_a_trial_tells_how_often_and_with_what_a_linear_is_called():
    found = trial_of(base("bert"))
    assert set(found.calls.values()) == {((2, 3),)}
    assert found.learning == found.calls.keys()
    assert (found.width, found.states, found.positions) == (WIDTH, True, 64)
    albert = transformers.AlbertModel(
        transformers.AlbertConfig(
            hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=FFN, vocab_size=40,
            embedding_size=8, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    assert set(trial_of(albert).calls.values()) == {((2, 3),) * 3}
    assert not any(parameter.grad is not None for parameter in albert.parameters())
    assert not any(module._forward_hooks for module in albert.modules())


def test_one_linear_in_two_places_is_refused():
    model = base("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj = first.q_proj
    said = r"layers.0.self_attn.q_proj and model.layers.1.self_attn.q_proj are one module"
    with pytest.raises(ModelError, match=said):
        choose(model, "all-linear")
    assert choose(model, ("v_proj",)).sites  # it is not among these
    first.k_proj = first.v_proj
    with pytest.raises(ModelError, match=r"self_attn.[kv]_proj and \S+self_attn.[kv]_proj are one module"):
        choose(model, ("v_proj", "k_proj"))


def test_rows_of_more_dimensions_are_those_of_one_after_another():
    site = next(iter(shake(adapted("llama", scope="site")).sites.values()))
    x = torch.randn(2, 3, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    site.state.version += 1
    flat = site(x.flatten(0, 2))
    site.state.version += 1
    assert torch.equal(site(x), flat.view(2, 3, 4, -1))
