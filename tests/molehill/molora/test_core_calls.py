"""Linears that run several times in a pass: every call has a route of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import head, shake

from molehill import config
from molehill.errors import ModelError
from molehill.molora.build import wrap
from molehill.molora.interfaces import RouteContext

ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 40,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


def albert():
    """Three layers that are one."""
    return transformers.AlbertModel(
        transformers.AlbertConfig(**ENCODER, embedding_size=16, hidden_dropout_prob=0.0), add_pooling_layer=False
    )


def deberta():
    """Positions go through the projections of queries and keys as well, eight of them."""
    return transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            **ENCODER, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"], share_att_key=True,
            norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
        )
    )  # fmt: skip


BASES = {"albert": albert, "deberta": deberta}


def adapted(name, **keys):
    torch.manual_seed(0)
    section = config.parse({"molora": {"targets": "all-linear", "experts": 3, "rank": 2, **keys}}).molora
    return shake(wrap(BASES[name]().eval(), section, head=head(), seed=0).eval())


def calls_in_a_pass(model, rows, tokens):
    """Input and output of every call of every site, by site."""
    seen = {name: [] for name in model.sites}
    handles = [
        site.register_forward_hook(lambda _m, args, out, name=name: seen[name].append((args[0], out)))
        for name, site in model.sites.items()
    ]
    ids = torch.randint(1, 40, (rows, tokens), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.hidden(ids, torch.ones(rows, tokens, dtype=torch.bool))
    for handle in handles:
        handle.remove()
    return seen


def expected(site, x, routed_by):
    """The output of a site for ``x`` under the route of ``routed_by``, expert by expert."""
    group, bank = site.group, site.bank
    weights = group.router.route(RouteContext(x=routed_by, site=group.site)).weights
    y = F.linear(x, site.weight, site.bias)
    for e in range(bank.n_experts):
        rows = bank.rows(e)
        y = y + weights[..., e : e + 1] * bank.scales[e] * (x @ bank.A[rows].T @ bank.Bt[rows])
    return y


@pytest.mark.parametrize("shape", [(2, 5), (1, 8)], ids=str)  # one row of 8 tokens has the shape of the positions
@pytest.mark.parametrize("name", BASES)
def test_every_call_has_the_route_of_its_own_input(name, shape):
    model = adapted(name, scope="site")
    several = 0
    for site, calls in calls_in_a_pass(model, *shape).items():
        several += len(calls) > 1
        for x, y in calls:
            torch.testing.assert_close(y, expected(model.sites[site], x, x), rtol=1e-4, atol=1e-4)
    assert several == {"albert": 6, "deberta": 6}[name]  # all of the one layer; queries and keys of three


@pytest.mark.parametrize("shape", [(2, 5), (1, 8)], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_sites_that_share_a_route_share_it_call_by_call(name, shape):
    model = adapted(name, scope="layer")
    seen = calls_in_a_pass(model, *shape)
    for site, calls in seen.items():
        first = seen[model.sites[site].group.site.name]
        for number, (x, y) in enumerate(calls):
            torch.testing.assert_close(
                y, expected(model.sites[site], x, first[number][0]), rtol=1e-4, atol=1e-4, msg=f"{site}, call {number}"
            )


@pytest.mark.parametrize("name", BASES)
def test_a_token_counts_once_and_positions_not_at_all(name):
    model = adapted(name, scope="site")
    model.count_tokens(on=True)
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    model.state.collect = True
    with torch.no_grad():
        model.hidden(ids, mask)
    tokens = model.tokens()
    for site in model.sites:
        assert sum(count for (at, _), count in tokens.items() if at == site) == pytest.approx(8, rel=1e-5)
    assert all(record.mask.shape == (2, 5) for record in model.state.records)
    assert model.stackable == (name == "albert")  # positions belong to no client


@pytest.mark.parametrize("name", BASES)
def test_gradients_come_from_every_call(name):
    model = shake(adapted(name, scope="site"), scale=0.05)
    probe = torch.randn(32, generator=torch.Generator().manual_seed(5))

    def total():
        hidden = model.hidden(torch.arange(1, 9).view(1, 8), torch.ones(1, 8, dtype=torch.bool))
        return (hidden.double() * probe).sum()

    total().backward()
    direction = torch.randn(model.flat.shape, generator=torch.Generator().manual_seed(0))
    along, values, sums = float(model.grad @ direction), model.flat.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            model.flat.copy_(values + sign * 1e-5 * direction)
            sums.append(float(total()))
    assert (sums[0] - sums[1]) / 2e-5 == pytest.approx(along, rel=0.1)


def test_one_route_for_linears_on_different_things_is_refused():
    """Only keys, not queries, see the positions here: a route of the layer would come from one and serve the other."""

    class Odd(transformers.BertModel):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            positions = self.embeddings.position_embeddings.weight[None, :7]
            self.encoder.layer[0].intermediate.dense(positions)
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    settings = transformers.BertConfig(**ENCODER)
    section = config.parse({"molora": {"targets": "all-linear", "experts": 2, "rank": 2, "scope": "layer"}}).molora
    with pytest.raises(ModelError, match="does not run on the same rows as"):
        wrap(Odd(settings, add_pooling_layer=False).eval(), section, head=head(), seed=0)
    section = config.parse({"molora": {"targets": "all-linear", "experts": 2, "rank": 2, "scope": "site"}}).molora
    wrap(Odd(settings, add_pooling_layer=False).eval(), section, head=head(), seed=0)


def test_a_route_comes_from_the_site_that_runs_first():
    """Phi-3 defines its output projection before the one of queries, keys and values."""
    settings = transformers.Phi3Config(**ENCODER, num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    section = config.parse({"molora": {"targets": "all-linear", "experts": 2, "rank": 2, "scope": "layer"}}).molora
    model = wrap(transformers.Phi3ForCausalLM(settings).eval(), section, seed=0)
    assert {group.site.name.rpartition(".")[2] for group in model.routers.values()} == {"qkv_proj"}
