"""Rules about secure aggregation: nothing that looks at a single client can work."""

from __future__ import annotations

from collections.abc import Iterator

from molehill import registry
from molehill.config import Config
from molehill.errors import MessageError
from molehill.secure.fixed import FixedPoint
from molehill.secure.messages import LEAST
from molehill_server.check.conflict import Conflict, Rule, asked, asked_by, closed_spaces, sends_nothing
from molehill_server.planning.planner import shares


def _secure_aggregation(config: Config) -> Iterator[Conflict]:
    """A sum of masked vectors says nothing of its parts, so nothing that looks at parts can work."""
    if not config.privacy.secure_aggregation:
        return
    federation, policy = config.federation, config.federation.policy.name

    def refuse(key: str, why: str) -> Conflict:
        return Conflict("refuse", ("privacy.secure_aggregation", key), why)

    if not federation.rule.build("rule").sums:
        yield refuse(
            "federation.rule",
            f"rule {federation.rule.name!r} looks at single updates to weigh them, and the server sees their sum only; "
            f"use rule {registry.those('rule', sums=True)}",
        )
    if not federation.space.build("space").closed:
        yield refuse(
            "federation.space",
            f"space {federation.space.name!r} is made of every client's own factors, and the server sees the sum of "
            f"what is sent only; use space {closed_spaces()}",
        )
    if not shares(config, 1).alike:
        yield refuse(
            "federation.policy",
            f"policy {policy!r} has clients send tensors of different shapes, which cannot be added up; give all "
            "clients one rank",
        )
    if sends_nothing(config):
        yield refuse("federation.policy", f"policy {policy!r} sends nothing, so there is nothing to hide")
    if not config.wire.up.build("codec").exact:
        yield refuse(
            "wire.up",
            f"codec {config.wire.up.name!r} leaves something out of every number or leaves numbers out, and masked "
            f"numbers look random: they travel whole, as 8 bytes each; use {registry.those('codec', exact=True)}",
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
    count = asked(config)
    if count < LEAST:
        yield Conflict(
            "refuse",
            ("privacy.secure_aggregation", asked_by(config)),
            f"{count} clients take part in a round, and a sum hides its parts among {LEAST} or more",
        )
    elif count == LEAST:
        yield Conflict(
            "warn",
            ("privacy.secure_aggregation", asked_by(config)),
            f"{count} clients take part in a round, which are as few as a sum may be of: none may drop out, or the "
            "round is tried again",
        )
    try:
        FixedPoint.of(config, max(count, LEAST), config.privacy.max_examples or 1)
    except MessageError as error:
        yield Conflict("refuse", keys, error.what)


RULES: tuple[Rule, ...] = (_secure_aggregation,)
