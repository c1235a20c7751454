"""What every routing method must have and do, whoever adds it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import partial

import pytest
import torch
from tiny_models import adapted, base, batch, shake

from molehill import registry
from molehill.errors import ConfigError, ModelError
from molehill.molora.interfaces import Adapts, Embeds, RouteRecord, Scorer, Settles, Site
from molehill.molora.steps import BlockTopology

AXES = (
    "expert",
    "scorer",
    "transform",
    "selector",
    "mixer",
    "blend",
    "topology",
    "routing_loss",
    "allocation",
    "init",
    "diagnostic",
    "preset",
)
METHODS = [(axis, method.name) for axis in AXES for method in registry.methods(axis)]


def _of(axis):
    return [name for at, name in METHODS if at == axis]


@pytest.mark.parametrize(("axis", "name"), METHODS)
def test_says_where_it_comes_from_and_what_it_does(axis, name):
    method = registry.get(axis, name)
    assert method.paper
    assert method.url.startswith("https://") or method.paper.startswith("house: ")
    assert all(re.fullmatch(r"[SZ]\d{1,3}", code) for code in method.seeds)
    assert len(method.summary) > 15
    assert inspect.getdoc(inspect.getmodule(method.target))


@pytest.mark.parametrize(("axis", "name"), METHODS)
def test_parameters_are_frozen_documented_and_have_defaults(axis, name):
    params = registry.get(axis, name).params
    instance = params()
    for field in dataclasses.fields(params):
        assert f"{field.name}:" in inspect.getdoc(params)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field.name, None)


@pytest.mark.parametrize("name", _of("scorer"))
def test_scorers(name, context):
    scorer = registry.build("scorer", name, d_in=8, n_experts=5)
    seen = {
        "experts": torch.randn(5, 1, 8),
        "base": torch.randn(2, 8),
        "prompt": torch.rand(2, 4, 9),
        "base_route": torch.rand(2, 3, 5),
    }
    context = partial(context, **{name: value for name, value in seen.items() if name in scorer.reads})
    assert isinstance(scorer, Scorer)
    assert scorer.n_experts == 5
    x, tasks, domains = torch.randn(2, 3, 8), torch.tensor([0, 2]), torch.tensor([[0, 2, -1], [4, 1, 2]])
    context = partial(context, domain_ids=domains)
    z = scorer(context(x=x, task_ids=tasks))
    assert z.shape[-1] == 5
    assert z.shape[0] in {1, 2}
    assert z.shape[1] in {1, 3}
    assert z.dtype == torch.float32
    if scorer.fusable:
        torch.testing.assert_close(z, x @ scorer.weight.T)
    other = scorer(context(x=torch.randn(2, 3, 8), task_ids=tasks))
    assert torch.equal(z, other) is (scorer.level != "token" or bool(scorer.reads & {"domain_ids", "base_route"}))
    moved = scorer(context(x=x, task_ids=torch.tensor([2, 0])))
    assert torch.equal(z, moved) is ("task_ids" not in scorer.reads)
    moved = scorer(context(x=x, task_ids=tasks, domain_ids=domains.flip(0)))
    assert torch.equal(z, moved) is ("domain_ids" not in scorer.reads)
    assert (scorer.level == "token") is (z.shape[1] == 3)
    assert scorer.embeds is isinstance(scorer, Embeds)
    assert scorer.settles is isinstance(scorer, Settles)
    assert scorer.adapts is isinstance(scorer, Adapts)
    assert scorer.own | scorer.fixed <= {part for part, _ in scorer.named_parameters()}
    assert torch.equal(z, scorer(context(x=x, task_ids=tasks)))  # nothing random at inference
    torch.manual_seed(1)
    again = registry.build("scorer", name, d_in=8, n_experts=5).state_dict()
    torch.manual_seed(1)
    same = registry.build("scorer", name, d_in=8, n_experts=5).state_dict()
    assert all(torch.equal(again[key], same[key]) for key in again)


@pytest.mark.parametrize("name", _of("scorer"))
def test_scorers_know_the_axis_of_the_experts(name, context):
    """Experts in another order, along that axis of every parameter, are scored alike."""
    scorer = registry.build("scorer", name, d_in=8, n_experts=5)
    if scorer.ordered:
        assert set(scorer.axes().values()) <= {-1}
        return
    experts = torch.randn(5, 1, 8) if "experts" in scorer.reads else None
    domains = torch.tensor([[0, 2, -1], [4, 1, 2]])
    order = torch.randperm(5)
    ctx = context(x=torch.randn(2, 3, 8), task_ids=torch.tensor([0, 2]), experts=experts, domain_ids=domains)
    ctx.base = torch.randn(2, 8) if "base" in scorer.reads else None
    ctx.prompt = torch.rand(2, 4, 9) if "prompt" in scorer.reads else None
    before = scorer(ctx)
    assert scorer.axes().keys() == {part for part, _ in scorer.named_parameters()}
    with torch.no_grad():
        for part, axis in scorer.axes().items():
            if axis >= 0:
                parameter = scorer.get_parameter(part)
                parameter.copy_(parameter.index_select(axis, order))
    ctx.experts = None if experts is None else experts[order]
    torch.testing.assert_close(scorer(ctx), before[..., order])


@pytest.mark.parametrize("name", _of("transform"))
def test_transforms(name, context):
    transform, z = registry.build("transform", name), torch.randn(2, 3, 5)
    before = z.clone()
    ids = torch.randint(0, 9000, (2, 3))
    context = partial(context, **({"token_ids": ids} if "token_ids" in transform.reads else {}))

    def made(seed, **values):
        torch.manual_seed(seed)
        return transform(z, context(progress=0.5, **values))

    assert made(1).shape == made(1, training=True).shape == z.shape
    assert torch.equal(made(1, training=True), made(2, training=True)) is not transform.random
    assert torch.equal(made(1), made(2))  # nothing random at inference
    assert torch.equal(z, before)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 5), (1, 1, 5), (2, 3, 4, 5), (2, 3, 1)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", _of("selector"))
def test_selectors(name, training, shape, context):
    z, mask = torch.randn(shape), torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    before = z.clone()
    route = registry.build("selector", name)(z, context(training=training, mask=mask))
    assert torch.equal(z, before)
    assert route.weights.shape == route.probs.shape == route.selected.shape == shape
    assert route.selected.dtype == torch.bool
    assert bool((route.weights >= 0).all())
    selector = registry.build("selector", name)
    assert bool((route.weights <= selector.bound + 1e-6).all())
    if not training:
        assert selector.may_close or bool((route.weights.sum(-1) > 0).all())
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(selector(z, context(training=training, mask=mask)).weights)
    assert torch.equal(*drawn) is not (selector.random and training and shape[-1] > 1)
    if selector.per_row and shape[0] > 1 and not (selector.random and training):
        alone = selector(z[:1], context(training=training, mask=mask[:1])).weights
        torch.testing.assert_close(alone, route.weights[:1])
    assert selector.takes_k is any(
        field.name == "k" for field in dataclasses.fields(registry.get("selector", name).params)
    )


@pytest.mark.parametrize("name", [name for name in _of("selector") if registry.build("selector", name).takes_k])
def test_selectors_with_another_k_are_as_if_built_with_it(name, context):
    z, ctx = torch.randn(2, 3, 5), context(training=True, mask=torch.ones(2, 3, dtype=torch.bool))
    one, three = (registry.build("selector", name, {"k": k}) for k in (1, 3))
    torch.manual_seed(0)
    ours = one.with_k(3)(z, ctx)
    torch.manual_seed(0)
    theirs = three(z, ctx)
    assert torch.equal(ours.weights, theirs.weights)
    assert torch.equal(ours.selected, theirs.selected)
    assert bool((one(z, ctx).selected.sum(-1) == 1).all())


def test_a_model_with_another_k_is_as_if_built_with_it():
    def made(k):
        return shake(adapted("llama", experts=4, selector={"name": "top_k", "k": k}))

    model, other, rows = made(1), made(3), batch("llama")
    one, three = (each(**rows).logits for each in (model, other))
    assert not torch.allclose(one, three)
    model.use_k(3)
    assert torch.equal(model(**rows).logits, three)
    model.use_k(None)
    assert torch.equal(model(**rows).logits, one)


def test_a_model_whose_routers_take_no_k_says_so():
    with pytest.raises(ModelError, match=r"a client has 2 experts per token, and the selector of .* takes no such"):
        adapted("llama", experts=4, selector="dense").use_k(2)


# What a part may want of its sites, and a configuration that is not so.
UNMET = {
    "pairs": {"expert": "ia3"},
    "equal_ranks": {"allocation": {"name": "hetero_rank", "kind": "explicit", "ranks": [1, 2, 4, 4]}},
    "no_shared": {"shared": 1},
}


def _in(topology, **keys):
    return adapted("llama", topology=topology, targets="all-linear", experts=4, rank=4, **keys)


@pytest.mark.parametrize("name", _of("topology"))
def test_topologies_have_a_part_for_every_site_and_one_route_where_they_mix(name):
    topology, model = registry.build("topology", name), _in(name, scope="site")
    if isinstance(topology, BlockTopology):
        steps = topology.steps(4)
        assert [block.steps for block in model.blocks] == [steps] * 2
        assert len(model.sites) == 2 * len({step.bank for step in steps})
        assert len(model.routers) == 2 * sum(step.routed for step in steps)
        return
    of_layer = [site for site in model.sites if ".layers.0." in site]
    roles = topology.roles(of_layer)
    assert list(roles) == of_layer
    mixed = [site for site, role in roles.items() if role != "plain"]
    assert (topology.scope == "block") is bool(mixed)
    assert all(model.sites[site].group is model.sites[mixed[0]].group is not None for site in mixed)
    if topology.scope is None:
        assert len(model.routers) == len(model.sites)


@pytest.mark.parametrize("wish", UNMET)
@pytest.mark.parametrize("name", _of("topology"))
def test_topologies_refuse_what_they_cannot_have_and_work_with_all_else(name, wish):
    if wish in registry.build("topology", name).wants:
        with pytest.raises(ConfigError, match=f"topology {name!r} needs "):
            _in(name, **UNMET[wish])
        return
    model, at = _in(name, **UNMET[wish]), batch("llama")
    frozen = base("llama")(at["input_ids"], attention_mask=at["attention_mask"].long()).logits[at["attention_mask"]]

    def logits():
        out = model.base(at["input_ids"], attention_mask=at["attention_mask"].long()).logits
        return out[at["attention_mask"]].detach()

    assert torch.equal(logits(), frozen)
    shake(model)
    assert logits().isfinite().all()
    assert float((logits() - frozen).abs().max()) > 1e-3


@pytest.mark.parametrize("name", _of("routing_loss"))
def test_losses(name, context):
    site, z = Site(0, "a", 1, 8, 8), torch.randn(2, 3, 5, requires_grad=True)
    route = registry.build("selector", "top_k")(z, context())
    record = RouteRecord(site, route, torch.ones(2, 3, dtype=torch.bool), torch.ones(5), torch.tensor([0, 1]))
    loss = registry.build("routing_loss", name)([record, record])
    assert loss.shape == ()
    assert float(loss.detach()) >= 0
    if registry.build("routing_loss", name).of_sites:
        return
    loss.backward()
    assert float(z.grad.abs().sum()) > 0
    alone = registry.build("routing_loss", name)([record])
    torch.testing.assert_close(alone, loss)  # a mean over records, not a sum
    if registry.build("routing_loss", name).ordered:
        return
    order = torch.randperm(5)
    mixed = registry.build("selector", "top_k")(z[..., order], context())
    # rows of a type may have experts of their own, so in another order only rows without one are as before
    others = [RouteRecord(site, each, record.mask, record.costs) for each in (route, mixed)]
    values = [registry.build("routing_loss", name)([other]) for other in others]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("name", _of("init"))
def test_inits(name):
    A, B = torch.ones(4, 16), torch.ones(8, 4)
    init = registry.build("init", name)
    init(A, B, torch.Generator().manual_seed(0))
    assert init.frozen <= {"A", "B"}
    assert float((B @ A).abs().max()) == 0
