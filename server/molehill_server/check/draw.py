"""Rules about how clients are drawn, and what a run spends of the privacy budget."""

from __future__ import annotations

from collections.abc import Iterator

from molehill import registry
from molehill.config import Config
from molehill.draws import is_poisson
from molehill_server.check.conflict import Conflict, Rule, asked
from molehill_server.privacy.accountant import Accountant
from molehill_server.privacy.draw import Draw


def _sampling(config: Config) -> Iterator[Conflict]:
    """What a draw is counted as must be what it is; see `Draw`."""
    draw, ref, privacy = Draw.of(config), config.federation.select, config.privacy
    keys = ("privacy.secure_aggregation", "federation.select")
    if privacy.secure_aggregation and draw.rate is not None:
        sure = [each for each in registry.methods("client_selector") if not is_poisson(each.params)]
        yield Conflict(
            "refuse",
            keys,
            f"selector {ref.name!r} leaves to chance how many clients take part, and a sum is unmasked among as many "
            f"as every client expects; use selector {registry.either(each.name for each in sure)}",
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
    if draw.secret and draw.expected(config.data.clients, asked(config)) < 1:
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
    each = Draw.of(config).spent(config.data.clients, asked(config))
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


RULES: tuple[Rule, ...] = (_sampling, _budget)
