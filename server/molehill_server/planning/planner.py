"""Turns the configuration into one `ClientPlan` per client and round."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from molehill.config import Config
from molehill.plan import ClientPlan, Scope, Scopes, scope_of
from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.tree import Layout
from molehill_server.planning.assigning import Assignment, Leaning, routed
from molehill_server.planning.shares import Shares

_GATES: dict[str, Scopes] = {
    "anchored": (("*/gate.residual*", "personal"), ("*/gate.own.*", "personal"), ("*/gate*", "shared")),
    "personal": (("*/gate*", "personal"),),
    "global": (("*/gate.residual*", "frozen"), ("*/gate*", "shared")),
    "split": (("*/gate.own.*", "personal"), ("*/gate.residual*", "frozen"), ("*/gate*", "shared")),
}
_BESIDE: Scopes = (("*/head.residual*", "personal"), ("*/head*", "shared"))
_HEADS: dict[str, Scopes] = {
    "anchored": _BESIDE,
    "convex": _BESIDE,
    "personal": (("*/head*", "personal"),),
    "global": (("*/head.residual*", "frozen"), ("*/head*", "shared")),
}


def decisions(config: Config, round_number: int) -> Shares:
    """What the policy decides for this round."""
    decided: Shares = config.federation.policy.build("policy", round_number=round_number)
    return decided


def shares(config: Config, round_number: int) -> Shares:
    """What the policy decides for this round, less what the start values keep frozen (an orthonormal A)."""
    decided = decisions(config, round_number)
    frozen = config.molora.init.build("init").frozen
    return replace(decided, A="frozen" if "A" in frozen else decided.A, B="frozen" if "B" in frozen else decided.B)


def scopes(config: Config, round_number: int) -> Scopes:
    """Patterns over wire names with their scope in this round; the first that matches wins.

    The policy decides on the factors; routers and head follow the ``personal`` section unless the policy claims them.
    Patches are frozen, whatever the policy says of other kinds.
    """
    decided = shares(config, round_number)
    gate = _GATES[config.personal.gate] if decided.gate is None else _whole("gate", decided.gate)
    head = _HEADS[config.personal.head] if decided.head is None else _whole("head", decided.head)
    own, fixed = (config.molora.scorer.declared("scorer", name) for name in ("own", "fixed"))
    still = [f"gate.{name}" for name in sorted(fixed - own)]
    still += [role for role in (f"gate.own.{name}" for name in sorted(fixed & own)) if _sends(gate, role)]
    gate = (*((f"*/{role}", "frozen") for role in still), *gate)
    experts: Scopes = (("*/A", decided.A), ("*/B", decided.B), ("*/dense*", decided.dense))
    return (*experts, *gate, *head, ("*/patch.*", "frozen"), ("*", decided.other))


def _sends(patterns: Scopes, role: str) -> bool:
    return scope_of(patterns, Key("any", NO_EXPERT, role)) == "shared"


def _whole(kind: str, scope: Scope) -> Scopes:
    """One scope for a router or head that a policy claims; a residual beside it would be a second copy."""
    return ((f"*/{kind}.residual*", "frozen"), (f"*/{kind}*", scope))


def trained(config: Config, layout: Layout) -> Layout:
    """The tensors that clients train in the rounds of a run: what they send of it, and what stays with them.

    A policy that alternates does so from round to round, so two rounds show all. Residuals are fitted after the rounds
    (`molehill.wire.keys.Key.residual`) and are none of these.

    Args:
        config: The run.
        layout: Of the shared model; clients of a lower rank train a part of each expert.
    """
    rounds = [scopes(config, number) for number in range(1, min(2, config.run.rounds) + 1)]
    return layout.where(lambda key: not key.residual and any(scope_of(each, key) != "frozen" for each in rounds))


def looked_at(config: Config, layout: Layout) -> Layout:
    """The tensors whose changes the run's assignment sees, of those that clients send; of the shared model's shapes."""
    if config.federation.assign.declared("assignment", "forms"):
        leaning = config.federation.assign.build("assignment").newcomer(routed(layout))
        apart = narrowed(scopes(config, 1), leaning, layout)
        return layout.where(lambda key: scope_of(apart, key) == "shared")
    sees: tuple[str, ...] = config.federation.assign.declared("assignment", "sees")
    patterns = scopes(config, 1)
    sent = trained(config, layout).where(lambda key: scope_of(patterns, key) == "shared")
    kinds = {key.kind for key in sent}
    kind = next((kind for kind in sees if kind in kinds), None)
    return sent.where(lambda key: key.kind == kind)


def select(
    config: Config, pool: Sequence[str], round_number: int, attempt: int, *, secret: int | None = None
) -> list[str]:
    """The clients of this round, in the order of ``pool``; drawn by ``secret`` in place of the run's seed, if given."""
    chosen: list[str] = config.federation.select.build(
        "client_selector",
        pool=pool,
        round_number=round_number,
        attempt=attempt,
        seed=config.run.seed if secret is None else secret,
    )
    return chosen


def seed(config: Config, round_number: int, client: str) -> int:
    """Seed of one client in one round: 63 bits from the run's seed, the round and the client's id alone."""
    text = f"{config.run.seed}/{round_number}/{client}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


@lru_cache(maxsize=8)  # a run has one
def _experts(layout: Layout) -> list[str]:
    return routed(layout)


def narrowed(patterns: Scopes, leaning: Leaning | None, layout: Layout) -> Scopes:
    """The patterns of a client, given those of all and what of the experts is its own."""
    if leaning is None:
        return patterns
    if leaning.apart:
        patterns = tuple((pattern, "frozen" if pattern == "*/gate*" else scope) for pattern, scope in patterns)
    if leaning.trains is None:
        return patterns
    others = [expert for expert in _experts(layout) if expert not in leaning.trains]
    left = [pattern for expert in others for pattern in (f"*/{expert}/*", f"*/gate.of.{expert}.*")]
    return (*((pattern, "frozen") for pattern in left), *patterns)


class Planner:
    """Writes the plans of one run.

    Args:
        config: The run's configuration.
        base: Digest of the base weights.
    """

    def __init__(self, config: Config, base: str) -> None:
        self._config = config
        self._base = base
        self._assignment: Assignment = config.federation.assign.build("assignment")
        scorer = config.molora.scorer
        said = scorer.declared("scorer", "leans") in scorer.declared("scorer", "fixed")
        self._says = said and self._assignment.leans  # all that a client leans on, so also that it leans on nothing
        self._last: tuple[int, tuple[Scopes, Shares]] = (-1, ((), Shares()))

    def plan(
        self,
        client: str,
        round_number: int,
        layout: Layout,
        blobs: Mapping[str, str],
        turn: int,
        accepted: int = 0,
        leaning: Leaning | None = None,
    ) -> ClientPlan:
        """Write the plan of one client.

        Args:
            client: Id of the client.
            round_number: Round; 0 for what is done before any.
            layout: Layout of the shared model.
            blobs: Digests to fetch by group.
            turn: Number of the client in the run, for what is dealt to clients in turn.
            accepted: Last round in which a delta of this client was used.
            leaning: What of the experts is the client's; None where nothing was decided: it is a newcomer.

        Returns:
            The plan.
        """
        config = self._config
        patterns, decided = self._decided(round_number)
        leaning = leaning or self._assignment.newcomer(_experts(layout)) or Leaning()
        patterns = narrowed(patterns, leaning, layout)
        return ClientPlan(
            run=config.run.name,
            round=round_number,
            client=client,
            base=self._base,
            layout=layout.digest,
            blobs={} if leaning.apart else dict(blobs),
            scopes=patterns,
            rank=_dealt(decided.ranks, turn),
            k=_dealt(decided.ks, turn),
            steps=config.train.steps,
            seed=seed(config, round_number, client),
            codec=config.wire.up,
            clip=config.privacy.clip,
            accepted=accepted,
            lean=dict(leaning.bias) or (dict.fromkeys(_experts(layout), 0.0) if self._says else {}),
            apart=leaning.apart,
        )

    def _decided(self, round_number: int) -> tuple[Scopes, Shares]:
        """Scopes of a round and what the policy decides; worked out once, since all its plans have them in common."""
        if self._last[0] != round_number:
            decided = scopes(self._config, round_number), shares(self._config, round_number)
            self._last = round_number, decided
        return self._last[1]


def _dealt(numbers: Sequence[int], turn: int) -> int | None:
    """The number of a client, of those that are dealt in turn; None where there are none."""
    return numbers[turn % len(numbers)] if numbers else None


def expected(plan: ClientPlan, layout: Layout) -> Layout:
    """Names and shapes that a reply to ``plan`` must hold: the shared keys, with ranks cut to the plan's."""
    return _expected(plan.scopes, plan.rank, layout)


@lru_cache(maxsize=64)  # the plans of a round differ in their ranks at most
def _expected(scopes: Scopes, rank: int | None, layout: Layout) -> Layout:
    def shape(key: Key) -> tuple[int, ...]:
        full = layout[key]
        if rank is None or key.role not in {"A", "B"}:
            return full
        axis = 0 if key.role == "A" else 1
        return tuple(min(size, rank) if i == axis else size for i, size in enumerate(full))

    return Layout({key: shape(key) for key in layout if scope_of(scopes, key) == "shared"})
