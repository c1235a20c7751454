"""Rules about the adapter: router, experts, and what of them is trained and stays with a client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch

from molehill import registry
from molehill.config import Config, MethodRef, parse
from molehill.errors import ConfigError
from molehill.molora.interfaces import RouteContext, Site, SitePlan
from molehill.tasks.kind import kind_of
from molehill.wire.keys import KINDS
from molehill_server.check.conflict import Conflict, Rule, has_factors
from molehill_server.planning.planner import decisions, shares


def _split_gate(config: Config) -> Iterator[Conflict]:
    scorer, keys = config.molora.scorer.name, ("personal.gate", "molora.scorer")
    own = sorted(config.molora.scorer.declared("scorer", "own"))
    if config.personal.gate == "split" and not own:
        able = [each.name for each in registry.methods("scorer") if registry.declared(each, "own")]
        yield Conflict(
            "refuse",
            keys,
            f"gate 'split' keeps a part of the router on the client, and scorer {scorer!r} names none; of those that "
            f"do there is {registry.either(able)}",
        )


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
    if forms and len({*_planned(molora.allocation, config).ranks}) > 1:
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
    if k is not None and built.takes_k:
        built = built.with_k(k)
    order = torch.arange(experts)
    scores = torch.stack([0.01 * order, -5.0 * order]).unsqueeze(0)  # of a token that is unsure, and one that is not
    best = torch.nn.functional.one_hot(scores.argmax(-1), experts).float()
    right = {"softmax": scores.softmax(-1), "best": best}[wanted]
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
    means = {"softmax": "the softmax of its logits", "best": "all for the best expert"}[wanted]
    what = f"the weights that scorer {scorer.name!r} means are {means}"
    try:
        k = _planned(molora.allocation, config).top_k
    except ConfigError:
        return  # the allocation is refused by itself
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


def _restart_and_personal_gate(config: Config) -> Iterator[Conflict]:
    restarts = config.federation.lower.build("lower").restarts and has_factors(config)
    if restarts and config.personal.gate != "global":
        yield Conflict(
            "warn",
            ("federation.lower", "personal.gate"),
            "every round the experts move into their patches and start anew, so what a client's own gate has learnt "
            "about them is about the patches",
        )


def _one_expert_at_a_time(config: Config) -> Iterator[Conflict]:
    """A patch is added to what one expert says, which is no sum of parameters."""
    lower = config.federation.lower
    mixer = config.molora.mixer
    patched = has_factors(config) and lower.build("lower").patches
    if patched and mixer.declared("mixer", "mixes") == "parameters":
        yield Conflict(
            "refuse",
            ("federation.lower", "molora.mixer"),
            f"lower {lower.name!r} patches the products of single experts, but mixer {mixer.name!r} mixes their "
            f"factors before it multiplies them; use mixer {registry.those('mixer', mixes='outputs')}, or a lower "
            "without patches",
        )


def _mixed_parameters(config: Config) -> Iterator[Conflict]:
    scorer, mixer, topology = config.molora.scorer.name, config.molora.mixer.name, config.molora.topology
    parameters = config.molora.mixer.declared("mixer", "mixes") == "parameters"
    by_token = config.molora.scorer.declared("scorer", "level") == "token"
    by_row = [each.name for each in registry.methods("scorer") if registry.declared(each, "level") != "token"]
    if by_token and "row_route" in config.molora.mixer.declared("mixer", "wants"):
        yield Conflict(
            "refuse",
            ("molora.mixer", "molora.scorer"),
            f"mixer {mixer!r} makes one adapter per row, but scorer {scorer!r} routes every token on its own; use "
            f"scorer {registry.either(by_row)}",
        )
    if parameters and topology.declared("topology", "scope") is not None:
        yield Conflict(
            "refuse",
            ("molora.mixer", "molora.topology"),
            f"topology {topology.name!r} mixes the outputs of whole blocks, so mixer {mixer!r} would do nothing; use "
            f"mixer {registry.those('mixer', mixes='outputs')}, or topology {registry.those('topology', scope=None)}",
        )
    if not parameters and config.molora.scorer.build("scorer", d_in=1, n_experts=1).heads > 1:
        yield Conflict(
            "refuse",
            ("molora.mixer", "molora.scorer"),
            f"every head of scorer {scorer!r} has weights for its own block of A's and B's features, which only a "
            f"mixer of parameters mixes; use mixer {registry.those('mixer', mixes='parameters')}, or one head",
        )


def _experts_of_one_shape(config: Config) -> Iterator[Conflict]:
    """Parts that stack the experts of a site need LoRAs of one rank; an allocation may also decide how many count."""
    molora = config.molora
    parts = {
        "molora.mixer": ("mixer", molora.mixer),
        "molora.topology": ("topology", molora.topology),
        "molora.scorer": ("scorer", molora.scorer),
    }
    try:
        plan = _planned(molora.allocation, config)
    except ConfigError as error:
        yield Conflict("refuse", ("molora.allocation", "molora.experts"), error.what)
        return
    selector = molora.selector
    if plan.top_k and not selector.declared("selector", "takes_k"):
        able = registry.those("selector", takes_k=True)
        why = f"allocation {molora.allocation.name!r} needs a selector with k, which {selector.name!r} does not have"
        yield Conflict("refuse", ("molora.allocation", "molora.selector"), f"{why}; use selector {able}")
    for key, (axis, part) in parts.items():
        wants = part.declared(axis, "wants")
        if "pairs" in wants and not has_factors(config):
            why = f"{part.name!r} works on LoRA factors, which expert {molora.expert.name!r} does not have"
            yield Conflict(
                "refuse", (key, "molora.expert"), f"{why}; use expert {registry.those('expert', kind='pairs')}"
            )
        if "equal_ranks" in wants and len({*plan.ranks, *plan.shared_ranks}) > 1:
            why = f"{part.name!r} stacks the experts of a site, and allocation {molora.allocation.name!r} gives them "
            able = registry.either(each.name for each in registry.methods("allocation") if _one_rank(each.name, config))
            yield Conflict("refuse", (key, "molora.allocation"), f"{why}different ranks; use allocation {able}")
        if "no_shared" in wants and molora.shared:
            why = f"{part.name!r} has one block per routed expert and none for experts that are always on"
            yield Conflict("refuse", (key, "molora.shared"), f"{why}; set molora.shared to 0")


def _planned(allocation: MethodRef, config: Config) -> SitePlan:
    """What an allocation gives a site."""
    site, molora = Site(layer=0, name="any", n_layers=1, d_in=1, d_out=1), config.molora
    plans: Mapping[str, SitePlan] = allocation.build("allocation").plan(
        [site], molora.experts, molora.shared, molora.rank
    )
    return plans["any"]


def _experts_per_token(config: Config) -> Iterator[Conflict]:
    """A policy may give clients numbers of experts per token, which routers have to heed."""
    policy, selector = config.federation.policy.name, config.molora.selector
    keys = ("federation.policy", "molora.selector")
    if not any(decisions(config, number).ks for number in (1, 2)):
        return
    if not selector.declared("selector", "takes_k"):
        able = registry.those("selector", takes_k=True)
        why = f"policy {policy!r} gives clients a number of experts per token, and selector {selector.name!r} takes "
        yield Conflict("refuse", keys, f"{why}none; use selector {able}")
    elif config.molora.experts == 1:
        why = f"policy {policy!r} gives clients a number of experts per token, of which there is one"
        yield Conflict("refuse", ("federation.policy", "molora.experts"), f"{why}; have more experts")
    elif (k := _k_of_the_allocation(config)) is not None:
        allocation = config.molora.allocation.name
        why = f"policy {policy!r} gives clients a number of experts per token, and allocation {allocation!r} has {k}"
        yield Conflict("refuse", ("federation.policy", "molora.allocation"), f"{why}; use one of the two")


def _k_of_the_allocation(config: Config) -> int | None:
    """Experts per token that the allocation itself gives; None where it leaves them to the selector."""
    try:
        return _planned(config.molora.allocation, config).top_k
    except ConfigError:  # which another rule tells
        return None


def _one_rank(allocation: str, config: Config) -> bool:
    """Whether an allocation as it is by default gives the experts of a site one rank."""
    try:
        plan = _planned(MethodRef(name=allocation), config)
    except ConfigError:
        return False
    return len({*plan.ranks, *plan.shared_ranks}) == 1


def _nothing_to_learn(config: Config) -> Iterator[Conflict]:
    policy = config.federation.policy.name
    wanted, left = ([look(config, number) for number in (1, 2)] for look in (decisions, shares))
    absent = {"dense"} if has_factors(config) else {"A", "B"}
    trained = {kind for decided in left for kind in {*KINDS} - absent if decided.of(kind) != "frozen"}
    if trained == {"head"} and kind_of(config.task).head is None:
        yield Conflict("refuse", ("federation.policy", "task.kind"), "a causal language model has no head to train")
    idle = [
        (after.A == after.B == "frozen") and not (before.A == before.B == "frozen")
        for before, after in zip(wanted, left, strict=True)
    ]
    if has_factors(config) and any(idle):
        yield Conflict(
            "refuse",
            ("federation.policy", "molora.init"),
            f"init {config.molora.init.name!r} freezes the factor that policy {policy!r} trains"
            + ("" if all(idle) else " in every other round"),
        )


def _rows_without_a_task(config: Config) -> Iterator[Conflict]:
    scorer = config.molora.scorer
    if "task" not in config.data.columns and "task_ids" in scorer.build("scorer", d_in=1, n_experts=1).reads:
        yield Conflict(
            "warn",
            ("molora.scorer", "data.columns"),
            f"scorer {scorer.name!r} routes rows by their task, and no column is named as 'task', so all rows get the "
            "mean of all tasks",
        )


def _trains_alone(config: Config) -> Iterator[Conflict]:
    objective, together = config.train.objective, config.engine.together
    if objective.declared("objective", "alone") and together != "auto" and together > 1:
        yield Conflict(
            "warn",
            ("engine.together", "train.objective"),
            f"objective {objective.name!r} cannot be computed for several clients in the same passes, so each trains "
            "by itself",
        )


def _classes(config: Config) -> Iterator[Conflict]:
    objective, balanced = config.train.objective, config.task.class_weights == "balanced"
    by_class = objective.declared("objective", "by_class")
    kind = kind_of(config.task)
    if kind.labelled and kind.predicts == "class":
        if balanced and config.train.batch_size * config.train.accumulation == 1:
            yield Conflict(
                "warn",
                ("task.class_weights", "train.batch_size"),
                "rows are weighed against the others of their step, and a step has one row, so weights change nothing",
            )
        if balanced and by_class:
            yield Conflict(
                "warn",
                ("task.class_weights", "train.objective"),
                f"objective {objective.name!r} makes up for rare classes by itself; with weights that do so too, they "
                "are favoured over common ones",
            )
        return
    if balanced:
        why = f"a {config.task.kind} has no rows of one class each to balance"
        yield Conflict("refuse", ("task.class_weights", "task.kind"), why)
    if by_class:
        yield Conflict(
            "refuse",
            ("train.objective", "task.kind"),
            f"objective {objective.name!r} goes by how often a client has each class, and a {config.task.kind} has "
            f"none; use objective {registry.those('objective', by_class=False)}",
        )


def _predictions(config: Config) -> Iterator[Conflict]:
    objective, wanted = config.train.objective, kind_of(config.task).predicts
    if wanted not in objective.declared("objective", "learns"):
        able = [
            method.name for method in registry.methods("objective") if wanted in registry.declared(method, "learns")
        ]
        why = f"objective {objective.name!r} cannot be computed for {config.task.kind}; use {registry.either(able)}"
        yield Conflict("refuse", ("train.objective", "task.kind"), why)


def _computed_head(config: Config) -> Iterator[Conflict]:
    if config.personal.head_residual != "computed":
        return
    kind, objective, policy = kind_of(config.task), config.train.objective, config.federation.policy.name
    how = f"personal.head {config.personal.head!r}"
    if kind.head is None:
        why = f"a {config.task.kind} has no head of ours, so there is none to compute; leave personal.head out"
        yield Conflict("refuse", ("personal.head", "task.kind"), why)
    elif not kind.convex:
        why = f"{how} computes the best head, and the loss of a {config.task.kind} has no single one"
        yield Conflict("refuse", ("personal.head", "task.kind"), f"{why}; use 'anchored'")
    elif objective.declared("objective", "of_scores") and not objective.declared("objective", "convex"):
        why = f"{how} computes the best head, and objective {objective.name!r} has no single one"
        able = registry.those("objective", convex=True)
        yield Conflict("refuse", ("personal.head", "train.objective"), f"{why}; use 'anchored', or objective {able}")
    if any(decisions(config, number).head is not None for number in (1, 2)):
        why = f"policy {policy!r} decides what becomes of the head, so none is computed"
        yield Conflict("warn", ("personal.head", "federation.policy"), why)


def _answers(config: Config) -> Iterator[Conflict]:
    if not config.evaluate.generate:
        return
    if not kind_of(config.task).writes:
        yield Conflict("refuse", ("evaluate.generate", "task.kind"), f"a {config.task.kind} writes no answers")
    selector, routed = config.molora.selector, config.molora.experts > 1
    if routed and not selector.declared("selector", "causal"):
        why = f"selector {selector.name!r} looks at later tokens, which do not exist while an answer is written"
        able = registry.those("selector", causal=True)
        yield Conflict("refuse", ("evaluate.generate", "molora.selector"), f"{why}; use selector {able}")


def _candidates(config: Config) -> Iterator[Conflict]:
    candidates, held = config.personal.candidates, config.personal.holdout
    if not candidates:
        return
    if not held and len(candidates) > 1:
        why = "candidates are tried on rows that no round sees, and none are set aside; set personal.holdout = 0.2"
        yield Conflict("refuse", ("personal.candidates", "personal.holdout"), why)
    lower = config.federation.lower
    if has_factors(config) and lower.build("lower").patches:
        for name in [each.name for each in candidates if each.declared("candidate", "starts_over")]:
            why = f"lower {lower.name!r} puts what the rounds learnt into patches, which candidate {name!r} is without"
            yield Conflict("refuse", ("personal.candidates", "federation.lower"), f"{why}; leave it out")


def _candidates_of_a_shared_model(config: Config) -> Iterator[Conflict]:
    """Something is made of what all share, which a policy may leave to every owner."""
    if not config.personal.candidates:
        return
    policy, shared = config.federation.policy.name, "there is no model that all share, of which something could be made"
    for part in ("gate", "head") if kind_of(config.task).head is not None else ("gate",):
        decided = {getattr(decisions(config, number), part) for number in (1, 2)}
        if "personal" in decided:
            why = f"policy {policy!r} leaves the {part} to every owner, so {shared}; leave candidates out"
            yield Conflict("refuse", ("personal.candidates", "federation.policy"), why)
        elif None in decided and getattr(config.personal, part) == "personal":
            why = f"with {part} 'personal' {shared}; use 'anchored'"
            yield Conflict("refuse", ("personal.candidates", f"personal.{part}"), why)


def _candidates_with_heads(config: Config) -> Iterator[Conflict]:
    """A candidate that is nothing but a head of the owner's own needs it to have one."""
    heads = [each.name for each in config.personal.candidates if each.declared("candidate", "heads")]
    if kind_of(config.task).head is None:
        return
    policy, claimed = config.federation.policy.name, any(decisions(config, n).head is not None for n in (1, 2))
    for name in heads:
        nothing = f"no owner has one of its own, and candidate {name!r} has no other"
        if claimed:
            why = f"policy {policy!r} decides what becomes of the head, so {nothing}; leave it out"
            yield Conflict("refuse", ("personal.candidates", "federation.policy"), why)
        elif config.personal.head_residual is None:
            why = f"with head {config.personal.head!r} {nothing}; use 'convex', or leave it out"
            yield Conflict("refuse", ("personal.candidates", "personal.head"), why)


RULES: tuple[Rule, ...] = (
    _preset_with_assignment,
    _answers,
    _assignment,
    _candidates,
    _candidates_of_a_shared_model,
    _candidates_with_heads,
    _looked_at,
    _never_decided,
    _weights_of_a_scorer,
    _nobody_gathers,
    _nobody_places,
    _classes,
    _computed_head,
    _predictions,
    _split_gate,
    _restart_and_personal_gate,
    _one_expert_at_a_time,
    _mixed_parameters,
    _experts_of_one_shape,
    _experts_per_token,
    _nothing_to_learn,
    _rows_without_a_task,
    _trains_alone,
)
