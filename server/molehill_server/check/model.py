"""Rules about the adapter: router, experts, and what of them is trained."""

from __future__ import annotations

from collections.abc import Iterator

from molehill import registry
from molehill.config import Config, MethodRef
from molehill.errors import ConfigError
from molehill.plan import scope_of
from molehill.tasks.kind import kind_of
from molehill.wire.keys import KINDS, NO_EXPERT, Key
from molehill_server.check.conflict import Conflict, Rule, has_factors, k_of_the_allocation, planned
from molehill_server.planning.planner import decisions, scopes, shares


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
    mixes = config.molora.mixer.declared("mixer", "mixes")
    by_token = config.molora.scorer.declared("scorer", "level") == "token"
    by_row = [each.name for each in registry.methods("scorer") if registry.declared(each, "level") != "token"]
    if by_token and "row_route" in config.molora.mixer.declared("mixer", "wants"):
        yield Conflict(
            "refuse",
            ("molora.mixer", "molora.scorer"),
            f"mixer {mixer!r} makes one adapter per row, but scorer {scorer!r} routes every token on its own; use "
            f"scorer {registry.either(by_row)}",
        )
    if mixes != "outputs" and topology.declared("topology", "scope") is not None:
        yield Conflict(
            "refuse",
            ("molora.mixer", "molora.topology"),
            f"topology {topology.name!r} mixes the outputs of whole blocks, so mixer {mixer!r} would do nothing; use "
            f"mixer {registry.those('mixer', mixes='outputs')}, or topology {registry.those('topology', scope=None)}",
        )
    if mixes != "parameters" and config.molora.scorer.build("scorer", d_in=1, n_experts=1).heads > 1:
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
        plan = planned(molora.allocation, config)
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
        if "vectors" in wants and not molora.expert.declared("expert", "modulates"):
            why = f"{part.name!r} wants experts with vectors, which expert {molora.expert.name!r} does not have"
            able = registry.those("expert", modulates=True)
            yield Conflict("refuse", (key, "molora.expert"), f"{why}; use expert {able}")
        if "no_shared" in wants and molora.shared:
            why = f"{part.name!r} works on routed experts alone and has no place for experts that are always on"
            yield Conflict("refuse", (key, "molora.shared"), f"{why}; set molora.shared to 0")


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
    elif (k := k_of_the_allocation(config)) is not None:
        allocation = config.molora.allocation.name
        why = f"policy {policy!r} gives clients a number of experts per token, and allocation {allocation!r} has {k}"
        yield Conflict("refuse", ("federation.policy", "molora.allocation"), f"{why}; use one of the two")


def _one_rank(allocation: str, config: Config) -> bool:
    """Whether an allocation as it is by default gives the experts of a site one rank."""
    try:
        plan = planned(MethodRef(name=allocation), config)
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


def _rows_of_which_nothing_is_told(config: Config) -> Iterator[Conflict]:
    scorer = config.molora.scorer
    reads = scorer.build("scorer", d_in=1, n_experts=config.molora.experts).reads
    if "task" not in config.data.columns and "task_ids" in reads:
        yield Conflict(
            "warn",
            ("molora.scorer", "data.columns"),
            f"scorer {scorer.name!r} routes rows by their task, and no column is named as 'task', so all rows get the "
            "mean of all tasks",
        )
    if "domain" not in config.data.columns and "domain_ids" in reads:
        yield Conflict(
            "refuse",
            ("molora.scorer", "data.columns"),
            f"scorer {scorer.name!r} routes by the domain of a row, and no column is named as 'domain'; set "
            "data.columns.domain and data.domains",
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


def _nothing_to_blend(config: Config) -> Iterator[Conflict]:
    blend = config.molora.blend
    if not config.molora.shared and not blend.declared("blend", "plain"):
        why = f"blend {blend.name!r} shares the weight between always-on experts and routed ones, and none is always on"
        yield Conflict("refuse", ("molora.blend", "molora.shared"), f"{why}; set molora.shared")


def _nothing_to_fit(config: Config) -> Iterator[Conflict]:
    """A mixer that owners fit is the sum of outputs where they fit nothing."""
    mixer = config.molora.mixer
    if not mixer.declared("mixer", "fits"):
        return
    kept = scope_of(scopes(config, 1), Key("any", NO_EXPERT, "gate.residual.mix.any")) == "personal"
    if not (kept and config.personal.steps):
        why = f"mixer {mixer.name!r} is what owners fit after the rounds, and here they fit nothing, so that it adds up"
        yield Conflict(
            "warn",
            ("molora.mixer", "personal.gate"),
            f'{why}; set personal.gate to "anchored", and personal.steps above 0',
        )


RULES: tuple[Rule, ...] = (
    _nothing_to_fit,
    _nothing_to_blend,
    _answers,
    _classes,
    _predictions,
    _one_expert_at_a_time,
    _mixed_parameters,
    _experts_of_one_shape,
    _experts_per_token,
    _nothing_to_learn,
    _rows_of_which_nothing_is_told,
    _trains_alone,
)
