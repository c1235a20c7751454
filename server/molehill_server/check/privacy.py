"""Rules about privacy: what may reach the model, and what the server may be told."""

from __future__ import annotations

from collections.abc import Iterator

from molehill import evidence, registry
from molehill.config import Config
from molehill_server.check.conflict import Conflict, Rule, both_shared, closed_spaces, has_factors, sends_nothing
from molehill_server.planning.planner import shares


def _privacy(config: Config) -> Iterator[Conflict]:
    """The noise is that of a sum of clipped changes, so nothing else may reach the model."""
    if config.privacy.clip is None:
        return
    federation, policy = config.federation, config.federation.policy.name
    decided = shares(config, 1)

    def refuse(key: str, why: str) -> Conflict:
        return Conflict("refuse", ("privacy", key), why)

    if not federation.rule.build("rule").sums:
        yield refuse(
            "federation.rule",
            f"rule {federation.rule.name!r} looks at single updates to weigh them, so one client can change what all "
            "others count for and no noise of a bounded size hides it; use rule "
            f"{registry.those('rule', sums=True)}, which under privacy counts clients alike",
        )
    if not federation.space.build("space").closed:
        yield refuse(
            "federation.space",
            f"space {federation.space.name!r} sums products B A, whose size the clip of a change of A and B does not "
            f"bound; use space {closed_spaces()}",
        )
    if config.wire.up.build("codec").feedback:
        yield refuse(
            "wire.up",
            f"codec {config.wire.up.name!r} sends later what it left unsent (error feedback): what was clipped away "
            f"in one round would come in another; use {registry.those('codec', feedback=False)}",
        )
    if not decided.alike:
        yield refuse(
            "federation.policy",
            f"policy {policy!r} fills up the values of clients of lower rank with zeros, which is no sum of clipped "
            "changes; give all clients one rank",
        )
    if sends_nothing(config):
        yield refuse("federation.policy", f"policy {policy!r} sends nothing, so there is nothing to protect")
    if has_factors(config) and not federation.space.build("space").products and both_shared(config):
        yield Conflict(
            "warn",
            ("privacy", "federation.policy"),
            f"policy {policy!r} trains both factors, whose noises multiply in B A; policy "
            f"{registry.either(_freezing())} has one without",
        )


def _freezing() -> Iterator[str]:
    """Policies that freeze one factor of every expert in every round, which is sent without noise."""
    for method in registry.methods("policy"):
        decided = [registry.build("policy", method.name, round_number=number) for number in (1, 2)]
        if all({each.A, each.B} == {"shared", "frozen"} for each in decided):
            yield method.name


def _probes(config: Config) -> Iterator[Conflict]:
    """What probes add up is told client by client, and nothing hides it."""
    if config.evaluate.probes and not evidence.probed(config):
        key = "privacy.secure_aggregation" if config.privacy.secure_aggregation else "privacy.clip"
        yield Conflict(
            "refuse",
            ("evaluate.probes", key),
            "every client tells the server what probes add up over its held-out rows, in no masked sum and without "
            "noise; leave the probes out, and look with `molehill probe` on a machine that has rows",
        )


RULES: tuple[Rule, ...] = (_privacy, _probes)
