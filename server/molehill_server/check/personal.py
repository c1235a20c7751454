"""Rules about what stays with an owner, and what it makes of the final model."""

from __future__ import annotations

from collections.abc import Iterator

from molehill import registry
from molehill.config import Config
from molehill.tasks.kind import kind_of
from molehill_server.check.conflict import Conflict, Rule, has_factors
from molehill_server.planning.planner import decisions


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


def _restart_and_personal_gate(config: Config) -> Iterator[Conflict]:
    restarts = config.federation.lower.build("lower").restarts and has_factors(config)
    if restarts and config.personal.gate != "global":
        yield Conflict(
            "warn",
            ("federation.lower", "personal.gate"),
            "every round the experts move into their patches and start anew, so what a client's own gate has learnt "
            "about them is about the patches",
        )


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
    _split_gate,
    _restart_and_personal_gate,
    _computed_head,
    _candidates,
    _candidates_of_a_shared_model,
    _candidates_with_heads,
)
