"""Rules about experts that are no pairs of factors: what is made for A and B finds nothing to act on."""

from __future__ import annotations

from collections.abc import Iterator

from molehill.config import Config
from molehill_server.check.conflict import Conflict, Rule, has_factors
from molehill_server.planning.planner import decisions


def _clients(config: Config) -> Iterator[Conflict]:
    """What clients are to train and send of factors."""
    if has_factors(config):
        return
    expert, policy, init = config.molora.expert.name, config.federation.policy.name, config.molora.init
    decided = [decisions(config, number) for number in (1, 2)]
    keys = ("federation.policy", "molora.expert")
    if any(each.ranks for each in decided):
        yield Conflict(
            "refuse",
            keys,
            f"policy {policy!r} cuts the factors of experts to the rank that a client can afford, and expert "
            f"{expert!r} has none to cut; give all clients one rank",
        )
    if any(each.A != each.B for each in decided):
        scopes = " or ".join(dict.fromkeys(each.dense for each in decided))
        yield Conflict(
            "warn",
            keys,
            f"policy {policy!r} treats the factors A and B differently, and expert {expert!r} has neither: all its "
            f"tensors are {scopes}",
        )
    if init.build("init").frozen:
        yield Conflict(
            "warn",
            ("molora.init", "molora.expert"),
            f"init {init.name!r} freezes a factor, and expert {expert!r} has none: all its tensors are trained",
        )


def _server(config: Config) -> Iterator[Conflict]:
    """What the server makes of factors and their products."""
    if has_factors(config):
        return
    expert, federation = config.molora.expert.name, config.federation
    space, rule, lower = federation.space.build("space"), federation.rule.build("rule"), federation.lower.build("lower")
    if rule.needs_pairs:
        yield Conflict(
            "refuse",
            ("federation.rule", "molora.expert"),
            f"rule {federation.rule.name!r} weighs an expert by its factors, and expert {expert!r} has none",
        )
    if rule.needs_products:
        yield Conflict(
            "warn",
            ("federation.rule", "molora.expert"),
            f"rule {federation.rule.name!r} compares what experts do by their products B A, and expert {expert!r} has "
            "none: its tensors are judged as they are, so what it bounds is how far their numbers go, not what the "
            "expert says",
        )
    elif space.products or lower.needs_products or lower.patches:
        yield Conflict(
            "warn",
            ("federation.space", "federation.lower", "molora.expert"),
            f"space {federation.space.name!r} with lower {federation.lower.name!r} is about products B A, and expert "
            f"{expert!r} has none: its tensors are averaged as they are",
        )


RULES: tuple[Rule, ...] = (_clients, _server)
