"""Combinations that cannot work, found before anything starts, with the reason.

Every rule is a small function of the configuration; `RULES` is the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from molehill import registry
from molehill.config import Config, MethodRef
from molehill.errors import ConfigError, MessageError
from molehill.molora.interfaces import Site
from molehill.secure.fixed import FixedPoint
from molehill.secure.messages import LEAST
from molehill.wire.keys import KINDS
from molehill_server.aggregate import conflicts
from molehill_server.planning.planner import decisions, scopes, select, shares
from molehill_server.privacy.accountant import Accountant
from molehill_server.privacy.draw import Draw


@dataclass(frozen=True)
class Conflict:
    """Things in a configuration that do not go together.

    Attributes:
        verdict: ``refuse`` stops the run, ``warn`` only says so.
        keys: The configuration keys concerned.
        why: The reason.
    """

    verdict: Literal["refuse", "warn"]
    keys: tuple[str, ...]
    why: str

    @property
    def mend(self) -> str:
        """What to do."""
        return "Change one of them." if len(self.keys) > 1 else "Change it."


Rule = Callable[[Config], Iterator[Conflict]]


def check(config: Config) -> list[Conflict]:
    """All conflicts in a configuration, refusals first."""
    found = [conflict for rule in RULES for conflict in rule(config)]
    return sorted(found, key=lambda conflict: conflict.verdict)


def require(config: Config) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        ConfigError: Names the first refusal.
    """
    for conflict in check(config):
        if conflict.verdict == "refuse":
            raise ConfigError(conflict.why, where=" with ".join(conflict.keys), mend=conflict.mend)


def _build(axis: str, ref: MethodRef, **context: Any) -> Any:
    return registry.build(axis, ref.name, ref.params, **context)


def _declared(axis: str, ref: MethodRef, name: str) -> Any:
    return registry.declared(registry.get(axis, ref.name), name)


def _asked(config: Config) -> int:
    """How many clients take part in a round; where that is left to chance, on average and rounded up."""
    pool = [str(number) for number in range(config.data.clients)]
    return math.ceil(Draw.of(config).expected(len(pool), len(select(config, pool, 1, 0))))


def _both_shared(config: Config) -> bool:
    """Whether every client sends both factors in every round (methods that alternate do so with period 2)."""
    return all(decided.A == decided.B == "shared" for decided in (shares(config, 1), shares(config, 2)))


def _sends_nothing(config: Config) -> bool:
    return not any(scope == "shared" for number in (1, 2) for _, scope in scopes(config, number))


def _aggregation(config: Config) -> Iterator[Conflict]:
    """Space, lower and server optimiser must fit each other."""
    for keys, why in conflicts(config.federation):
        yield Conflict("refuse", keys, why)


def _products_need_factors(config: Config) -> Iterator[Conflict]:
    policy, space = config.federation.policy.name, config.federation.space.name
    if not _build("space", config.federation.space).closed and not _both_shared(config):
        yield Conflict(
            "refuse",
            ("federation.policy", "federation.space"),
            f"policy {policy!r} does not send both factors of every client, which the products of space {space!r} are "
            "made of; where one factor is common to all, space 'common' is exact",
        )


def _lowers_rewrite_factors(config: Config) -> Iterator[Conflict]:
    """A factor that is frozen comes from the server anew in every round; one that stays on the clients does not."""
    federation, policy = config.federation, config.federation.policy.name
    scopes = {scope for decided in (shares(config, 1), shares(config, 2)) for scope in (decided.A, decided.B)}
    fits = scopes <= ({"shared", "frozen"} if _build("space", federation.space).common else {"shared"})
    if _build("lower", federation.lower).needs_products and not fits:
        yield Conflict(
            "refuse",
            ("federation.policy", "federation.lower"),
            f"lower {federation.lower.name!r} makes both factors anew, but policy {policy!r} freezes one or keeps it "
            "on the clients, so theirs would no longer belong to the server's",
        )


def _enough_to_judge(config: Config) -> Iterator[Conflict]:
    """A rule against poisoned updates needs a majority of others in every round."""
    least = _build("rule", config.federation.rule).least
    count = _asked(config)
    if count < least:
        yield Conflict(
            "refuse",
            ("federation.rule", "data.clients" if count == config.data.clients else "federation.select"),
            f"rule {config.federation.rule.name!r} needs {least} updates a round to tell which are poisoned, and of "
            f"{config.data.clients} clients {count} take part; choose a smaller f, or more clients",
        )


def _norms_need_products(config: Config) -> Iterator[Conflict]:
    rule, decided = config.federation.rule, shares(config, 1)
    kept = [factor for factor in ("A", "B") if decided.of(factor) == "personal"]
    if kept and _build("rule", rule).needs_pairs:
        yield Conflict(
            "refuse",
            ("federation.policy", "federation.rule"),
            f"rule {rule.name!r} weighs by the norm of B A, but {' and '.join(kept)} never leaves the clients; use "
            "rule 'mean'",
        )


def _common_factor(config: Config) -> Iterator[Conflict]:
    policy, space = config.federation.policy.name, config.federation.space
    fixed = _build("space", space).common
    if not fixed:
        return
    why = ""
    for decided in (shares(config, 1), shares(config, 2)):
        scopes = {"A": decided.A, "B": decided.B}
        if not decided.alike:
            why = "clients of different ranks have no factor in common"
        elif scopes.get(fixed) == "shared" or scopes["A"] == scopes["B"] == "shared":
            why = f"policy {policy!r} trains the factor that must be the same on all clients"
        elif set(scopes.values()) == {"shared", "personal"}:
            why = f"policy {policy!r} lets every client have a factor of its own"
    if why:
        keys = ("federation.policy", "federation.space")
        yield Conflict("refuse", keys, f"space {space.name!r} needs one common factor, but {why}; use space 'factor'")


def _split_gate(config: Config) -> Iterator[Conflict]:
    scorer, keys = config.molora.scorer.name, ("personal.gate", "molora.scorer")
    own = sorted(_declared("scorer", config.molora.scorer, "own"))
    if config.personal.gate == "split" and not own:
        able = [each.name for each in registry.methods("scorer") if registry.declared(each, "own")]
        yield Conflict(
            "refuse",
            keys,
            f"gate 'split' keeps a part of the router on the client, and scorer {scorer!r} names none; of those that "
            f"do there is {', '.join(map(repr, able))}",
        )
    if own and config.personal.gate == "anchored":
        yield Conflict(
            "warn",
            keys,
            f"scorer {scorer!r} has a part of its own to keep on the client ({', '.join(own)}); gate 'split' does "
            "that, while 'anchored' adds a residual to all of it",
        )


def _restart_and_personal_gate(config: Config) -> Iterator[Conflict]:
    if _build("lower", config.federation.lower).restarts and config.personal.gate != "global":
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
    if _declared("mixer", mixer, "mixes") == "parameters" and _build("lower", lower).patches:
        yield Conflict(
            "refuse",
            ("federation.lower", "molora.mixer"),
            f"lower {lower.name!r} patches the products of single experts, but mixer {mixer.name!r} mixes their "
            "factors before it multiplies them; use mixer 'output', or a lower without patches",
        )


def _mixed_parameters(config: Config) -> Iterator[Conflict]:
    scorer, mixer, topology = config.molora.scorer.name, config.molora.mixer.name, config.molora.topology
    parameters = _declared("mixer", config.molora.mixer, "mixes") == "parameters"
    by_token = _declared("scorer", config.molora.scorer, "level") == "token"
    if by_token and "row_route" in _declared("mixer", config.molora.mixer, "wants"):
        yield Conflict(
            "refuse",
            ("molora.mixer", "molora.scorer"),
            f"mixer {mixer!r} makes one adapter per row, but scorer {scorer!r} routes every token on its own; use "
            "scorer 'task_table'",
        )
    if parameters and _declared("topology", topology, "scope") is not None:
        yield Conflict(
            "refuse",
            ("molora.mixer", "molora.topology"),
            f"topology {topology.name!r} mixes the outputs of whole blocks, so mixer {mixer!r} would do nothing; use "
            "mixer 'output', or topology 'parallel'",
        )
    if not parameters and _build("scorer", config.molora.scorer, d_in=1, n_experts=1, n_tasks=1).heads > 1:
        yield Conflict(
            "refuse",
            ("molora.mixer", "molora.scorer"),
            f"every head of scorer {scorer!r} has weights for its own block of A's and B's features, which only a "
            "mixer of parameters mixes; use mixer 'param', or one head",
        )


def _experts_of_one_shape(config: Config) -> Iterator[Conflict]:
    """Parts that stack the experts of a site need LoRAs of one rank; an allocation may also decide how many count."""
    molora = config.molora
    parts = {"molora.mixer": ("mixer", molora.mixer), "molora.topology": ("topology", molora.topology)}
    site = Site(layer=0, name="any", n_layers=1, d_in=1, d_out=1)
    try:
        plan = _build("allocation", molora.allocation).plan([site], molora.experts, molora.shared, molora.rank)["any"]
    except ConfigError as error:
        yield Conflict("refuse", ("molora.allocation", "molora.experts"), error.what)
        return
    selector = molora.selector
    if plan.top_k and not _declared("selector", selector, "takes_k"):
        why = f"allocation {molora.allocation.name!r} needs a selector with k, which {selector.name!r} does not have"
        yield Conflict("refuse", ("molora.allocation", "molora.selector"), f"{why}; use selector 'top_k'")
    for key, (axis, part) in parts.items():
        wants = _declared(axis, part, "wants")
        if "pairs" in wants and _declared("expert", molora.expert, "kind") != "pairs":
            why = f"{part.name!r} works on LoRA factors, which expert {molora.expert.name!r} does not have"
            yield Conflict("refuse", (key, "molora.expert"), f"{why}; use expert 'lora'")
        if "equal_ranks" in wants and len({*plan.ranks, *plan.shared_ranks}) > 1:
            why = f"{part.name!r} stacks the experts of a site, and allocation {molora.allocation.name!r} gives them "
            yield Conflict("refuse", (key, "molora.allocation"), f"{why}different ranks; use allocation 'uniform'")
        if "no_shared" in wants and molora.shared:
            why = f"{part.name!r} has one block per routed expert and none for experts that are always on"
            yield Conflict("refuse", (key, "molora.shared"), f"{why}; set molora.shared to 0")


def _nothing_to_learn(config: Config) -> Iterator[Conflict]:
    policy = config.federation.policy.name
    wanted, left = ([look(config, number) for number in (1, 2)] for look in (decisions, shares))
    trained = {kind for decided in left for kind in KINDS if decided.of(kind) != "frozen"}
    if trained == {"head"} and config.task.kind == "causal-lm":
        yield Conflict("refuse", ("federation.policy", "task.kind"), "a causal language model has no head to train")
    idle = [
        (after.A == after.B == "frozen") and not (before.A == before.B == "frozen")
        for before, after in zip(wanted, left, strict=True)
    ]
    if any(idle):
        yield Conflict(
            "refuse",
            ("federation.policy", "molora.init"),
            f"init {config.molora.init.name!r} freezes the factor that policy {policy!r} trains"
            + ("" if all(idle) else " in every other round"),
        )


def _sends_changes(config: Config) -> Iterator[Conflict]:
    name = config.wire.down.name
    if _build("codec", config.wire.down).feedback:
        yield Conflict(
            "refuse",
            ("wire.down",),
            f"codec {name!r} sends the largest changes and owes the rest; the server sends values, not changes",
        )


def _privacy(config: Config) -> Iterator[Conflict]:
    """The noise is that of a sum of clipped changes, so nothing else may reach the model."""
    if config.privacy.clip is None:
        return
    federation, policy = config.federation, config.federation.policy.name
    decided = shares(config, 1)

    def refuse(key: str, why: str) -> Conflict:
        return Conflict("refuse", ("privacy", key), why)

    if not _build("rule", federation.rule).sums:
        yield refuse(
            "federation.rule",
            f"rule {federation.rule.name!r} looks at single updates to weigh them, so one client can change what all "
            "others count for and no noise of a bounded size hides it; use rule 'mean', which under privacy counts "
            "clients alike",
        )
    if not _build("space", federation.space).closed:
        yield refuse(
            "federation.space",
            f"space {federation.space.name!r} sums products B A, whose size the clip of a change of A and B does not "
            "bound; use space 'common' with a policy that freezes one factor (preset 'ffa'), or space 'factor'",
        )
    if _build("codec", config.wire.up).feedback:
        yield refuse(
            "wire.up",
            f"codec {config.wire.up.name!r} sends later what it left unsent (error feedback): what was clipped away "
            "in one round would come in another; use 'int4', 'int8' or a 16-bit codec",
        )
    if not decided.alike:
        yield refuse(
            "federation.policy",
            f"policy {policy!r} fills up the values of clients of lower rank with zeros, which is no sum of clipped "
            "changes; give all clients one rank",
        )
    if _sends_nothing(config):
        yield refuse("federation.policy", f"policy {policy!r} sends nothing, so there is nothing to protect")
    if not _build("space", federation.space).products and _both_shared(config):
        yield Conflict(
            "warn",
            ("privacy", "federation.policy"),
            f"policy {policy!r} trains both factors, whose noises multiply in B A; presets 'ffa' and 'rolora' keep "
            "one factor without noise",
        )


def _secure_aggregation(config: Config) -> Iterator[Conflict]:
    """A sum of masked vectors says nothing of its parts, so nothing that looks at parts can work."""
    if not config.privacy.secure_aggregation:
        return
    federation, policy = config.federation, config.federation.policy.name

    def refuse(key: str, why: str) -> Conflict:
        return Conflict("refuse", ("privacy.secure_aggregation", key), why)

    if not _build("rule", federation.rule).sums:
        yield refuse(
            "federation.rule",
            f"rule {federation.rule.name!r} looks at single updates to weigh them, and the server sees their sum only; "
            "use rule 'mean'",
        )
    if not _build("space", federation.space).closed:
        yield refuse(
            "federation.space",
            f"space {federation.space.name!r} is made of every client's own factors, and the server sees the sum of "
            "what is sent only; use space 'factor', or 'common' with a policy that freezes one factor",
        )
    if not shares(config, 1).alike:
        yield refuse(
            "federation.policy",
            f"policy {policy!r} has clients send tensors of different shapes, which cannot be added up; give all "
            "clients one rank",
        )
    if _sends_nothing(config):
        yield refuse("federation.policy", f"policy {policy!r} sends nothing, so there is nothing to hide")
    if not _build("codec", config.wire.up).exact:
        yield refuse(
            "wire.up",
            f"codec {config.wire.up.name!r} leaves something out of every number or leaves numbers out, and masked "
            "numbers look random: they travel whole, as 8 bytes each; use 'fp32'",
        )
    for name, given in (("garbage", config.scenario.garbage), ("poison", config.scenario.poison)):
        if given:
            yield refuse(
                f"scenario.{name}",
                f"{name} is put into what clients send, which under secure aggregation nobody can read; nor could the "
                "server tell who sent it",
            )
    yield from _secure_sum(config)


def _secure_sum(config: Config) -> Iterator[Conflict]:
    keys = ("privacy.secure_aggregation", "round.norm_bound")
    if config.privacy.clip is None and config.round.masked_bound is None:
        yield Conflict(
            "refuse",
            keys,
            "the masked sum has room for numbers of a known size only, and nothing bounds them; set round.norm_bound, "
            "which clients then keep themselves",
        )
        return
    asked = _asked(config)
    if asked < LEAST:
        yield Conflict(
            "refuse",
            ("privacy.secure_aggregation", "data.clients" if asked == config.data.clients else "federation.select"),
            f"{asked} clients take part in a round, and a sum hides its parts among {LEAST} or more",
        )
    elif asked == LEAST:
        yield Conflict(
            "warn",
            ("privacy.secure_aggregation", "data.clients" if asked == config.data.clients else "federation.select"),
            f"{asked} clients take part in a round, which are as few as a sum may be of: none may drop out, or the "
            "round is tried again",
        )
    try:
        FixedPoint.of(config, max(asked, LEAST), config.privacy.max_examples or 1)
    except MessageError as error:
        yield Conflict("refuse", keys, error.what)


def _sampling(config: Config) -> Iterator[Conflict]:
    """What a draw is counted as must be what it is; see `Draw`."""
    draw, ref, privacy = Draw.of(config), config.federation.select, config.privacy
    keys = ("privacy.secure_aggregation", "federation.select")
    if privacy.secure_aggregation and draw.sampling == "poisson":
        yield Conflict(
            "refuse",
            keys,
            f"selector {ref.name!r} leaves to chance how many clients take part, and a sum is unmasked among as many "
            "as every client expects; use selector 'all' or 'random'",
        )
    elif privacy.secure_aggregation and privacy.clip is not None and draw.sampling:
        yield Conflict(
            "warn",
            keys,
            f"selector {ref.name!r} is not counted for privacy: a masked sum needs a threshold of the clients that are "
            "drawn, so whether a round counts tells who was",
        )
    if draw.secret and config.round.min_clients > 1:
        yield Conflict(
            "warn",
            ("round.min_clients", "federation.select"),
            f"under privacy with selector {ref.name!r} so many clients must be connected for a round to begin, but how "
            "many answer decides nothing: it would tell who was drawn",
        )
    if draw.secret and draw.expected(config.data.clients, _asked(config)) < 1:
        yield Conflict(
            "warn",
            ("federation.select", "data.clients"),
            f"selector {ref.name!r} draws {draw.expected(config.data.clients, 0):.2g} of {config.data.clients} clients "
            "a round on average, so most rounds are of nobody and add noise only",
        )


def _budget(config: Config) -> Iterator[Conflict]:
    accountant = Accountant.of(config)
    if accountant is None:
        return
    each = Draw.of(config).spent(config.data.clients, _asked(config))
    spent = accountant.epsilon([each] * config.run.rounds)
    if spent > (config.privacy.epsilon or 0.0):
        lasts = accountant.lasts(each, config.run.rounds)
        yield Conflict(
            "refuse",
            ("privacy.epsilon", "run.rounds"),
            f"at noise {config.privacy.noise:g} and delta {config.privacy.delta:g} the budget of epsilon "
            f"{config.privacy.epsilon:g} lasts for {lasts} of {config.run.rounds} rounds, which together spend "
            f"{spent:.3g}",
        )


RULES: tuple[Rule, ...] = (
    _aggregation,
    _products_need_factors,
    _lowers_rewrite_factors,
    _enough_to_judge,
    _norms_need_products,
    _common_factor,
    _split_gate,
    _restart_and_personal_gate,
    _one_expert_at_a_time,
    _mixed_parameters,
    _experts_of_one_shape,
    _nothing_to_learn,
    _sends_changes,
    _privacy,
    _secure_aggregation,
    _sampling,
    _budget,
)
