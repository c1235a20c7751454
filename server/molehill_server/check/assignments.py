"""Rules about who leans on which experts, and about scorers that somebody has to tell."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from molehill import registry
from molehill.config import Config, MethodRef, parse
from molehill.molora.interfaces import OfK, RouteContext, Site
from molehill.tasks.kind import kind_of
from molehill_server.check.conflict import Conflict, Rule, has_factors, k_of_the_allocation, planned
from molehill_server.planning.planner import decisions, shares


def _preset_with_assignment(config: Config) -> Iterator[Conflict]:
    """A published method that is its assignment would be another one with any other, and nobody would see it."""
    preset, named = config.federation.preset, config.federation.assign
    if preset is None or "assign" not in registry.build("federation", preset):
        return
    published = parse({"federation": {"preset": preset}})
    if published.federation.assign.name == named.name:
        return
    why = (
        f"federation {preset!r} is what its assignment makes of it, and federation.assign names {named.name!r}; leave "
        f"that out, or set federation.assign = {_toml(published.federation.assign)}"
    )
    ours, theirs = config.molora, published.molora
    if ours.preset == theirs.preset == preset:
        both = [(key, getattr(ours, key), getattr(theirs, key)) for key in type(theirs).model_fields]
        methods = [each for each in both if isinstance(each[2], str | MethodRef)]  # others are sizes
        other = [f"molora.{key} = {_toml(value)}" for key, here, value in methods if here != value]
        why += f"; its adapter has {', '.join(other)}, where other values stand here" if other else ""
    yield Conflict("refuse", ("federation.preset", "federation.assign"), why)


def _toml(value: str | MethodRef) -> str:
    """A value as a configuration has it."""
    if isinstance(value, MethodRef) and value.params:
        return f"{{ {', '.join(f'{key} = {json.dumps(each)}' for key, each in value.model_dump().items())} }}"
    return json.dumps(value.name if isinstance(value, MethodRef) else value)


def _assignment(config: Config) -> Iterator[Conflict]:
    """What is decided from single clients' changes needs to see them, and routers that can be told."""
    assign, keys = config.federation.assign, "federation.assign"
    asks = assign.declared("assignment", "asks")
    if not (assign.declared("assignment", "sees") or asks):
        return
    if config.privacy.secure_aggregation or config.privacy.clip is not None:
        key = "privacy.secure_aggregation" if config.privacy.secure_aggregation else "privacy.clip"
        what = "embeddings" if asks else "changes"
        why = f"assignment {assign.name!r} goes by the {what} of single clients, which privacy keeps from the server"
        none = registry.those("assignment", sees=(), asks=False)
        yield Conflict("refuse", (keys, key), f"{why}; use assignment {none}")
    scorer = config.molora.scorer
    if asks and not scorer.declared("scorer", "embeds"):
        why = f"assignment {assign.name!r} goes by embeddings, which scorer {scorer.name!r} does not have"
        yield Conflict("refuse", (keys, "molora.scorer"), f"{why}; use scorer {registry.those('scorer', embeds=True)}")
        return
    if assign.declared("assignment", "gathers") and not scorer.declared("scorer", "settles"):
        why = f"assignment {assign.name!r} goes by where rows lie, which scorer {scorer.name!r} does not find out"
        yield Conflict("refuse", (keys, "molora.scorer"), f"{why}; use scorer {registry.those('scorer', settles=True)}")
        return
    if not assign.declared("assignment", "leans"):
        return
    if scorer.declared("scorer", "leans") is None:
        able = [each.name for each in registry.methods("scorer") if registry.declared(each, "leans") is not None]
        why = f"assignment {assign.name!r} has clients lean on experts, which scorer {scorer.name!r} has no numbers for"
        yield Conflict("refuse", (keys, "molora.scorer"), f"{why}; use scorer {registry.either(able)}")
    elif scorer.declared("scorer", "lean_means") != assign.declared("assignment", "lean_means"):
        meant = registry.those("scorer", lean_means=assign.declared("assignment", "lean_means"))
        why = f"what assignment {assign.name!r} says of experts is not what scorer {scorer.name!r} understands"
        yield Conflict("refuse", (keys, "molora.scorer"), f"{why}; use scorer {meant}")
    elif decisions(config, 1).gate is not None:
        policy = config.federation.policy.name
        why = f"what a client leans on is its own, and policy {policy!r} decides what becomes of whole routers"
        yield Conflict("refuse", (keys, "federation.policy"), f"{why}; use {_without_assignment(config)}")
    elif config.personal.gate not in _keeping(config):
        why = "what a client leans on is its own, and here nothing of a router is"
        yield Conflict("refuse", (keys, "personal.gate"), f"{why}; set personal.gate to anchored or split")


def _without_assignment(config: Config) -> str:
    """What goes where no assignment can, as an advice has it."""
    none, init = registry.those("assignment", leans=False), config.molora.init
    if not init.build("init").alike:
        return f"assignment {none}"
    return f"assignment {none}, and with it another init than {init.name!r}, or nobody ever parts the experts"


def _nobody_places(config: Config) -> Iterator[Conflict]:
    """A scorer with an own expert needs somebody to say which that is."""
    scorer, assign = config.molora.scorer, config.federation.assign
    if scorer.declared("scorer", "lean_means") != "place" or assign.declared("assignment", "leans"):
        return
    able = registry.those("assignment", lean_means="place", gathers=scorer.declared("scorer", "settles"))
    why = (
        f"scorer {scorer.name!r} chooses by which expert is the client's own, and assignment {assign.name!r} gives none"
    )
    yield Conflict("warn", ("molora.scorer", "federation.assign"), f"{why}; use assignment {able}")


def _keeping(config: Config) -> set[str]:
    """Gate policies under which what a client leans on is its own; one that trains apart has no router but that."""
    return {"anchored", "split"} | (
        {"personal"} if not config.federation.assign.declared("assignment", "forms") else set()
    )


def _nobody_gathers(config: Config) -> Iterator[Conflict]:
    """Where rows lie is of use to a router whose experts get places, and it is the same at all sites."""
    scorer, assign, scope = config.molora.scorer, config.federation.assign, config.molora.scope
    if not scorer.declared("scorer", "settles"):
        return
    if assign.declared("assignment", "leans") and not assign.declared("assignment", "gathers"):
        able = registry.those("assignment", gathers=True)
        why = f"scorer {scorer.name!r} chooses by places of experts, which assignment {assign.name!r} gives none"
        yield Conflict("refuse", ("molora.scorer", "federation.assign"), f"{why}; use assignment {able}")
    if scope != "model":
        why = f"scorer {scorer.name!r} says the same at all sites, and with scope {scope!r} every site would tell it"
        yield Conflict("refuse", ("molora.scorer", "molora.scope"), f"{why}; set molora.scope to model")


def _looked_at(config: Config) -> Iterator[Conflict]:
    """What an assignment goes by has to be there, and be sent; where it forms experts, in all rounds alike."""
    assign, molora = config.federation.assign, config.molora
    sees: tuple[str, ...] = assign.declared("assignment", "sees")
    if not sees:
        return
    keys, forms = "federation.assign", assign.declared("assignment", "forms")
    there = {"A", "B"} if has_factors(config) else {"dense"}
    there |= {"head"} if kind_of(config.task).head is not None else set()
    rounds = [shares(config, number) for number in (1, 2)]
    left = "personal" if config.personal.head == "personal" else "shared"
    sent = [kind for kind in sees if all((each.of(kind) or left) == "shared" for each in rounds)]
    what = f"assignment {assign.name!r} goes by the changes of {' or '.join(sees)}"
    if not there & {*sees}:
        why = f"{what}, and expert {molora.expert.name!r} has no such tensor"
        able = registry.those("expert", kind="pairs")
        yield Conflict("refuse", (keys, "molora.expert"), f"{why}; use expert {able}")
    elif not there & {*sent} or (forms and rounds[0] != rounds[1]):
        policy = config.federation.policy.name
        why = f"{what}, and policy {policy!r} does not have clients send them in every round"
        mend = f"use a policy that shares them in all, or {_without_assignment(config)}"
        yield Conflict("refuse", (keys, "federation.policy"), f"{why}; {mend}")
    if forms and len({*planned(molora.allocation, config).ranks}) > 1:
        why = f"assignment {assign.name!r} makes any expert of what clients learnt with one, so all need one rank"
        yield Conflict("refuse", (keys, "molora.allocation"), f"{why}; leave molora.allocation out")
    if assign.declared("assignment", "crosses") and not molora.init.build("init").alike:
        why = f"assignment {assign.name!r} averages experts of different ids, and init {molora.init.name!r} has each "
        able = registry.those("init", alike=True)
        yield Conflict("refuse", (keys, "molora.init"), f"{why}begin with values of its own; use init {able}")


def _never_decided(config: Config) -> Iterator[Conflict]:
    """An assignment that forms experts has to come to it, and to have as many as it trains apart."""
    assign, rounds, experts = config.federation.assign, config.run.rounds, config.molora.experts
    built, keys = assign.build("assignment"), "federation.assign"
    if built.forms and built.warmup > rounds:
        why = (
            f"assignment {assign.name!r} makes experts after round {built.warmup}, of {rounds}, so there would be none"
        )
        yield Conflict("refuse", (keys, "run.rounds"), f"{why}; have more rounds, or a shorter warmup")
    if built.least > experts:
        why = f"assignment {assign.name!r} has every client train {built.least} experts apart, and there are {experts}"
        yield Conflict("refuse", (keys, "molora.experts"), f"{why}; have more experts, or fewer at every client")


def _weighs(selector: MethodRef, wanted: str, experts: int, k: int | None = None) -> bool:
    """Whether a selector, with k experts per token if it is not to be its own number, weighs as a scorer wants it."""
    built, site = selector.build("selector"), Site(layer=0, name="any", n_layers=1, d_in=1, d_out=1)
    if k is not None and isinstance(built, OfK):
        built = built.with_k(k)
    order = torch.arange(experts)
    scores = torch.stack([0.01 * order, -5.0 * order]).unsqueeze(0)  # of a token that is unsure, and one that is not
    best = torch.nn.functional.one_hot(scores.argmax(-1), experts).float()
    right = {"softmax": scores.softmax(-1), "best": best, "logits": scores.clamp(0.0, 1.0)}[wanted]
    found = []
    with torch.random.fork_rng(devices=[]):
        for training in (True, False):
            ctx = RouteContext(x=torch.zeros(1, 2, 1), site=site, training=training)
            found.append(built(scores, ctx).weights)
    return all(torch.allclose(weights, right) for weights in found)


def _weights_of_a_scorer(config: Config) -> Iterator[Conflict]:
    """Logits of some scorers say all there is to say, and no selector is to make something else of them."""
    molora, scorer, selector = config.molora, config.molora.scorer, config.molora.selector
    wanted, experts, key = scorer.declared("scorer", "weighs"), config.molora.experts, "molora.scorer"
    if wanted == "any" or experts == 1:
        return
    means = {
        "softmax": "the softmax of its logits",
        "best": "all for the best expert",
        "logits": "its logits themselves",
    }[wanted]
    what = f"the weights that scorer {scorer.name!r} means are {means}"
    k = k_of_the_allocation(config)
    dealt = {each for number in (1, 2) for each in decisions(config, number).ks}
    if not _weighs(selector, wanted, experts):
        why = f"{what}, which selector {selector.name!r} does not give as it is set"
        yield Conflict("refuse", (key, "molora.selector"), f"{why}; use selector {_weighing(wanted, experts)}")
    elif not _weighs(selector, wanted, experts, k):
        why = f"{what}, and with allocation {molora.allocation.name!r} a token has {k} experts"
        yield Conflict("refuse", (key, "molora.allocation"), f"{why}; leave molora.allocation out")
    elif strange := sorted(each for each in dealt if not _weighs(selector, wanted, experts, each)):
        why = f"{what}, and policy {config.federation.policy.name!r} gives clients {strange[0]} experts per token"
        yield Conflict("refuse", (key, "federation.policy"), f"{why}; use a policy that deals none")


def _weighing(wanted: str, experts: int) -> str:
    """The selectors that weigh as a scorer wants it, as they are by default or with one expert per token."""
    able = []
    for method in registry.methods("selector"):
        plain = MethodRef(name=method.name)
        if _weighs(plain, wanted, experts):
            able.append(repr(method.name))
        elif _weighs(plain, wanted, experts, 1):
            able.append(f"{method.name!r} with k = 1")
    return " or ".join(able)


RULES: tuple[Rule, ...] = (
    _preset_with_assignment,
    _assignment,
    _looked_at,
    _never_decided,
    _weights_of_a_scorer,
    _nobody_gathers,
    _nobody_places,
)
