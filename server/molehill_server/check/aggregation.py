"""Rules about what clients send and how it is merged."""

from __future__ import annotations

from collections.abc import Iterator

from molehill import registry
from molehill.config import Config
from molehill_server.aggregate import conflicts
from molehill_server.check.conflict import Conflict, Rule, asked, asked_by, both_shared, has_factors
from molehill_server.planning.planner import shares


def _aggregation(config: Config) -> Iterator[Conflict]:
    """Space, lower and server optimiser must fit each other."""
    for keys, why in conflicts(config.federation):
        yield Conflict("refuse", keys, why)


def _products_need_factors(config: Config) -> Iterator[Conflict]:
    policy, space = config.federation.policy.name, config.federation.space.name
    if not config.federation.space.build("space").closed and not both_shared(config):
        yield Conflict(
            "refuse",
            ("federation.policy", "federation.space"),
            f"policy {policy!r} does not send both factors of every client, which the products of space {space!r} are "
            "made of; where one factor is common to all, space "
            f"{registry.those('space', products=True, closed=True)} is exact",
        )


def _lowers_rewrite_factors(config: Config) -> Iterator[Conflict]:
    """A factor that is frozen comes from the server anew in every round; one that stays on the clients does not."""
    federation, policy = config.federation, config.federation.policy.name
    scopes = {scope for decided in (shares(config, 1), shares(config, 2)) for scope in (decided.A, decided.B)}
    fits = scopes <= ({"shared", "frozen"} if federation.space.build("space").common else {"shared"})
    lower = federation.lower.build("lower")
    if (lower.needs_products or lower.patches) and not fits:
        yield Conflict(
            "refuse",
            ("federation.policy", "federation.lower"),
            f"lower {federation.lower.name!r} makes both factors anew, but policy {policy!r} freezes one or keeps it "
            "on the clients, so theirs would no longer belong to the server's",
        )


def _enough_to_judge(config: Config) -> Iterator[Conflict]:
    """A rule against poisoned updates needs a majority of others in every round."""
    least = config.federation.rule.build("rule").least
    count = asked(config)
    if count < least:
        yield Conflict(
            "refuse",
            ("federation.rule", asked_by(config)),
            f"rule {config.federation.rule.name!r} needs {least} updates a round to tell which are poisoned, and of "
            f"{config.data.clients} clients {count} take part; choose a smaller f, or more clients",
        )


def _norms_need_products(config: Config) -> Iterator[Conflict]:
    rule, decided = config.federation.rule, shares(config, 1)
    kept = [factor for factor in ("A", "B") if decided.of(factor) == "personal"]
    if kept and rule.build("rule").needs_pairs:
        yield Conflict(
            "refuse",
            ("federation.policy", "federation.rule"),
            f"rule {rule.name!r} weighs by the norm of B A, but {' and '.join(kept)} never leaves the clients; use "
            f"rule {registry.those('rule', needs_pairs=False, sums=True)}",
        )


def _common_factor(config: Config) -> Iterator[Conflict]:
    policy, space = config.federation.policy.name, config.federation.space
    fixed = space.build("space").common
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
        able = registry.those("space", closed=True, products=False)
        yield Conflict("refuse", keys, f"space {space.name!r} needs one common factor, but {why}; use space {able}")


def _sends_changes(config: Config) -> Iterator[Conflict]:
    name = config.wire.down.name
    if config.wire.down.build("codec").feedback:
        yield Conflict(
            "refuse",
            ("wire.down",),
            f"codec {name!r} sends the largest changes and owes the rest; the server sends values, not changes",
        )


def _factors(config: Config) -> Iterator[Conflict]:
    """What is about factors is about experts that have some; see `molehill_server.check.kinds` for the others."""
    if has_factors(config):
        for rule in (_products_need_factors, _lowers_rewrite_factors, _norms_need_products, _common_factor):
            yield from rule(config)


RULES: tuple[Rule, ...] = (_aggregation, _factors, _enough_to_judge, _sends_changes)
